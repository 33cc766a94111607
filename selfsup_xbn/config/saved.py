"""Configurations that were saved with a run, and their comparison with others."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from selfsup_xbn.config.registry import METHODS
from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import UserError


def from_resolved(values: Any) -> Config:
    """Return the configuration that the content of a ``config.json`` describes.

    Keys that are not options, such as ``environment``, are ignored. A missing option gets its default value if it does
    not affect results or if it is marked ``added_later``.

    Args:
        values: Parsed content of the file.

    Raises:
        UserError: The mode is unknown, an option is missing, or a value is invalid.
    """
    mode = values.get("mode") if isinstance(values, dict) else None
    if not isinstance(mode, str) or mode not in METHODS:
        raise UserError(f"expected a configuration with a mode out of {', '.join(METHODS)}, got {mode!r}")
    kind: type[Config] = METHODS[mode]
    if type(rows := values.get("queue_size")) is int:  # written so by older versions of mode pretrain
        values = values | {"queue_size": str(rows)}
    for item in fields(kind):
        if item.name not in values and item.metadata["affects_results"] and not item.metadata["added_later"]:
            raise UserError(f"expected the option {item.name!r} in the configuration, got none")
    return kind(**{item.name: values[item.name] for item in fields(kind) if item.name in values})


def differences(a: Config, b: Config) -> list[str]:
    """Return ``"name: value in a, value in b"`` for each field that affects results and differs."""
    if a.mode != b.mode:
        return [f"mode: {a.mode}, {b.mode}"]
    pairs = [
        (item.name, getattr(a, item.name), getattr(b, item.name))
        for item in fields(a)
        if item.metadata["affects_results"]
    ]
    return [f"{name}: {left!r}, {right!r}" for name, left, right in pairs if left != right]
