"""Evaluations after the fact: of a run's checkpoint, or of an encoder from elsewhere."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from selfsup_xbn.config.schema import Config, PretrainConfig, from_resolved, numbers
from selfsup_xbn.data import ImageData
from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.evaluators import KnnProbe, Probe, RetrievalProbe, baselines
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.models.pretrained import load_weights
from selfsup_xbn.report.curves import comparison_table
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_config
from selfsup_xbn.training import build


class TrainedRun(NamedTuple):
    """What a run's folder gives to evaluate."""

    config: Config
    image_size: int
    channels: int
    trained: Encoder
    untrained: Encoder


def open_run(folder: Path, best: bool = False) -> TrainedRun:
    """The encoder of a run's last or best checkpoint, and the same encoder before training.

    Raises:
        UserError: no run there, or its checkpoint cannot be read.
    """
    read_config(folder)
    state = checkpoint.load(folder, checkpoint.BEST if best else checkpoint.NAME)
    config, network = from_resolved(state["config"]), state.get("network")
    if not isinstance(network, dict) or network.keys() != {"channels", "image_size"}:
        raise UserError(f"the checkpoint in {folder} does not say what network it is of: it is damaged")
    torch.manual_seed(config.seed)
    untrained = build.random_encoder(config, **network)
    trained = copy.deepcopy(untrained)
    prefix = "encoder_q." if config.mode == "pretrain" else "encoder."
    own = {name.removeprefix(prefix): value for name, value in state["method"].items() if name.startswith(prefix)}
    try:
        trained.load_state_dict(own)
    except RuntimeError:
        raise UserError(f"the checkpoint in {folder} does not fit the network that its config names") from None
    return TrainedRun(config, network["image_size"], network["channels"], trained, untrained)


def evaluate_run(kind: str, folder: Path, given: dict[str, Any], best: bool = False) -> list[str]:
    """Table of a run's encoder, with the options ``given`` in place of the run's own."""
    run = open_run(folder, best)
    own = replace(run.config, image_size=run.image_size, limit_train=0 if "data" in given else run.config.limit_train)
    config = replace(own, **given)
    data = build.data_of(config)
    if data.channels != run.channels:
        raise UserError(
            f"--data {config.data} has {data.channels} channels, and the run's network takes {run.channels}: "
            "evaluate it on images like those that it was trained on"
        )
    if "image_size" in given:
        build.random_encoder(config, run.channels, data.image_size)  # refuses a size that the network cannot take
    probe = _probe(kind, config, data)
    title = f"{_title(kind, config)}, encoder of {folder}"
    return [*data.notes, title, *comparison_table(_compare(probe, run.trained, run.untrained, config))]


def evaluate_weights(kind: str, weights: str, backbone: str, given: dict[str, Any]) -> list[str]:
    """Table of a backbone whose weights come from a file, and how well the file fitted."""
    config = PretrainConfig(**({"backbone": backbone} | given))
    data = build.data_of(config)
    torch.manual_seed(config.seed)
    untrained = build.random_encoder(config, data.channels, data.image_size)
    untrained = Encoder(untrained.backbone, nn.Identity(), untrained.feature_dim, untrained.feature_dim)
    trained = copy.deepcopy(untrained)
    report = load_weights(trained.backbone, weights)
    found = _compare(_probe(kind, config, data), trained, untrained, config)
    shown = {name: value for name, value in found.items() if not name.startswith("knn_top1_backbone")}
    title = f"{_title(kind, config)}, features of {backbone} from {weights}"
    return [*data.notes, *report.lines(), title, *comparison_table(shown)]


def _probe(kind: str, config: Config, data: ImageData) -> Probe:
    device = build.device_of(config.device)
    if kind == "knn":
        return KnnProbe(data, k=config.knn_k, temperature=config.knn_temperature, device=device, workers=config.workers)
    ks = numbers(config.recall_ks, "--recall-ks")
    return RetrievalProbe(data, ks, device=device, workers=config.workers)


def _title(kind: str, config: Config) -> str:
    if kind == "knn":
        return f"k-NN on {config.data}, k {config.knn_k}, T {config.knn_temperature:g}"
    return f"retrieval on {config.data}"


def _compare(probe: Probe, trained: Encoder, untrained: Encoder, config: Config) -> dict[str, float]:
    device = build.device_of(config.device)
    return baselines(probe, untrained.to(device)) | probe.encoder(trained.to(device))
