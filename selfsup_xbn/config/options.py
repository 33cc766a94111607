"""Configuration fields that are options of the command line, and the checks of their values."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from selfsup_xbn.errors import UserError, near


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] = (),
    minimum: int | float | None = None,
    maximum: int | float = float("inf"),
    affects_results: bool = True,
    names: Iterable[str] = (),
    added_later: bool = False,
    elsewhere: str = "",
) -> Any:
    """Return a dataclass field that is an option of the command line.

    Args:
        default: Default value.
        help: Help text. ``{names}`` in it is replaced by ``names``.
        choices: Valid values; may be a registry that grows later. Any value is valid if empty.
        minimum: Smallest valid number. The number is not checked if ``None``.
        maximum: Largest valid number.
        affects_results: Whether the value may change the results of a run.
        names: Names to insert into the help text.
        added_later: Whether a ``config.json`` without this option gets the default, because earlier versions behaved
            like the default.
        elsewhere: Why other modes do not have the option.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Options:
        ...     margin: float = option(0.5, "margin of the loss", minimum=0, maximum=1)
        >>> Options().margin
        0.5
    """
    metadata = {
        "help": help,
        "names": names,
        "added_later": added_later,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "affects_results": affects_results,
        "elsewhere": elsewhere,
    }
    return field(default=default, metadata=metadata)


def check_option(name: str, value: Any, kind: type, metadata: Mapping[str, Any]) -> None:
    """Check the type, the choices and the bounds of the value of a field.

    Args:
        name: Name of the field.
        value: Value of the field.
        kind: Annotated type of the field.
        metadata: Metadata that ``option`` attached to the field.

    Raises:
        UserError: The value is invalid. The message states the expected values.
    """
    flag = "--" + name.replace("_", "-")
    if type(value) not in ((float, int) if kind is float else (kind,)):
        raise UserError(f"{flag}: expected {kind.__name__}, got {' '.join(repr(value).split())}")
    if metadata["choices"] and value not in metadata["choices"]:
        raise UserError(
            f"{flag}: expected one of {', '.join(metadata['choices'])}, got {value!r}{near(value, metadata['choices'])}"
        )
    minimum = metadata["minimum"]
    maximum = min(metadata["maximum"], sys.maxsize if kind is int else sys.float_info.max)
    if minimum is not None and not minimum <= value <= maximum:
        limit = "" if metadata["maximum"] == math.inf else f" and at most {metadata['maximum']:g}"
        raise UserError(f"{flag}: expected a number of at least {minimum:g}{limit}, got {value}")
