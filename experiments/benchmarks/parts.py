"""Measure the time of the parts of a work on a CPU by wrapping its functions."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from selfsup_xbn.runs.environment import environment

REST, ALL = "all else", "all"
WARM = 5


class Part(NamedTuple):
    """Function whose time is added to a part of a work.

    Attributes:
        where: module or class of the function.
        name: name of the function.
        part: name of the part.
        generator: whether the function is a generator.
        whole: whether wrapped functions that it calls are added to the same part.
    """

    where: Any
    name: str
    part: str
    generator: bool = False
    whole: bool = False


class Watch:
    """Stopwatch with one current part, to which the elapsed time is added.

    Args:
        whole: parts that include the wrapped functions that they call.
    """

    def __init__(self, whole: frozenset[str] = frozenset()) -> None:
        self.whole = whole
        self.seconds: dict[str, float] = defaultdict(float)
        self.begin()

    def begin(self) -> None:
        """Reset all times."""
        self.seconds.clear()
        self.current, self.since = REST, time.perf_counter()

    def enter(self, part: str) -> str:
        """Set the current part; return the previous one."""
        now = time.perf_counter()
        self.seconds[self.current] += now - self.since
        before, self.current, self.since = self.current, part, now
        return before

    def function(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, wrapped to add its time to a part."""

        def watched(*arguments: Any, **named: Any) -> Any:
            if self.current in self.whole:
                return function(*arguments, **named)
            before = self.enter(part)
            try:
                return function(*arguments, **named)
            finally:
                self.enter(before)

        return watched

    def generator(self, part: str, generator: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Return the generator, wrapped to add its time to a part; for a whole part, the time between values too."""

        def watched(*arguments: Any, **named: Any) -> Iterator[Any]:
            if self.current in self.whole:
                yield from generator(*arguments, **named)
                return
            before = self.enter(part)
            for value in generator(*arguments, **named):
                if part not in self.whole:
                    self.enter(before)
                yield value
                before = before if part in self.whole else self.enter(part)
            self.enter(before)

        return watched


def measure(
    work: Callable[[], Any], parts: tuple[Part, ...], other_name: str, other: Callable[[], Any], rounds: int
) -> dict[str, float]:
    """Return the median milliseconds of each part of a work, of the whole work, and of another work.

    Args:
        work: function that performs the work once.
        parts: functions whose time is measured.
        other_name: name of the other work.
        other: function that performs the other work once. Both works alternate.
        rounds: number of measured calls.
    """
    watch, seconds = Watch(frozenset(part.part for part in parts if part.whole)), defaultdict(list)
    with ExitStack() as stack:
        for part in parts:
            watched = watch.generator if part.generator else watch.function
            wrapped = watched(part.part, getattr(part.where, part.name))
            stack.enter_context(patch.object(part.where, part.name, wrapped))
        for _ in range(rounds + WARM):
            watch.begin()
            work()
            watch.enter(other_name)
            other()
            watch.enter(REST)
            elapsed = dict(watch.seconds)
            for name, value in (elapsed | {ALL: sum(elapsed.values()) - elapsed[other_name]}).items():
                seconds[name].append(value)
    return {name: round(1000 * statistics.median(values[WARM:]), 4) for name, values in seconds.items()}


def report(milliseconds: dict[str, float], other_name: str, setting: dict[str, Any], path: Path) -> None:
    """Print a line for each part in descending order, the work and the other work, and write the results.

    Args:
        milliseconds: result of ``measure``.
        other_name: name of the other work.
        setting: settings of the measurement, which are written with the results.
        path: JSON file to write.
    """
    for name in sorted(milliseconds, key=lambda name: (name == other_name, name == ALL, -milliseconds[name])):
        print(f"{name:<45}{milliseconds[name]:9.2f} ms {milliseconds[name] / milliseconds[other_name]:6.2f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(setting | {"environment": environment(), "milliseconds": milliseconds}, indent=1)
    path.write_text(text + "\n")
