"""Evaluation of the checkpoint of a run, or of a backbone with weights from a file."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfsup_xbn.config.modes import PretrainConfig
from selfsup_xbn.config.registry import EVALUATORS
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data import ImageData, data_of
from selfsup_xbn.data.parts import part_lines
from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.evaluators import Evaluator, baselines
from selfsup_xbn.evaluation.summary import comparison_table
from selfsup_xbn.models.encoder import Encoder, random_encoder
from selfsup_xbn.models.pretrained import check_weights, initial_encoder, load_weights
from selfsup_xbn.runs.load import load_run
from selfsup_xbn.utils.device import device_of


def evaluate_run(
    kind: str, folder: Path, overrides: dict[str, Any], *, best: bool = False, compare: bool = True
) -> list[str]:
    """Evaluate the encoder of a run and return the lines of the report.

    The initial encoder of the comparison has the initial weights of the run.

    Args:
        kind: Name of the evaluator in ``EVALUATORS``.
        folder: Run folder.
        overrides: Options that replace those of the run.
        best: Whether to evaluate the best model, ``best.pt``, instead of the last one.
        compare: Whether to evaluate raw pixels and the initial encoder too.

    Raises:
        UserError: The folder has no readable run, or the data set does not fit the encoder.
    """
    run = load_run(folder, best)
    limits: dict[str, Any] = {"limit_train": 0, "limit_test": 0, "split_classes": "0"} if "data" in overrides else {}
    config = replace(run.config, **limits | {"image_size": run.image_size} | overrides)
    data = data_of(config)
    if data.channels != run.channels:
        raise UserError(
            f"--data {config.data}: expected images of {run.channels} channels, as the run was trained on, "
            f"got {data.channels}"
        )
    if "image_size" in overrides:
        random_encoder(config, run.channels, data.image_size)  # raises if the size is invalid for the network
    untrained = None
    if compare:
        torch.manual_seed(config.seed)
        untrained, _ = initial_encoder(config, run.channels, run.image_size)
    title = f"{EVALUATORS.find(kind).title(config)}, encoder of {folder}"
    values = _compare(kind, config, data, run.trained, untrained)
    return [*data.notes, *part_lines(data, kind), title, *comparison_table(values)]


def evaluate_weights(
    kind: str, weights: str, backbone: str, overrides: dict[str, Any], *, compare: bool = True
) -> list[str]:
    """Evaluate a backbone with weights from a file or of ImageNet, and return the lines of the report.

    The report states which tensors of the file were loaded.

    Args:
        kind: Name of the evaluator in ``EVALUATORS``.
        weights: Path of the file, or ``"imagenet"``.
        backbone: Name of the backbone.
        overrides: Options that replace those of ``PretrainConfig``.
        compare: Whether to evaluate raw pixels and the initial encoder too.

    Raises:
        UserError: The backbone or the data set is unknown, or the weights do not fit the backbone.
    """
    config = PretrainConfig(**({"backbone": backbone, "weights": weights} | overrides))
    check_weights(config)
    data = data_of(config)
    torch.manual_seed(config.seed)
    untrained = _without_head(random_encoder(config, data.channels, data.image_size))
    if weights == "imagenet":
        trained, lines = initial_encoder(config, data.channels, data.image_size)
        trained = _without_head(trained)
    else:
        trained = copy.deepcopy(untrained)
        lines = load_weights(trained.backbone, weights, partial=config.partial_weights).lines()
    values = _compare(kind, config, data, trained, untrained if compare else None)
    shown = {name: value for name, value in values.items() if "_backbone" not in name}
    title = f"{EVALUATORS.find(kind).title(config)}, features of {backbone} from {weights}"
    return [*data.notes, *part_lines(data, kind), *lines, title, *comparison_table(shown, head=False)]


def _without_head(encoder: Encoder) -> Encoder:
    return Encoder(encoder.backbone, nn.Identity(), encoder.feature_dim, encoder.feature_dim)


def _compare(
    kind: str, config: Config, data: ImageData, trained: Encoder, untrained: Encoder | None
) -> dict[str, float]:
    if not len(data.test):
        raise UserError(f"{data.name} has no test images to evaluate: try --split-classes 50%")
    device = device_of(config.device)
    evaluator: Evaluator = EVALUATORS.find(kind).from_config(config, data, device)
    values = {} if untrained is None else baselines(evaluator, untrained.to(device))
    return values | evaluator.encoder(trained.to(device))
