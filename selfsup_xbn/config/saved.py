"""Configurations that were saved with a run, and their comparison with others."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from selfsup_xbn.config.registry import ADAPTATIONS, METHODS
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
    if not isinstance(mode, str) or not mode:
        raise UserError(f"expected a configuration with a mode out of {', '.join(METHODS)}, got {mode!r}")
    for registry, name in ((METHODS, mode), (ADAPTATIONS, values.get("adaptation"))):
        if isinstance(name, str) and name not in registry:
            raise UserError(
                f"expected the {registry.kind} of the run to be one of {', '.join(registry)}, got {name!r}; if it is "
                "your own, call selfsup_xbn.cli.main from the program that registers it"
            )
    kind: type[Config] = METHODS[mode]
    if type(rows := values.get("queue_size")) is int:  # written so by older versions of mode pretrain
        values = values | {"queue_size": str(rows)}
    for item in fields(kind):
        if item.name not in values and item.metadata["affects_results"] and not item.metadata["added_later"]:
            raise UserError(f"expected the option {item.name!r} in the configuration, got none")
    return kind(**{item.name: values[item.name] for item in fields(kind) if item.name in values})


def differences(a: Config, b: Config, first: str = "the run", second: str = "the command") -> list[str]:
    """Return a text such as ``"--seed: the run has 0, the command has 3"`` for each difference that affects results.

    Args:
        a: First configuration.
        b: Second configuration.
        first: What has the first configuration.
        second: What has the second configuration.
    """
    if a.mode != b.mode:
        return [f"mode: {first} has {a.mode}, {second} has {b.mode}"]
    pairs = [
        (item.name, getattr(a, item.name), getattr(b, item.name))
        for item in fields(a)
        if item.metadata["affects_results"]
    ]
    return [
        f"--{name.replace('_', '-')}: {first} has {left!r}, {second} has {right!r}"
        for name, left, right in pairs
        if left != right
    ]
