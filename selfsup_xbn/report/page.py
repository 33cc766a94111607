"""HTML page about one or more runs: results, curves, settings, images, and the commands that reproduce them.

The page is a single file without scripts that requires no network. The template escapes all text.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from selfsup_xbn.config.command import command_of
from selfsup_xbn.config.schema import Config, PretrainConfig, queue_rows, resolved
from selfsup_xbn.data import ImageData, data_of
from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.summary import columns, comparison_rows, latest, panels
from selfsup_xbn.report import map as embedding_map
from selfsup_xbn.report.curves import Points, is_baseline, points_of
from selfsup_xbn.report.line_plot import Curve, Plot, line_plot
from selfsup_xbn.report.thumbnails import Pictures, draw_pictures
from selfsup_xbn.runs.folder import read_config, read_environment, read_metrics
from selfsup_xbn.runs.load import load_run
from selfsup_xbn.utils.atomic import replacing

NAME = "index.html"
GENERATOR = "selfsup-xbn report"
NO_VALUE = "–"
COLORS = 8  # number of run colors in the template, which are reused for further runs


@dataclass(frozen=True)
class RunEntry:
    """Content of the page for one run.

    Attributes:
        name: Shortest suffix of the path that is unique among the runs.
        folder: Run folder.
        config: Configuration.
        environment: Versions, machine and commit.
        records: Records of the metrics.
        color: CSS class of the color.
        pictures: Gallery and map, if the checkpoint and the data set are available.
        note: Why there are no pictures, or ``""``.
    """

    name: str
    folder: Path
    config: Config
    environment: dict[str, str]
    records: list[dict[str, Any]]
    color: str
    pictures: Pictures | None = None
    note: str = ""

    @property
    def command(self) -> list[str]:
        """Words of the command that reproduces the run."""
        return command_of(self.config)

    @property
    def memory(self) -> str:
        """Name of the adaptation, or ``"no memory"``."""
        return self.config.adaptation if queue_rows(self.config, 100) else "no memory"


@dataclass(frozen=True)
class Row:
    """A row of a table with one column per run.

    Attributes:
        name: Header of the row.
        values: Text of each run.
    """

    name: str
    values: list[str]

    @property
    def differs(self) -> list[bool]:
        """Whether the value of each run differs from that of the first run."""
        return [value != self.values[0] for value in self.values]


def write_report(folders: Sequence[Path], out: Path) -> tuple[Path, list[str]]:
    """Write the page to ``index.html`` in a directory.

    Args:
        folders: Run folders.
        out: Directory of the page, which is created if needed.

    Returns:
        Path of the page, and a line for each run without pictures.

    Raises:
        UserError: A folder has no run, its configuration or metrics are damaged, or ``out`` is a file or has a page of
            another program.
    """
    path = out / NAME
    _check_out(path)
    runs = [_entry(folder, name, f"run{i % COLORS}") for i, (folder, name) in enumerate(_named(folders).items())]
    queries: dict[str, list[int]] = {}
    runs = [_with_pictures(run, queries) for run in runs]
    page = _page(runs).encode(errors="replace")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(path, "choose another --out") as file:
        file.write(page)
    return path, [f"{run.name}: {run.note}" for run in runs if run.note]


def _check_out(path: Path) -> None:
    if path.parent.exists() and not path.parent.is_dir():
        raise UserError(f"{path.parent} is a file: choose another --out")
    if path.exists() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise UserError(f"{path} is not a page of this program: choose another --out")


def _named(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the distinct folders, each with the shortest suffix of its path that is unique."""
    paths: dict[Path, Path] = {}
    for folder in folders:
        paths.setdefault(folder.resolve(), folder)
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(paths.values(), names, strict=True))


def _entry(folder: Path, name: str, color: str) -> RunEntry:
    return RunEntry(name, folder, read_config(folder), read_environment(folder), read_metrics(folder), color)


def _with_pictures(run: RunEntry, queries: dict[str, list[int]]) -> RunEntry:
    """Return the run with pictures. The queries of the first run on a data set are those of all runs on it."""
    try:
        trained = load_run(run.folder)
        data = _data(run.config, trained.image_size)
        pictures = draw_pictures(trained, data, queries.get(data.name))
        queries.setdefault(data.name, pictures.queries)
        return replace(run, pictures=pictures)
    except (UserError, OSError) as error:
        return replace(run, note=f"no pictures ({' '.join(str(error).split())})")


def _data(config: Config, image_size: int) -> ImageData:
    """Return the data set. Runs on the same data set share it."""
    names = ("data", "data_root", "split_classes", "backbone", "weights", "mean", "std", "workers")
    return _load(PretrainConfig(image_size=image_size, **{name: getattr(config, name) for name in names}))


_load = lru_cache(maxsize=2)(data_of)


def _page(runs: list[RunEntry]) -> str:
    loader = PackageLoader("selfsup_xbn.report")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters["quoted"] = shlex.quote
    settings = _table([{name: _text(value) for name, value in resolved(run.config).items()} for run in runs])
    return jinja.get_template("report.html").render(
        generator=GENERATOR,
        runs=runs,
        settings=settings,
        differences=[row for row in settings if row.name != "out" and any(row.differs)],
        plots=[plot for title, keys in panels().items() if (plot := _plot(title, keys, runs))],
        results={columns()[name]: _results(runs, name) for name in _measured(runs)},
        versions=_table([run.environment for run in runs]),
        map_method=embedding_map.METHOD,
    )


def _table(columns: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return a row for each key of any column, in the order of first appearance."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [Row(name, [column.get(name, NO_VALUE) for column in columns]) for name in names]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if value != "" else NO_VALUE


def _plot(title: str, keys: Mapping[str, str], runs: list[RunEntry]) -> Plot | None:
    """Return the plot of some metrics of all runs, with one color per run and one dash pattern per metric."""
    curves: list[Curve] = []
    dashes = {True: 0, False: 0}
    for key, label in keys.items():
        series = [(run, points) for run in runs if (points := points_of(run.records, key))]
        if not series:
            continue
        across = all(is_baseline(points) for _, points in series)
        dash = f"{'level' if across else 'curve'}{dashes[across]}"
        dashes[across] += 1
        curves += _curves(series, label, dash, across)
    return line_plot(title, curves) if curves else None


def _curves(series: Sequence[tuple[RunEntry, Points]], label: str, dash: str, across: bool) -> Iterable[Curve]:
    """Return a curve per run, or a single neutral curve for a baseline that is equal for all runs."""
    if across and len(series) > 1 and len({points[0] for _, points in series}) == 1:
        return [Curve(series[0][1], label, "all", dash, across)]
    return [Curve(points, label, run.color, dash, across) for run, points in series]


def _measured(runs: list[RunEntry]) -> list[str]:
    """Return the names of the metrics in the results table that any run has."""
    return [name for name in columns() if any(points_of(run.records, name) for run in runs)]


def _results(runs: list[RunEntry], name: str) -> list[Row]:
    """Return the rows of a metric in the results table: raw pixels, untrained and trained encoder of each run."""
    columns = [comparison_rows(latest(run.records), [name]) for run in runs]
    table = {row: [column[row][0] for column in columns] for row in columns[0]}
    return [
        Row(row, [NO_VALUE if value is None else f"{value:.2f}" for value in values])
        for row, values in table.items()
        if any(value is not None for value in values)
    ]
