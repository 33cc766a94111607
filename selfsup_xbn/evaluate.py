"""Evaluations after the fact: of a run's checkpoint, or of an encoder from elsewhere."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from selfsup_xbn import build, checkpoint
from selfsup_xbn.config import Config, PretrainConfig, from_resolved
from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.probe import KnnProbe
from selfsup_xbn.models import Encoder
from selfsup_xbn.report import knn_table
from selfsup_xbn.run_log import read_config
from selfsup_xbn.weights import load_weights


class TrainedRun(NamedTuple):
    """What a run's folder gives to evaluate."""

    config: Config
    image_size: int
    channels: int
    trained: Encoder
    untrained: Encoder


def open_run(folder: Path) -> TrainedRun:
    """The encoder of a run's checkpoint, and the same encoder before training.

    Raises:
        UserError: no run there, or its checkpoint cannot be read.
    """
    read_config(folder)
    state = checkpoint.load(folder)
    config, network = from_resolved(state["config"]), state["network"]
    torch.manual_seed(config.seed)
    untrained = build.random_encoder(config, **network)
    trained = copy.deepcopy(untrained)
    prefix = "encoder_q." if config.mode == "pretrain" else "encoder."
    own = {name.removeprefix(prefix): value for name, value in state["method"].items() if name.startswith(prefix)}
    trained.load_state_dict(own)
    return TrainedRun(config, network["image_size"], network["channels"], trained, untrained)


def knn_of_run(folder: Path, given: dict[str, Any]) -> list[str]:
    """k-NN table of a run's encoder, with the options ``given`` in place of the run's own."""
    run = open_run(folder)
    own = replace(run.config, image_size=run.image_size, limit_train=0 if "data" in given else run.config.limit_train)
    config = replace(own, **given)
    data = build.data_of(config)
    if data.channels != run.channels:
        raise UserError(
            f"--data {config.data} has {data.channels} channels, and the run's network takes {run.channels}: "
            "evaluate it on images like those that it was trained on"
        )
    probe = build.probe_of(config, data, build.device_of(config.device))
    title = f"k-NN on {config.data}, k {probe.k}, T {config.knn_temperature:g}, encoder of {folder}"
    return [*data.notes, title, *knn_table(_compare(probe, run.trained, run.untrained))]


def knn_of_weights(weights: str, backbone: str, given: dict[str, Any]) -> list[str]:
    """k-NN table of a backbone whose weights come from a file, and how well the file fitted."""
    config = PretrainConfig(**({"backbone": backbone} | given))
    data = build.data_of(config)
    probe = build.probe_of(config, data, build.device_of(config.device))
    torch.manual_seed(config.seed)
    untrained = build.random_encoder(config, data.channels, data.image_size)
    trained = copy.deepcopy(untrained)
    report = load_weights(trained.backbone, weights)
    found = {
        key: top1 for key, top1 in _compare(probe, trained, untrained).items() if "backbone" in key or "raw" in key
    }
    title = f"k-NN on {config.data}, k {probe.k}, T {config.knn_temperature:g}, {backbone} from {weights}"
    return [*data.notes, *report.lines(), title, *knn_table(found)]


def _compare(probe: KnnProbe, trained: Encoder, untrained: Encoder) -> dict[str, float]:
    found = {"knn_top1_raw_pixels": probe.raw_pixels()}
    found |= probe.encoder(untrained.to(probe.device), "_untrained")
    return found | probe.encoder(trained.to(probe.device))
