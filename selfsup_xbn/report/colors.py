"""Colors, dashes and markers of the methods in pictures. The colors are from the palette of Okabe and Ito."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

COLORS = {"no memory": "0.45", "XBM": "#D55E00", "XBM*": "#E69F00", "XBN": "#0072B2", "AXBN": "#009E73"}
"""Color of each method in all pictures."""
PALETTE = ("#CC79A7", "#56B4E9", "#000000", "#009E73", "#E69F00", "#D55E00", "#0072B2")
"""Colors of other series, without those of the methods in the same picture. Those of no method come first."""
DASHES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
"""Dashes and markers of the series with the same method."""


def method_name(config: Mapping[str, Any]) -> str:
    """Return the name of the method of a run, as in ``COLORS``, or that of an adaptation of the caller.

    Args:
        config: Settings of the run by name.

    Example:
        >>> method_name({"adaptation": "axbn", "queue_size": "50%"}), method_name({"queue_size": "0"})
        ('AXBN', 'no memory')
        >>> method_name({"adaptation": "xbm", "queue_size": "50%", "batch_loss_weight": 1.0})
        'XBM*'
    """
    if str(config.get("queue_size", "")) in ("0", "0%"):
        return "no memory"
    adaptation = str(config.get("adaptation", ""))
    name = adaptation.upper() if adaptation.upper() in COLORS else adaptation
    return f"{name}*" if name == "XBM" and config.get("batch_loss_weight") else name


def series_styles(methods: Sequence[str]) -> list[dict[str, str]]:
    """Return color, dashes and marker of each series of a picture.

    A method in ``COLORS`` has its color, others have those of the palette in turn. The n-th series of each method has
    the n-th dashes and marker.

    Args:
        methods: Name of the method of each series.

    Example:
        >>> series_styles(["XBN", "XBN"])[1]
        {'color': '#0072B2', 'linestyle': '--', 'marker': 's'}
    """
    taken = {COLORS.get(name) for name in methods}
    others = itertools.cycle(color for color in PALETTE if color not in taken)
    colors = {name: COLORS.get(name) or next(others) for name in dict.fromkeys(methods)}
    styles = []
    for place, name in enumerate(methods):
        number = methods[:place].count(name)
        dashes, marker = DASHES[number % len(DASHES)], MARKERS[(number + number // len(DASHES)) % len(MARKERS)]
        styles.append({"color": colors[name], "linestyle": dashes, "marker": marker})
    return styles
