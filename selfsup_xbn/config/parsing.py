"""Parsers of option values that are text: queue sizes, intervals, lists of numbers and keyword arguments."""

from __future__ import annotations

import ast
import contextlib
import math
from typing import Any

from selfsup_xbn.errors import UserError


def parse_rows(text: str, images: int) -> int:
    """Return the number of rows that the text of ``--queue-size`` stands for.

    Args:
        text: An integer, or a percentage of the training images.
        images: Number of training images.

    Raises:
        UserError: ``text`` is neither a nonnegative integer nor a percentage of at most 100.

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
        raise UserError(f"--queue-size: expected a number of rows or a percentage of at most 100%, got {text!r}")
    return rows


def parse_share(text: str, flag: str) -> float:
    """Return a share of the training classes, in [0, 1).

    Args:
        text: ``"P%"``, or ``"0"`` for none.
        flag: Name of the option for the error message.

    Raises:
        UserError: ``text`` is neither 0 nor a percentage below 100.

    Example:
        >>> parse_share("10%", "--validation"), parse_share("0", "--validation")
        (0.1, 0.0)
    """
    text = text.strip()
    with contextlib.suppress(ValueError):
        if text == "0" or (text.endswith("%") and _percent(text) < 100):
            return 0.0 if text == "0" else _percent(text) / 100
    hint = ""
    with contextlib.suppress(ValueError):
        number = float(text)
        percent = 100 * number if number < 1 else number
        hint = f"; write {percent:g}%" if 0 < percent < 100 else ""
    raise UserError(f"{flag}: expected 0 or a percentage below 100% of the training classes, got {text!r}{hint}")


def parse_channels(text: str, flag: str, channels: int = 0) -> tuple[float, ...]:
    """Return a number per channel.

    Args:
        text: A number for all channels, numbers separated by commas, or ``""`` for none.
        flag: Name of the option for the error message.
        channels: Number of channels; 0 if it is not known.

    Raises:
        UserError: ``text`` is not such a list of finite numbers, a standard deviation is not positive, or the number
            of values is not that of the channels.

    Example:
        >>> parse_channels("0.5", "--mean", 3), parse_channels("", "--mean", 3)
        ((0.5, 0.5, 0.5), ())
    """
    try:
        values = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) and (value > 0 or flag == "--mean") for value in values) or (
        channels and len(values) not in (0, 1, channels)
    ):
        raise UserError(f"{flag}: expected a number, or {channels or 3} separated by commas, got {text!r}")
    return values * channels if len(values) == 1 else values


def _percent(text: str) -> float:
    percent = float(text.removesuffix("%"))
    if not 0 <= percent <= 100:
        raise ValueError
    return percent


def parse_save_interval(text: str) -> tuple[int, float]:
    """Return the interval between checkpoints in epochs and in seconds, one of which is 0.

    Args:
        text: A number of epochs, or a number of minutes followed by ``m``.

    Raises:
        UserError: ``text`` is neither a positive integer nor a positive number followed by ``m``.

    Example:
        >>> parse_save_interval("2"), parse_save_interval("10m")
        ((2, 0.0), (0, 600.0))
    """
    with contextlib.suppress(ValueError):
        if text.endswith("m") and 0 < (minutes := float(text[:-1])) < math.inf:
            return 0, 60 * minutes
        if not text.endswith("m") and (epochs := int(text)) > 0:
            return epochs, 0.0
    raise UserError(f"--save-every: expected a positive number of epochs, or of minutes as in 10m, got {text!r}")


def parse_numbers(text: str, flag: str) -> tuple[int, ...]:
    """Return the positive integers of a comma-separated list.

    Args:
        text: The list.
        flag: Name of the option for the error message.

    Raises:
        UserError: ``text`` is not such a list.

    Example:
        >>> parse_numbers("1,10", "--recall-ks")
        (1, 10)
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 19 and int(part) > 0 for part in parts):
        raise UserError(f"{flag}: expected positive integers separated by commas, got {text!r}")
    return tuple(int(part) for part in parts)


def parse_arguments(text: str, flag: str) -> dict[str, Any]:
    """Return the keyword arguments of ``name=value,name=value``.

    Args:
        text: The arguments. A value that is not a Python literal becomes a string.
        flag: Name of the option for the error message.

    Raises:
        UserError: A part has no name or no value.

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
