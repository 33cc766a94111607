"""The geometry of a line plot in SVG units; colours and text are left to the page, which knows light from dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from selfsup_xbn.report.curves import Points

LEFT, RIGHT, TOP, BOTTOM = 50.0, 410.0, 10.0, 215.0
"""Edges of the frame that the curves are drawn in, of a picture of 420 by 250."""


@dataclass(frozen=True)
class Curve:
    """A curve to draw: its points, what it is called, and CSS names for its colour and its dashes."""

    points: Points
    label: str
    color: str
    dash: str
    across: bool = False  # a level: drawn over the whole width


@dataclass(frozen=True)
class Line:
    """A curve in SVG units: ``x,y x,y ...``, and the places of markers where its points are few."""

    path: str
    markers: list[tuple[float, float]]
    curve: Curve


@dataclass(frozen=True)
class Plot:
    """All that is drawn; a tick is its place and its text."""

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]

    @property
    def legend(self) -> dict[str, str]:
        """The dashes of each label; runs share them."""
        return {line.curve.label: line.curve.dash for line in self.lines}


def line_plot(title: str, curves: Sequence[Curve]) -> Plot:
    """Places curves in one frame, whose ranges hold all of their points; x is in epochs.

    Args:
        title: what y is.
        curves: at least one, each of at least one point, with finite numbers.
    """
    xs, ys = zip(*(point for curve in curves for point in curve.points), strict=True)
    x_range, y_range = (min(0.0, *xs), max(1.0, *xs)), _padded(min(ys), max(ys))
    lines = [_line(curve, x_range, y_range) for curve in curves]
    x_ticks = [(_place(tick, x_range, LEFT, RIGHT), f"{tick:.10g}") for tick in _ticks(x_range, integer=True)]
    y_ticks = [(_place(tick, y_range, BOTTOM, TOP), f"{tick:.10g}") for tick in _ticks(y_range)]
    return Plot(title, lines, x_ticks, y_ticks)


def _line(curve: Curve, x_range: tuple[float, float], y_range: tuple[float, float]) -> Line:
    points = [(x, curve.points[0][1]) for x in x_range] if curve.across else curve.points
    places = [(_place(x, x_range, LEFT, RIGHT), _place(y, y_range, BOTTOM, TOP)) for x, y in points]
    few = not curve.across and len(points) < 20
    return Line(" ".join(f"{x},{y}" for x, y in places), places if few else [], curve)


def _place(value: float, extent: tuple[float, float], start: float, end: float) -> float:
    """Where a value stands between two edges, to a tenth of a unit."""
    low, high = extent
    return round(start + (value - low) / (high - low) * (end - start), 1)


def _padded(low: float, high: float) -> tuple[float, float]:
    """The range with a twentieth more on each side; a constant gets room around it."""
    room = (high - low) / 20 or abs(low) / 20 or 1.0
    return low - room, high + room


def _ticks(extent: tuple[float, float], integer: bool = False) -> list[float]:
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(*extent)
    return [float(tick) for tick in ticks if extent[0] <= tick <= extent[1]]
