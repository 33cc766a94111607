"""Geometry of a line plot in SVG units. The style sheet of the page sets the colors, for light and dark mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from selfsup_xbn.report.curves import Points

LEFT, RIGHT, TOP, BOTTOM = 50.0, 410.0, 10.0, 215.0
"""Edges of the plot area in a picture of 420 x 250 units."""


@dataclass(frozen=True)
class Curve:
    """A curve to draw.

    Attributes:
        points: Pairs (epoch, value).
        label: Label in the legend.
        color: CSS class of the color.
        dash: CSS class of the dashes.
        across: Whether to draw the first value over the whole width.
        spread: Half of the height of a band around each point, or nothing for no band.
    """

    points: Points
    label: str
    color: str
    dash: str
    across: bool = False
    spread: Sequence[float] = ()

    @property
    def band(self) -> Points:
        """Corners of the band: its upper edge, and its lower edge from right to left."""
        if self.across or not any(self.spread):
            return []
        upper = [(x, y + half) for (x, y), half in zip(self.points, self.spread, strict=True)]
        lower = [(x, y - half) for (x, y), half in zip(self.points, self.spread, strict=True)]
        return upper + lower[::-1]


@dataclass(frozen=True)
class Line:
    """A curve in SVG units.

    Attributes:
        path: Points as ``"x,y x,y ..."``.
        band: Corners of the band around the curve, as in ``path``.
        markers: Positions of markers, which a curve of few points has.
        curve: Curve with label and style.
    """

    path: str
    band: str
    markers: list[tuple[float, float]]
    curve: Curve


@dataclass(frozen=True)
class Plot:
    """A plot in SVG units.

    Attributes:
        title: Title.
        lines: Curves.
        x_ticks: Position and text of each tick of the x-axis.
        y_ticks: Position and text of each tick of the y-axis.
    """

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]

    @property
    def legend(self) -> dict[str, str]:
        """CSS class of the dashes by label. All runs have the same dashes."""
        return {line.curve.label: line.curve.dash for line in self.lines}


def line_plot(title: str, curves: Sequence[Curve]) -> Plot:
    """Return the geometry of a plot whose axes include all points. The x-axis is in epochs.

    Args:
        title: Title of the plot.
        curves: At least one curve, each with at least one point of finite numbers.
    """
    xs, ys = zip(*(point for curve in curves for point in [*curve.points, *curve.band]), strict=True)
    x_range, y_range = (min(0.0, *xs), max(1.0, *xs)), _padded(min(ys), max(ys))
    lines = [_line(curve, x_range, y_range) for curve in curves]
    x_ticks = [(_position(tick, x_range, LEFT, RIGHT), f"{tick:.10g}") for tick in _ticks(x_range, integer=True)]
    y_ticks = [(_position(tick, y_range, BOTTOM, TOP), f"{tick:.10g}") for tick in _ticks(y_range)]
    return Plot(title, lines, x_ticks, y_ticks)


def _line(curve: Curve, x_range: tuple[float, float], y_range: tuple[float, float]) -> Line:
    points = [(x, curve.points[0][1]) for x in x_range] if curve.across else curve.points
    positions, band = (
        [(_position(x, x_range, LEFT, RIGHT), _position(y, y_range, BOTTOM, TOP)) for x, y in corners]
        for corners in (points, curve.band)
    )
    few = not curve.across and len(points) < 20
    path, edges = (" ".join(f"{x},{y}" for x, y in corners) for corners in (positions, band))
    return Line(path, edges, positions if few else [], curve)


def _position(value: float, extent: tuple[float, float], start: float, end: float) -> float:
    """Return the position of a value between two edges, rounded to 0.1 units."""
    low, high = extent
    return round(start + (value - low) / (high - low) * (end - start), 1)


def _padded(low: float, high: float) -> tuple[float, float]:
    """Return the range with a margin of 5 % on each side, or with a margin around a constant."""
    margin = (high - low) / 20 or abs(low) / 20 or 1.0
    return low - margin, high + margin


def _ticks(extent: tuple[float, float], integer: bool = False) -> list[float]:
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(*extent)
    return [float(tick) for tick in ticks if extent[0] <= tick <= extent[1]]
