"""Evaluations after the fact: of a run's checkpoint, or of an encoder from elsewhere."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfsup_xbn.config.registry import EVALUATORS
from selfsup_xbn.config.schema import Config, PretrainConfig
from selfsup_xbn.data import ImageData, data_of
from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.evaluators import Evaluator, baselines
from selfsup_xbn.evaluation.summary import comparison_table
from selfsup_xbn.models.encoder import Encoder, random_encoder
from selfsup_xbn.models.pretrained import load_weights
from selfsup_xbn.runs.load import load_run
from selfsup_xbn.utils.device import device_of


def evaluate_run(kind: str, folder: Path, given: dict[str, Any], best: bool = False) -> list[str]:
    """Return the table of a run's encoder, with the options ``given`` in place of the run's own."""
    run = load_run(folder, best)
    own = replace(run.config, image_size=run.image_size, limit_train=0 if "data" in given else run.config.limit_train)
    config = replace(own, **given)
    data = data_of(config)
    if data.channels != run.channels:
        raise UserError(
            f"--data {config.data} has {data.channels} channels, and the run's network takes {run.channels}: "
            "evaluate it on images like those that it was trained on"
        )
    if "image_size" in given:
        random_encoder(config, run.channels, data.image_size)  # refuses a size that the network cannot take
    title = f"{EVALUATORS.find(kind).title(config)}, encoder of {folder}"
    return [*data.notes, title, *comparison_table(_compare(kind, config, data, run.trained, run.untrained))]


def evaluate_weights(kind: str, weights: str, backbone: str, given: dict[str, Any]) -> list[str]:
    """Return the table of a backbone whose weights come from a file, after a report of which tensors fitted."""
    config = PretrainConfig(**({"backbone": backbone} | given))
    data = data_of(config)
    torch.manual_seed(config.seed)
    untrained = random_encoder(config, data.channels, data.image_size)
    untrained = Encoder(untrained.backbone, nn.Identity(), untrained.feature_dim, untrained.feature_dim)
    trained = copy.deepcopy(untrained)
    report = load_weights(trained.backbone, weights)
    values = _compare(kind, config, data, trained, untrained)
    shown = {name: value for name, value in values.items() if not name.startswith("knn_top1_backbone")}
    title = f"{EVALUATORS.find(kind).title(config)}, features of {backbone} from {weights}"
    return [*data.notes, *report.lines(), title, *comparison_table(shown)]


def _compare(kind: str, config: Config, data: ImageData, trained: Encoder, untrained: Encoder) -> dict[str, float]:
    device = device_of(config.device)
    evaluator: Evaluator = EVALUATORS.find(kind).from_config(config, data, device)
    return baselines(evaluator, untrained.to(device)) | evaluator.encoder(trained.to(device))
