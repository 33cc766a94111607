"""Values of options that are written as text: sizes of a queue, intervals, lists of numbers, keyword arguments."""

from __future__ import annotations

import ast
import contextlib
import math
from typing import Any

from selfsup_xbn.errors import UserError


def parse_rows(text: str, images: int) -> int:
    """Return the rows of a queue for a training set of so many images: a whole number, or a percentage of the images.

    Raises:
        UserError: it is neither a whole number nor a percentage of at most 100.

    Example:
        >>> parse_rows("4096", 50_000), parse_rows("50%", 901), parse_rows("0", 901)
        (4096, 451, 0)
    """
    text = text.strip()
    try:
        rows = math.ceil(images * _percent(text) / 100) if text.endswith("%") else int(text)
    except ValueError:
        rows = -1
    if rows < 0:
        raise UserError(f"--queue-size: expected a number of rows or a percentage up to 100%, got {text!r}")
    return rows


def parse_validation(text: str) -> float:
    """Return the share of the training classes that ``"P%"`` or ``"0"`` holds out, from 0 to 1.

    Raises:
        UserError: it is neither 0 nor a percentage below 100.

    Example:
        >>> parse_validation("10%"), parse_validation("0")
        (0.1, 0.0)
    """
    text = text.strip()
    with contextlib.suppress(ValueError):
        if text == "0" or (text.endswith("%") and _percent(text) < 100):
            return 0.0 if text == "0" else _percent(text) / 100
    raise UserError(f"--validation: expected 0 or a percentage below 100% of the training classes, got {text!r}")


def _percent(text: str) -> float:
    percent = float(text.removesuffix("%"))
    if not 0 <= percent <= 100:
        raise ValueError
    return percent


def parse_save_interval(text: str) -> tuple[int, float]:
    """Return the epochs between checkpoints, or the seconds; the other one is 0.

    Raises:
        UserError: it is neither a whole number of epochs nor a number of minutes followed by m.

    Example:
        >>> parse_save_interval("2"), parse_save_interval("10m")
        ((2, 0.0), (0, 600.0))
    """
    with contextlib.suppress(ValueError):
        if text.endswith("m") and 0 < (minutes := float(text[:-1])) < math.inf:
            return 0, 60 * minutes
        if not text.endswith("m") and (epochs := int(text)) > 0:
            return epochs, 0.0
    raise UserError(f"--save-every: expected epochs from 1 on, or minutes such as 10m, got {text!r}")


def parse_numbers(text: str, flag: str) -> tuple[int, ...]:
    """Return whole numbers from 1 on that stand between commas.

    Raises:
        UserError: anything else.

    Example:
        >>> parse_numbers("1,10", "--recall-ks")
        (1, 10)
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 19 and int(part) > 0 for part in parts):
        raise UserError(f"{flag}: expected whole numbers from 1 on with commas between, got {text!r}")
    return tuple(int(part) for part in parts)


def parse_arguments(text: str, flag: str) -> dict[str, Any]:
    """Return ``name=value,name=value`` as keyword arguments; values are Python literals or, failing that, words.

    Raises:
        UserError: a part without a name or a value.

    Example:
        >>> parse_arguments("margin=0.1,distance=cosine", "--loss-args")
        {'margin': 0.1, 'distance': 'cosine'}
    """
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name.isidentifier() and equals and value):
            raise UserError(f"{flag}: expected name=value,name=value, got {text!r}")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            values[name] = value
    return values
