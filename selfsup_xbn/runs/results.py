"""Results of a comparison: a JSON file with the values of all seeds of each cell, and statistics over the seeds.

The name of a run's folder contains a hash of all settings that its result depends on. Comparisons in the same folder
therefore share runs, and a changed setting never mixes with an old run.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from selfsup_xbn.config.cells import Cells
from selfsup_xbn.config.schema import Config, resolved
from selfsup_xbn.errors import UserError
from selfsup_xbn.runs.folder import CONFIG, read_metrics
from selfsup_xbn.utils import atomic

FINISHED = "seconds.txt"
"""File in a run folder with the duration of the training, which only a finished run has."""

NOT_IN_HISTORY = ("epoch", "step", "seconds", "images_per_second")

Result = dict[str, Any]
"""One cell of a results file: label, config, last values and history of each seed, mean and standard deviation."""


class Difference(NamedTuple):
    """Mean difference of a value between two cells over the seeds that both have.

    Attributes:
        mean: Mean of the differences.
        error: Standard error of the mean, or ``None`` for fewer than two seeds.
        seeds: Number of seeds.
    """

    mean: float
    error: float | None
    seeds: int


def settings(config: Config) -> dict[str, Any]:
    """Return the settings that the results of a cell depend on, without the seed and the path of the data.

    Options that were added later are left out at their default, which is what earlier versions did.
    """
    names = {
        item.name
        for item in fields(config)
        if item.metadata["affects_results"]
        and not (item.metadata["added_later"] and getattr(config, item.name) == item.default)
    } - {"seed"}
    return {name: value for name, value in resolved(config).items() if name in names | {"mode"}}


def folder_name(config: Config, seed: int) -> str:
    """Return a folder name that is unique for the settings of a run and its seed."""
    digest = hashlib.sha256(json.dumps(settings(config), sort_keys=True).encode()).hexdigest()[:8]
    data = config.data.partition(":")[0]
    return f"{data}-{config.adaptation}-b{config.batch_size}-{digest}-{seed}"


def is_finished(folder: Path) -> bool:
    """Return whether the run in a folder was trained to its end."""
    return (folder / FINISHED).exists()


def outcome(folder: Path) -> dict[str, Any]:
    """Return the records of a run, its environment, and its duration in seconds, 0 for an unfinished run.

    Raises:
        UserError: The metrics are missing or damaged.
    """
    return {
        "records": read_metrics(folder),
        "seconds": float((folder / FINISHED).read_text()) if is_finished(folder) else 0.0,
        "environment": json.loads((folder / CONFIG).read_text())["environment"],
    }


def add(path: Path, cells: Cells, label: str, seed: int, run: Mapping[str, Any]) -> None:
    """Add one run to a results file. Runs of cells whose settings have changed are removed.

    Args:
        path: Results file, which is created if needed.
        cells: All cells of the comparison.
        label: Label of the run's cell.
        seed: Seed of the run.
        run: Outcome of the run.
    """
    results = {result["label"]: result for result in (read(path) if path.exists() else [])}
    result = results.get(label)
    if result is None or result["config"] != settings(cells[label]):
        result = {"label": label, "config": settings(cells[label]), "seeds": {}, "history": {}}
    values: dict[str, Any] = {}
    for record in run["records"]:
        values |= record
    result["seeds"][str(seed)] = values | {"seconds": run["seconds"], "environment": run["environment"]}
    result["history"][str(seed)] = _history(run["records"])
    for part in ("seeds", "history"):  # runs end in any order
        result[part] = dict(sorted(result[part].items(), key=lambda item: int(item[0])))
    results[label] = result | _summary(result["seeds"])
    write(path, [results[name] for name in cells if name in results])


def _history(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the values by name and epoch."""
    names = dict.fromkeys(name for record in records for name in record if name not in NOT_IN_HISTORY)
    return {name: {str(r["epoch"]): r[name] for r in records if name in r} for name in names}


def _summary(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int | float | None]]:
    """Return the mean and the standard deviation over the seeds of each last value."""
    names = dict.fromkeys(name for final in seeds.values() for name, v in final.items() if isinstance(v, int | float))
    values = {name: [final[name] for final in seeds.values() if final.get(name) is not None] for name in names}
    return {
        "mean": {name: round(statistics.mean(v), 4) for name, v in values.items()},
        "std": {name: round(statistics.stdev(v), 4) if len(v) > 1 else None for name, v in values.items()},
    }


def write(path: Path, results: Sequence[Result]) -> None:
    """Write a results file with one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path, "free disk space, and repeat the command") as file:
        file.write(("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n").encode())


def read(path: Path) -> list[Result]:
    """Return the cells of a results file.

    Raises:
        UserError: The file does not exist or is damaged.
    """
    if not path.exists():
        raise UserError(f"no results in {path}")
    try:
        results: list[Result] = json.loads(path.read_text(encoding="utf-8"))
        if not all(result.keys() >= {"label", "config", "seeds", "history"} for result in results):
            raise ValueError("a cell without label, config, seeds or history")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: expected the results of a comparison ({error}); delete the file") from None
    return results


def difference(result: Result, reference: Result, key: str) -> Difference | None:
    """Return the mean difference of a value to that of a reference cell, paired by seed.

    Runs with the same seed share the initial weights and the order of the images. The difference of two such runs
    varies less than the difference of two independent runs. The standard error is that of a paired t-test.

    Args:
        result: Cell.
        reference: Cell to subtract.
        key: Name of the value.

    Returns:
        Difference, or ``None`` if no seed has both values.

    Example:
        >>> one, other = {"seeds": {"0": {"loss": 3.0}, "1": {"loss": 5.0}}}, {"seeds": {"0": {"loss": 1.0}}}
        >>> difference(one, other, "loss")
        Difference(mean=2.0, error=None, seeds=1)
    """
    pairs = [(seed.get(key), reference["seeds"].get(name, {}).get(key)) for name, seed in result["seeds"].items()]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Difference(statistics.mean(values), error, len(values))


def course(result: Result, key: str) -> tuple[list[int], list[float], list[float]]:
    """Return the epochs at which a value was measured with every seed, its means and its standard deviations."""
    measured = [history[key] for history in result["history"].values() if key in history]
    by_seed = [{int(epoch): v for epoch, v in values.items() if v is not None} for values in measured]
    epochs = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    at = [[values[epoch] for values in by_seed] for epoch in epochs]
    return epochs, [statistics.mean(v) for v in at], [statistics.stdev(v) if len(v) > 1 else 0.0 for v in at]


def value_text(result: Result, key: str) -> str:
    """Return "mean ± standard deviation" of a value, or a dash if it is missing. Means below 0.1 have three decimals.

    Example:
        >>> value_text({"mean": {"loss": 2.5}, "std": {"loss": 0.125}}, "loss")
        '2.50 ± 0.12'
        >>> value_text({"mean": {"drift": 0.0125}, "std": {"drift": 0.001}}, "drift")
        '0.013 ± 0.001'
    """
    mean, std = result["mean"].get(key), result["std"].get(key)
    if mean is None:
        return "-"
    digits = 2 if abs(mean) >= 0.1 else 3
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")
