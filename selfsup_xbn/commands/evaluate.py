"""Evaluation of the checkpoint of a run, or of a backbone with weights from a file."""

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


def evaluate_run(kind: str, folder: Path, overrides: dict[str, Any], best: bool = False) -> list[str]:
    """Evaluate the encoder of a run and return the lines of the report.

    Args:
        kind: Name of the evaluator in ``EVALUATORS``.
        folder: Run folder.
        overrides: Options that replace those of the run.
        best: Whether to evaluate the best model by Recall@1 instead of the last one.

    Raises:
        UserError: The folder has no readable run, or the data set does not fit the encoder.
    """
    run = load_run(folder, best)
    limit_train = 0 if "data" in overrides else run.config.limit_train
    config = replace(replace(run.config, image_size=run.image_size, limit_train=limit_train), **overrides)
    data = data_of(config)
    if data.channels != run.channels:
        raise UserError(
            f"--data {config.data}: expected images of {run.channels} channels, as the run was trained on, "
            f"got {data.channels}"
        )
    if "image_size" in overrides:
        random_encoder(config, run.channels, data.image_size)  # raises if the size is invalid for the network
    title = f"{EVALUATORS.find(kind).title(config)}, encoder of {folder}"
    return [*data.notes, title, *comparison_table(_compare(kind, config, data, run.trained, run.untrained))]


def evaluate_weights(kind: str, weights: str, backbone: str, overrides: dict[str, Any]) -> list[str]:
    """Evaluate a backbone with weights from a file and return the lines of the report.

    The report states which tensors of the file were loaded.

    Args:
        kind: Name of the evaluator in ``EVALUATORS``.
        weights: Path of the file.
        backbone: Name of the backbone.
        overrides: Options that replace those of ``PretrainConfig``.

    Raises:
        UserError: The backbone or the data set is unknown, or the weights do not fit the backbone.
    """
    config = PretrainConfig(**({"backbone": backbone} | overrides))
    data = data_of(config)
    torch.manual_seed(config.seed)
    untrained = random_encoder(config, data.channels, data.image_size)
    untrained = Encoder(untrained.backbone, nn.Identity(), untrained.feature_dim, untrained.feature_dim)
    trained = copy.deepcopy(untrained)
    report = load_weights(trained.backbone, weights, partial=config.partial_weights)
    values = _compare(kind, config, data, trained, untrained)
    shown = {name: value for name, value in values.items() if not name.startswith("knn_top1_backbone")}
    title = f"{EVALUATORS.find(kind).title(config)}, features of {backbone} from {weights}"
    return [*data.notes, *report.lines(), title, *comparison_table(shown)]


def _compare(kind: str, config: Config, data: ImageData, trained: Encoder, untrained: Encoder) -> dict[str, float]:
    device = device_of(config.device)
    evaluator: Evaluator = EVALUATORS.find(kind).from_config(config, data, device)
    return baselines(evaluator, untrained.to(device)) | evaluator.encoder(trained.to(device))
