"""Output of lines of text on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from selfsup_xbn.errors import printable


def show(lines: Iterable[str]) -> None:
    """Print lines of text, with an escape for each character that is not printable.

    Args:
        lines: The lines. Nothing is printed if there are none.
    """
    for line in lines:
        print(printable(line))
