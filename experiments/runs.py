"""Runs of several configs and seeds, side by side, skipping what is done; their numbers as one JSON file."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from selfsup_xbn.config import Config, resolved
from selfsup_xbn.run_log import environment, read_metrics

RESULTS = Path(__file__).parent / "results"
NOT_OF_A_RESULT = ("seed", "out", "data_root", "device", "workers")


def run_all(
    name: str, cells: Mapping[str, Config], seeds: Iterable[int], folder: Path, jobs: int, threads: int = 1
) -> list[dict[str, Any]]:
    """Trains every cell with every seed, ``jobs`` at a time, in folders below ``folder/NAME``.

    A run that is done is not repeated; one that was interrupted goes on.

    Returns:
        One object a cell: its label, config, and each seed's last values, with mean and standard deviation.
    """
    configs = {
        (label, seed): replace(cell, seed=seed, out=str(folder / name / f"{label}-{seed}".replace(" ", "_")))
        for label, cell in cells.items()
        for seed in seeds
    }
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = dict(zip(configs, pool.map(_run, configs.values(), [threads] * len(configs)), strict=True))
    return [
        summary(label, cell, {seed: found[label, seed] for seed in seeds}) | {"jobs": jobs, "threads": threads}
        for label, cell in cells.items()
    ]


def _run(config: Config, threads: int) -> dict[str, float]:
    """The last value of everything that the run logged, and the seconds that it took."""
    import torch

    from selfsup_xbn.train import train

    torch.set_num_threads(threads)
    folder = Path(config.out)
    if not (folder / "seconds.txt").exists():
        started = time.perf_counter()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log):
            train(config, resume=True)
        (folder / "seconds.txt").write_text(f"{time.perf_counter() - started:.1f}\n")
    values: dict[str, float] = {}
    for record in read_metrics(folder):
        values |= record
    return values | {"seconds": float((folder / "seconds.txt").read_text())}


def summary(label: str, config: Config, by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """One object of a results file."""
    names = next(iter(by_seed.values())).keys()
    values = {name: [found[name] for found in by_seed.values() if name in found] for name in names}
    return {
        "label": label,
        "seeds": {str(seed): dict(found) for seed, found in by_seed.items()},
        "mean": {name: round(statistics.mean(v), 4) for name, v in values.items()},
        "std": {name: round(statistics.stdev(v), 4) if len(v) > 1 else None for name, v in values.items()},
        # Of the data only the name: where a machine keeps it is no part of a result.
        "config": {k: v for k, v in resolved(config).items() if k not in NOT_OF_A_RESULT}
        | {"data": config.data.partition(":")[0]},
        "environment": environment(),
    }


def write(name: str, results: list[dict[str, Any]]) -> None:
    """Writes ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def read(name: str) -> list[dict[str, Any]]:
    """The objects of ``results/NAME.json``."""
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table(results: list[dict[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """A Markdown table: a row a cell, mean and standard deviation over the seeds in each column."""
    lines = ["| | " + " | ".join(columns.values()) + " | seeds |", "|---|" + "---|" * (len(columns) + 1)]
    for result in results:
        cells = []
        for key in columns:
            mean, std = result["mean"].get(key), result["std"].get(key)
            cells.append("-" if mean is None else f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else ""))
        lines.append(f"| {result['label']} | " + " | ".join(cells) + f" | {len(result['seeds'])} |")
    return lines


def parser(doc: str) -> argparse.ArgumentParser:
    """Options that every experiment has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--from-results", action="store_true", help="train nothing, print the committed table")
    made.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 (default 3)")
    made.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    made.add_argument("--folder", type=Path, default=Path("runs"), help="where the runs' folders go (default runs)")
    return made
