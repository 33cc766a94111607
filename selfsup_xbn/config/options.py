"""Fields of a config that are options of the command line: their texts, and the values that they take."""

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
    least: int | float | None = None,
    most: int | float = float("inf"),
    affects_results: bool = True,
    names: Iterable[str] = (),
    later: bool = False,
) -> Any:
    """Return a field with its text on the command line and the values that it takes.

    Args:
        default: its default.
        help: its text; ``{names}`` in it becomes the ``names``.
        choices: the values that it takes; a registry may grow later. None: any.
        least, most: bounds of a number.
        affects_results: whether a run with another value may have other results.
        names: names to list in the text.
        later: a ``config.json`` may lack it, and then means the default: older versions behaved so.
    """
    metadata = {
        "help": help,
        "names": names,
        "later": later,
        "choices": choices,
        "least": least,
        "most": most,
        "affects_results": affects_results,
    }
    return field(default=default, metadata=metadata)


def check_option(name: str, value: Any, kind: type, metadata: Mapping[str, Any]) -> None:
    """Check the type, the choices and the bounds of a field's value.

    Raises:
        UserError: naming the option, its value and what it takes.
    """
    flag = "--" + name.replace("_", "-")
    if type(value) not in ((float, int) if kind is float else (kind,)):
        raise UserError(f"{flag}: expected {kind.__name__}, got {' '.join(repr(value).split())}")
    if metadata["choices"] and value not in metadata["choices"]:
        raise UserError(
            f"{flag}: expected one of {', '.join(metadata['choices'])}, got {value!r}{near(value, metadata['choices'])}"
        )
    least = metadata["least"]
    most = min(metadata["most"], sys.maxsize if kind is int else sys.float_info.max)
    if least is not None and not least <= value <= most:
        limit = "" if metadata["most"] == math.inf else f" and at most {metadata['most']:g}"
        raise UserError(f"{flag}: expected a number of at least {least:g}{limit}, got {value}")
