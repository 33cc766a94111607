"""All works of the benchmarks and their goals. A work maps implementations to functions that create its inputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from experiments.benchmarks import evaluators, steps

Make = Callable[[], Callable[[], Any]]


class Goal(NamedTuple):
    """Upper limit of a measured value.

    Attributes:
        work: name of the work.
        name: name of the implementation.
        than: implementation to compare with, or a sum such as "a + b"; "" for an absolute limit.
        limit: limit in ``unit``.
        unit: "x" for a ratio, or the beginning of a phrase such as "s more than" or "MB peak".
        device: device of the measurement.
    """

    work: str
    name: str
    than: str
    limit: float
    unit: str = "x"
    device: str = "cpu"


TITLES = {
    "supervised-6000": "supervised step, SupCon + pair margin miner, B 16, M 6,000, D 128",
    "supervised-29775": "supervised step, SupCon + pair margin miner, B 64, M 29,775, D 512",
    "supervised-200000": "the same, M 200,000",
    "supervised-late": "the same, M 29,775, later in training: the miner keeps fewer negatives",
    "moco-4096": "MoCo loss step, B 128, M 4,096, D 128",
    "moco-65536": "MoCo loss step, B 256, M 65,536, D 128",
    "knn": "weighted k-NN, 10,000 x 50,000, D 512, k 200",
    "recall": "Recall@1/10/100/1000, 60,502 x 60,502, D 512",
}
"""Works of the summary table and their titles."""
GOALS = (
    Goal("supervised-29775", "ours, XBN", "bare", 1.6),
    Goal("supervised-200000", "ours, XBN", "bare", 1.4),
    Goal("supervised-200000", "ours, XBN", "", 64, "MB more than the inputs"),
    Goal("moco-4096", "ours, XBN", "plain", 1.1),
    Goal("moco-65536", "ours, XBN", "plain", 0.9),
    *(Goal(f"memory-{rows}", "XBN", "XBM", 1.03) for rows in steps.MEMORIES),
    Goal("knn", "ours", "faiss-cpu", 1.0),
    Goal("recall", "ours", "faiss-cpu", 1.0),
    Goal("recall", "ours", "", 1200, "MB peak"),
    Goal("import", "torch, selfsup_xbn", "torch", 0.3, "s more than"),
    Goal("import", "selfsup-xbn --help", "", 1.0, "s"),
    # A copy reads and writes the queue, which takes as long as reading it twice.
    Goal("supervised-200000", "ours, XBN", "copy + bare", 1.0, device="cuda"),
)


def works(device: str = "cpu", scale: float = 1.0) -> dict[str, dict[str, Make]]:
    """Return all works.

    Args:
        device: device of the steps.
        scale: scale of the evaluators' sizes.
    """
    all_works: dict[str, dict[str, Make]] = {
        work: {name: partial(make, device) for name, make in peers.items()} for work, peers in steps.WORKS.items()
    }
    if device != "cpu":
        all_works["supervised-200000"]["copy"] = partial(steps.copy, 200_000, 512, device)
    for work, peers in evaluators.WORKS.items():
        all_works[work] = {name: partial(make, scale) for name, make in peers.items()}
    for axis, sizes in steps.SCALES.items():  # scaling curves
        for size, scaled in sizes.items():
            all_works[f"scale-{axis}-{size}"] = {name: partial(scaled[name], device) for name in SCALED}
    for share in EVALUATED:
        all_works[f"scale-N-{round(60_502 * share)}"] = {
            name: partial(evaluators.WORKS["recall"][name], share * scale) for name in ("ours", "faiss-cpu")
        }
    return all_works | {"import": {name: partial(_command, command) for name, command in COMMANDS.items()}}


SCALED, EVALUATED = ("ours, XBN", "pytorch-metric-learning"), (0.1, 0.2, 0.4)
COMMANDS = {
    "torch": ["-c", "import torch"],
    "torch, selfsup_xbn": ["-c", "import torch, selfsup_xbn; selfsup_xbn.FeatureQueue"],
    "selfsup-xbn --help": ["-m", "selfsup_xbn", "--help"],
}


ELSEWHERE = ("import",)
"""Works that run in another process, whose memory is not measured."""


def _command(command: list[str]) -> Callable[[], Any]:
    return lambda: subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
