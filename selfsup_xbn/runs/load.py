"""Encoder of a run folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from selfsup_xbn.config.saved import differences, from_resolved
from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import UserError, printable
from selfsup_xbn.methods.base import method_class
from selfsup_xbn.models.encoder import Encoder, random_encoder
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import CONFIG, read_config


class TrainedRun(NamedTuple):
    """Configuration and encoder of a run.

    Attributes:
        config: Configuration of the run.
        image_size: Height and width in pixels of the images that the network takes.
        channels: Number of channels of the images.
        trained: Encoder after training.
    """

    config: Config
    image_size: int
    channels: int
    trained: Encoder


def load_run(folder: Path, best: bool = False) -> TrainedRun:
    """Load a run with its encoder after training.

    Args:
        folder: Run folder.
        best: Whether to load the best model, ``best.pt``, instead of the last one.

    Raises:
        UserError: The folder has no run, the run has no best model, or the checkpoint cannot be read.
    """
    saved = read_config(folder)
    if best and not (folder / checkpoint.BEST).exists():
        raise UserError(f"{folder} has no {checkpoint.BEST}: {_why_no_best(saved)}; omit --best")
    state = checkpoint.load(folder, checkpoint.BEST if best else checkpoint.NAME)
    config, network = from_resolved(state["config"]), state.get("network")
    if changes := differences(config, saved, "the checkpoint", CONFIG):
        warnings.warn(printable(f"{folder / CONFIG} was changed after the training ({changes[0]})"), stacklevel=2)
    if not isinstance(network, dict) or network.keys() != {"channels", "image_size"}:
        raise UserError(f"the checkpoint in {folder} is damaged: expected channels and image_size of the network")
    trained = random_encoder(config, **network)
    prefix = method_class(config).encoder_name + "."
    state_dict = {
        name.removeprefix(prefix): value for name, value in state["method"].items() if name.startswith(prefix)
    }
    try:
        trained.load_state_dict(state_dict)
    except RuntimeError:
        raise UserError(f"the checkpoint in {folder} does not fit the network of its configuration") from None
    return TrainedRun(config, network["image_size"], network["channels"], trained)


def _why_no_best(config: Config) -> str:
    if config.keeps_best:
        return f"{config.mode} writes it after the first evaluation"
    return f"{config.mode} keeps none without validation images"
