"""Output of lines of text on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from selfsup_xbn.errors import printable

WARNING = "warning: "
"""Beginning of the line of a warning."""


def show(lines: Iterable[str]) -> None:
    """Print lines of text, with an escape for each character that is not printable.

    Args:
        lines: The lines. Nothing is printed if there are none.
    """
    for line in lines:
        print(printable(line))


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning in one line on standard error, in the place of ``warnings.showwarning``.

    Args:
        message: The warning. Its category and its place in the code are not printed.
    """
    print(f"{WARNING}{printable(message)}", file=sys.stderr)
