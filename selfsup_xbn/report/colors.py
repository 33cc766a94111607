"""Colors of the methods in pictures, from the palette of Okabe and Ito."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

COLORS = {"no memory": "0.45", "XBM": "#D55E00", "XBM*": "#E69F00", "XBN": "#0072B2", "AXBN": "#009E73"}
"""Color of each method in all pictures."""
PALETTE = ("#CC79A7", "#009E73", "#E69F00", "#56B4E9", "#D55E00", "#0072B2", "#000000")
"""Colors of other series, without those of the methods in the same picture."""


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


def series_colors(names: Iterable[str]) -> dict[str, str]:
    """Return the color of each series of a picture: that of a method in ``COLORS``, or one of the palette in turn.

    Args:
        names: Names of the series.

    Example:
        >>> series_colors(["XBN", "other"])
        {'XBN': '#0072B2', 'other': '#CC79A7'}
    """
    names = list(dict.fromkeys(names))
    taken = {COLORS.get(name) for name in names}
    others = itertools.cycle(color for color in PALETTE if color not in taken)
    return {name: COLORS.get(name) or next(others) for name in names}
