"""A watch that follows a work through its functions on a CPU and adds each moment to one part of it."""

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
    """A function or generator of a module or class whose time is a part's; if ``whole``, with all that it calls."""

    where: Any
    name: str
    part: str
    generator: bool = False
    whole: bool = False


class Watch:
    """Seconds of each part; at any moment one part is current.

    Args:
        whole: parts whose own calls of the functions of others belong to them.
    """

    def __init__(self, whole: frozenset[str] = frozenset()) -> None:
        self.whole = whole
        self.seconds: dict[str, float] = defaultdict(float)
        self.begin()

    def begin(self) -> None:
        """Forgets what was measured."""
        self.seconds.clear()
        self.current, self.since = REST, time.perf_counter()

    def enter(self, part: str) -> str:
        """Ends the current part and begins another; returns the one that ended."""
        now = time.perf_counter()
        self.seconds[self.current] += now - self.since
        before, self.current, self.since = self.current, part, now
        return before

    def function(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is the part's."""

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
        """The generator, whose time is the part's; what is done with its values too if the part is a whole."""

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
    work: Callable[[], Any], parts: tuple[Part, ...], beside: str, other: Callable[[], Any], rounds: int
) -> dict[str, float]:
    """Median milliseconds of each part of a work, of all of it, and of the other work, which takes turns with it."""
    watch, seconds = Watch(frozenset(part.part for part in parts if part.whole)), defaultdict(list)
    with ExitStack() as stack:
        for part in parts:
            watched = watch.generator if part.generator else watch.function
            followed = watched(part.part, getattr(part.where, part.name))
            stack.enter_context(patch.object(part.where, part.name, followed))
        for _ in range(rounds + WARM):
            watch.begin()
            work()
            watch.enter(beside)
            other()
            watch.enter(REST)
            taken = dict(watch.seconds)
            for name, value in (taken | {ALL: sum(taken.values()) - taken[beside]}).items():
                seconds[name].append(value)
    return {name: round(1000 * statistics.median(values[WARM:]), 4) for name, values in seconds.items()}


def report(found: dict[str, float], beside: str, setting: dict[str, Any], path: Path) -> None:
    """Prints a line a part, the largest first, then the work and the other one; writes what was found where and how."""
    for name in sorted(found, key=lambda name: (name == beside, name == ALL, -found[name])):
        print(f"{name:<45}{found[name]:9.2f} ms {found[name] / found[beside]:6.2f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(setting | {"environment": environment(), "milliseconds": found}, indent=1)
    path.write_text(text + "\n")
