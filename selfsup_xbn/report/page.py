"""HTML page about one or more runs: results, curves, settings, images, and the commands that reproduce them.

The runs of a cell, which differ in the seed, can be folded into one entry with means and standard deviations. The page
is a single file without scripts that requires no network. The template escapes all text.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from selfsup_xbn.config.command import command_of
from selfsup_xbn.config.modes import PretrainConfig
from selfsup_xbn.config.schema import Config, queue_rows, resolved
from selfsup_xbn.data import ImageData, data_of
from selfsup_xbn.errors import UserError, printable
from selfsup_xbn.evaluation.summary import columns, comparison_rows, latest, panels
from selfsup_xbn.report import map as embedding_map
from selfsup_xbn.report.curves import Points, Records, is_baseline, mean_points, points_of
from selfsup_xbn.report.line_plot import Curve, Plot, line_plot
from selfsup_xbn.report.thumbnails import Pictures, draw_pictures
from selfsup_xbn.runs.folder import read_config, read_environment, read_metrics
from selfsup_xbn.runs.load import load_run
from selfsup_xbn.utils.atomic import check_creatable, replacing
from selfsup_xbn.utils.files import read_bytes

NAME = "index.html"
GENERATOR = "selfsup-xbn report"
NO_VALUE = "–"
COLORS = 8  # number of run colors in the template, which are reused for further runs


@dataclass(frozen=True)
class RunEntry:
    """Content of the page for one run, or for the runs of a cell.

    Attributes:
        name: Name of the run or cell.
        folders: Folder of each run.
        configs: Configuration of each run.
        environment: Versions, machine and commit of the first run.
        records: Records of the metrics of each run.
        color: CSS class of the color.
        pictures: Gallery and map of the first run, if the checkpoint and the data set are available.
        note: Why there are no pictures, or ``""``.
    """

    name: str
    folders: Sequence[Path]
    configs: Sequence[Config]
    environment: dict[str, str]
    records: Sequence[Records]
    color: str
    pictures: Pictures | None = None
    note: str = ""

    @property
    def config(self) -> Config:
        """Configuration of the first run."""
        return self.configs[0]

    @property
    def commands(self) -> list[list[str]]:
        """Words of the commands that reproduce the runs."""
        return [command_of(config) for config in self.configs]

    @property
    def seeds(self) -> str:
        """Text with the seeds of the runs."""
        return f"seed{'s' * (len(self.configs) > 1)} {', '.join(str(config.seed) for config in self.configs)}"

    @property
    def epochs(self) -> int:
        """Largest number of logged epochs."""
        return max(records[-1]["epoch"] if records else 0 for records in self.records)

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


def write_report(
    folders: Sequence[Path], out: Path, cells: Mapping[str, Sequence[Path]] | None = None
) -> tuple[Path, list[str]]:
    """Write the page to ``index.html`` in a directory.

    Args:
        folders: Run folders.
        out: Directory of the page, which is created if needed.
        cells: Run folders of each cell by name, to fold the runs of a cell. By default each of ``folders`` has an entry
            whose name is the shortest suffix of its path that is unique among them.

    Returns:
        Path of the page, and a line for each entry without pictures.

    Raises:
        UserError: A folder has no run, its configuration or metrics are damaged, or ``out`` is a file or has a page of
            another program.
    """
    path = out / NAME
    _check_out(path)
    cells = cells or {name: [folder] for folder, name in _named(folders).items()}
    runs = [_entry(paths, name, f"run{i % COLORS}") for i, (name, paths) in enumerate(cells.items())]
    queries: dict[str, list[int]] = {}
    runs = [_with_pictures(run, queries) for run in runs]
    page = _page(runs).encode(errors="replace")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(path, "choose another --out") as file:
        file.write(page)
    return path, [f"{run.name}: {run.note}" for run in runs if run.note]


def _check_out(path: Path) -> None:
    check_creatable(path.parent)
    if path.exists() and GENERATOR not in read_bytes(path).decode(errors="replace")[:1000]:
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


def _entry(folders: Sequence[Path], name: str, color: str) -> RunEntry:
    configs, records = [read_config(folder) for folder in folders], [read_metrics(folder) for folder in folders]
    return RunEntry(name, folders, configs, read_environment(folders[0]), records, color)


def _with_pictures(run: RunEntry, queries: dict[str, list[int]]) -> RunEntry:
    """Return the run with pictures. The queries of the first run on a data set are those of all runs on it."""
    try:
        trained = load_run(run.folders[0])
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
    jinja = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    jinja.filters["quoted"] = shlex.quote
    settings = _table([_settings(run) for run in runs])
    return jinja.get_template("report.html").render(
        generator=GENERATOR,
        runs=runs,
        folded=any(len(run.folders) > 1 for run in runs),
        settings=settings,
        differences=[row for row in settings if row.name != "out" and any(row.differs)],
        plots=[plot for title, keys in panels().items() if (plot := _plot(title, keys, runs))],
        results={columns()[name]: _results(runs, name) for name in _measured(runs)},
        versions=_table([run.environment for run in runs]),
        map_method=embedding_map.METHOD,
    )


def _printable(value: Any) -> Any:
    """Escape the control characters of a text that the template inserts. The results of macros are ``Markup``."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _table(columns: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return a row for each key of any column, in the order of first appearance."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [Row(name, [column.get(name, NO_VALUE) for column in columns]) for name in names]


def _settings(run: RunEntry) -> dict[str, str]:
    """Return the text of each setting. Values that differ between the runs of a cell are listed."""
    values = [resolved(config) for config in run.configs]
    return {name: ", ".join(dict.fromkeys(_text(value[name]) for value in values)) for name in values[0]}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if value != "" else NO_VALUE


def _plot(title: str, keys: Mapping[str, str], runs: list[RunEntry]) -> Plot | None:
    """Return the plot of some metrics of all runs, with one color per run and one dash pattern per metric."""
    curves: list[Curve] = []
    dashes = {True: 0, False: 0}
    for key, label in keys.items():
        series = [(run, *curve) for run in runs if (curve := mean_points(run.records, key))[0]]
        if not series:
            continue
        across = all(is_baseline(points) for _, points, _ in series)
        dash = f"{'level' if across else 'curve'}{dashes[across]}"
        dashes[across] += 1
        curves += _curves(series, label, dash, across)
    return line_plot(title, curves) if curves else None


def _curves(
    series: Sequence[tuple[RunEntry, Points, list[float]]], label: str, dash: str, across: bool
) -> Iterable[Curve]:
    """Return a curve per run, or a single neutral curve for a baseline that is equal for all runs."""
    if across and len(series) > 1 and len({points[0] for _, points, _ in series}) == 1:
        return [Curve(series[0][1], label, "all", dash, across)]
    return [Curve(points, label, run.color, dash, across, spread) for run, points, spread in series]


def _measured(runs: list[RunEntry]) -> list[str]:
    """Return the names of the metrics in the results table that any run has."""
    return [name for name in columns() if any(points_of(records, name) for run in runs for records in run.records)]


def _results(runs: list[RunEntry], name: str) -> list[Row]:
    """Return the rows of a metric in the results table: raw pixels, untrained and trained encoder of each run."""
    columns = [[comparison_rows(latest(records), [name]) for records in run.records] for run in runs]
    rows = [Row(row, [_mean_text([seed[row][0] for seed in column]) for column in columns]) for row in columns[0][0]]
    return [row for row in rows if set(row.values) != {NO_VALUE}]


def _mean_text(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return NO_VALUE
    return f"{mean(known):.2f}" + (f" ± {stdev(known):.2f}" if len(known) > 1 else "")
