"""Files of runs and pretrained weights that ``bad_input.py`` damages."""

from __future__ import annotations

import json
import math
import pickle
import random
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from selfsup_xbn.config.modes import PretrainConfig
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.config.schema import resolved
from selfsup_xbn.models.encoder import build_encoder
from selfsup_xbn.models.pretrained import load_weights
from selfsup_xbn.report.curves import result_lines
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_config, read_metrics
from selfsup_xbn.training.run import Run
from selfsup_xbn.training.state import restore, state_of
from tests.robustness.bad_input_target import VALID, Target, seeded

# ------------------------------------------------------------------------------------------------------- run folders


def write_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(resolved(RECIPES["sop"]) | {"environment": {}}, indent=2))


def count_options(folder: Path) -> int:
    """Return the number of all options if the file has those that every version wrote and that change results."""
    config = RECIPES["sop"]
    names = json.loads((folder / "config.json").read_bytes()).keys()
    needed = {
        item.name for item in fields(config) if item.metadata["affects_results"] and not item.metadata["added_later"]
    }
    return len(resolved(config)) if needed <= names else 0


def write_metrics(folder: Path) -> None:
    records = [{"epoch": n, "loss": 3.25 / (n + 1), "knn_top1": 50.5 + n, "drift": None, "gain": 1} for n in range(6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def read_and_show_metrics(folder: Path) -> int:
    result_lines(folder)
    return len(read_metrics(folder))


def count_records(folder: Path) -> int:
    content = (folder / "metrics.jsonl").read_bytes()
    return content.count(b"\n") + (not content.endswith(b"\n"))


@cache
def small_run() -> Run:
    """Return a run; building it takes longer than loading its state, so it is built once."""
    return Run(
        PretrainConfig(
            backbone="convnet-digits", limit_train=32, batch_size=16, queue_size="16", dim=4, epochs=3, knn_k=5
        )
    )


@cache
def small_state() -> bytes:
    """Return a pickled checkpoint in the middle of an epoch."""
    run = small_run()
    run.train_step(next(run.batches.epoch(0)))
    return pickle.dumps(state_of(run) | {"log_bytes": 7})


def write_checkpoint(folder: Path) -> None:
    checkpoint.save(pickle.loads(small_state()), folder)


def read_checkpoint(folder: Path) -> int:
    restore(small_run(), checkpoint.load(folder))
    return 1


def read_state(folder: Path) -> int:
    """Read a checkpoint with a valid checksum and one changed value, as another version may have written it.

    The damaged file is the seed that chooses the value.
    """
    state, seed = pickle.loads(small_state()), (folder / "seed").read_bytes()
    if seed != VALID:
        change_one(state, random.Random(seed))
    checkpoint.save(state, folder)
    return read_checkpoint(folder)


def change_one(place: Any, rng: random.Random) -> None:
    """Replace or delete one value of nested mappings and lists."""
    key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.9:
        change_one(place[key], rng)
    elif rng.random() < 0.3:
        del place[key]
    else:
        numbers = (-1, 10**30, 2.5, math.nan, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64))
        place[key] = rng.choice((None, "x", [], {}, *numbers))


# ------------------------------------------------------------------------------------------------ pretrained weights


@cache
def backbone() -> nn.Module:
    return build_encoder("convnet4", 4).backbone


def write_weights(folder: Path) -> None:
    """Write the same weights in two formats."""
    torch.save({"state_dict": backbone().state_dict()}, folder / "weights.pt")
    save_file(
        {name: tensor.contiguous() for name, tensor in backbone().state_dict().items()}, folder / "weights.safetensors"
    )


def read_weights(folder: Path) -> int:
    return sum(len(load_weights(backbone(), folder / f"weights.{ending}").matched) for ending in ("pt", "safetensors"))


def count_weights(folder: Path) -> int:
    """Return the number of tensors that fit, or -1 if less than 90% of those of the backbone or the file do."""
    fitting = [
        fitting_weights(torch.load(folder / "weights.pt", weights_only=True)["state_dict"]),
        fitting_weights(load_file(folder / "weights.safetensors")),
    ]
    return sum(fitting) if min(fitting) >= 0 else -1


def fitting_weights(state: dict[str, torch.Tensor]) -> int:
    own = {(name, tensor.shape) for name, tensor in backbone().state_dict().items()}
    theirs = {(name, tensor.shape) for name, tensor in state.items()}
    common, names = [{name for name, _ in pairs if "num_batches" not in name} for pairs in (own & theirs, own | theirs)]
    return len(own & theirs) if len(common) >= 0.9 * len(names) else -1


def read_partial_weights(folder: Path) -> int:
    """Read weights of which some tensors are missing, renamed or of another shape.

    The damaged file is the seed that draws them.
    """
    seed, state = (folder / "seed").read_bytes(), dict(backbone().state_dict())
    if seed != VALID:
        rng = random.Random(seed)
        for name in rng.sample(sorted(state), rng.randint(0, 6)):
            tensor, kind = state.pop(name), rng.randrange(3)
            if kind:
                state[f"{name}2" if kind == 1 else name] = torch.cat([tensor.flatten(), tensor.flatten()])
    torch.save({"state_dict": state}, folder / "weights.pt")
    return len(load_weights(backbone(), folder / "weights.pt").matched)


def count_partial_weights(folder: Path) -> int:
    return fitting_weights(torch.load(folder / "weights.pt", weights_only=True)["state_dict"])


TARGETS = {
    "config.json": Target(write_config, "*", lambda folder: len(resolved(read_config(folder))), count_options),
    "metrics.jsonl": Target(write_metrics, "*", read_and_show_metrics, count_records),
    "checkpoint": Target(write_checkpoint, "*.pt", read_checkpoint, lambda folder: 1),
    "checkpoint's values": seeded(read_state, lambda folder: 1),
    "weights": Target(write_weights, "weights.*", read_weights, count_weights),
    "partial weights": seeded(read_partial_weights, count_partial_weights),
}
