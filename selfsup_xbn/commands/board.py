"""Progress of several runs: a bar for each run in progress, a bar for all runs, and a line for each run that ended."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from selfsup_xbn.commands.jobs import Report
from selfsup_xbn.training.progress import duration

RUN_BAR = "{desc} {percentage:3.0f}%|{bar:30}| {n:.0f}/{total:.0f} steps, {remaining} left"
ALL_BAR = "{desc} {percentage:3.0f}%|{bar:30}| {n:.1f}/{total:.0f} runs, {remaining} left"
ALL = "all runs"


class Board:
    """Bars on a terminal, and lines on standard output.

    Args:
        names: Names of all runs.
        finished: Number of runs that were finished before.
    """

    def __init__(self, names: list[str], finished: int) -> None:
        self.total, self.ended, self.before = len(names), finished, finished
        self.width = max(map(len, [*names, ALL]))
        self.started = time.monotonic()
        self.shares: dict[str, float] = {}
        self.bars: dict[str, tqdm[Any]] = {}
        self.places: dict[str, int] = {}
        self.whole = self._bar(ALL, self.total, 0, ALL_BAR, finished)

    def show(self, report: Report, text: str = "") -> None:
        """Show a report of a run.

        Args:
            report: Report of the run.
            text: Results of a run that ended.
        """
        name = report.job.name
        if report.ended:
            self._end(name, f"failed: {report.error}" if report.error else text)
        else:
            self._advance(name, report.done, report.total)
        self.whole.n = self.ended + sum(self.shares.values())
        self.whole.refresh()

    def close(self) -> None:
        """Close all bars."""
        for bar in [*self.bars.values(), self.whole]:
            bar.close()

    @property
    def seconds_left(self) -> float:
        """Estimated time of the runs that have not ended, by the time per run since the start."""
        done = self.ended - self.before + sum(self.shares.values())
        return (time.monotonic() - self.started) / max(done, 1e-3) * (self.total - self.before - done)

    def _advance(self, name: str, done: int, total: int) -> None:
        if name not in self.bars:
            self.places[name] = next(i for i in range(1, self.total + 1) if i not in self.places.values())
            self.bars[name] = self._bar(name, total, self.places[name], RUN_BAR, done)
        self.bars[name].n = done
        self.bars[name].refresh()
        self.shares[name] = done / total

    def _end(self, name: str, text: str) -> None:
        self.shares.pop(name, None)
        self.places.pop(name, None)
        if name in self.bars:
            self.bars.pop(name).close()
        self.ended += 1
        line = f"{name:<{self.width}}   {text}   {self.ended} of {self.total}, {duration(self.seconds_left)} left"
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _bar(self, name: str, total: int, place: int, form: str, initial: int) -> tqdm[Any]:
        return tqdm(
            desc=f"{name:<{self.width}}",
            total=total,
            initial=initial,
            position=place,
            bar_format=form,
            smoothing=0,
            leave=False,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
