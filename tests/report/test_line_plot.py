"""Curves stand where the ticks say that they stand."""

import pytest

from selfsup_xbn.report.line_plot import BOTTOM, LEFT, RIGHT, TOP, Curve, line_plot


def curve(points, across=False):
    return Curve([(float(x), float(y)) for x, y in points], "value", "run0", "curve0", across)


def place_of(value, ticks):
    """Read off the axis, between its first and its last tick, as an eye does."""
    (start, first), (end, last) = ticks[0], ticks[-1]
    return start + (value - float(first)) / (float(last) - float(first)) * (end - start)


@pytest.mark.parametrize("low", [-3.0, 0.0, 97.2, 1e6])
@pytest.mark.parametrize("span", [1e-3, 0.7, 50.0, 1e5])
def test_points_are_read_off_the_axes(low, span):
    points = [(epoch, low + span * part) for epoch, part in ((1, 0.1), (4, 1.0), (9, 0.0), (30, 0.35))]
    plot = line_plot("loss", [curve(points)])
    for (x, y), (left, top) in zip(points, plot.lines[0].markers, strict=True):
        assert left == pytest.approx(place_of(x, plot.x_ticks), abs=0.2)
        assert top == pytest.approx(place_of(y, plot.y_ticks), abs=0.2)
        assert LEFT <= left <= RIGHT
        assert TOP <= top <= BOTTOM


def test_ticks_are_few_round_and_inside_the_frame():
    plot = line_plot("loss", [curve([(0, 0.0), (40, 1.0)])])
    assert [text for _, text in plot.x_ticks] == ["0", "10", "20", "30", "40"]
    assert [text for _, text in plot.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


@pytest.mark.parametrize("points", [[(0, 0.0)], [(0, 97.2)], [(1, -1.0)], [(1, 5.0), (2, 5.0)]])
def test_constants_and_single_points_have_a_place(points):
    line = line_plot("gain", [curve(points)]).lines[0]
    assert len(line.markers) == len(points)
    assert {top for _, top in line.markers} == {(TOP + BOTTOM) / 2}


def test_level_spans_the_frame_at_its_height():
    plot = line_plot("k-NN", [curve([(1, 90.0), (5, 98.0)]), curve([(0, 97.2)], across=True)])
    (left, top), (right, same) = (map(float, point.split(",")) for point in plot.lines[1].path.split())
    assert (left, right) == (LEFT, RIGHT)
    assert top == same == pytest.approx(place_of(97.2, plot.y_ticks), abs=0.2)
    assert plot.lines[1].markers == []
