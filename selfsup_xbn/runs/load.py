"""The encoder of a finished run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch

from selfsup_xbn.config.schema import Config, from_resolved
from selfsup_xbn.errors import UserError
from selfsup_xbn.methods.base import method_class
from selfsup_xbn.models.encoder import Encoder, random_encoder
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_config


class TrainedRun(NamedTuple):
    """A run's config, the images that its network takes, and its encoder after and before training."""

    config: Config
    image_size: int
    channels: int
    trained: Encoder
    untrained: Encoder


def load_run(folder: Path, best: bool = False) -> TrainedRun:
    """Return the encoder of a run's last or best checkpoint, and the same encoder before training.

    Raises:
        UserError: no run there, or its checkpoint cannot be read.
    """
    read_config(folder)
    state = checkpoint.load(folder, checkpoint.BEST if best else checkpoint.NAME)
    config, network = from_resolved(state["config"]), state.get("network")
    if not isinstance(network, dict) or network.keys() != {"channels", "image_size"}:
        raise UserError(f"the checkpoint in {folder} does not say what network it is of: it is damaged")
    torch.manual_seed(config.seed)
    untrained = random_encoder(config, **network)
    trained = copy.deepcopy(untrained)
    prefix = method_class(config).encoder_name + "."
    own = {name.removeprefix(prefix): value for name, value in state["method"].items() if name.startswith(prefix)}
    try:
        trained.load_state_dict(own)
    except RuntimeError:
        raise UserError(f"the checkpoint in {folder} does not fit the network that its config names") from None
    return TrainedRun(config, network["image_size"], network["channels"], trained, untrained)
