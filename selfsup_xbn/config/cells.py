"""Cells of a comparison: configurations that differ from a base in some options."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

from selfsup_xbn.config.saved import differences
from selfsup_xbn.config.schema import Config, options_of_other_modes
from selfsup_xbn.errors import UserError, near

Cells = Mapping[str, Config]
"""Configurations by label. The first cell is the one that the others are compared with."""

NOT_VARIED = {"seed": "use --seeds", "out": "each run has its own folder"}
SWITCHES = {"true": True, "yes": True, "false": False, "no": False}
MEMORIES: dict[str, dict[str, Any]] = {
    "no memory": {"queue_size": "0"},
    "XBM": {"adaptation": "xbm"},
    "XBN": {"adaptation": "xbn"},
}
"""Cells of a comparison for which none is given. A mode that requires a memory has no cell without one."""


def cells_of(base: Config, options: Sequence[tuple[str, Sequence[str]]]) -> dict[str, Config]:
    """Return the cells that the options ``--vary`` and ``--cell`` of a command stand for, in their order.

    Args:
        base: Configuration that the cells are variants of.
        options: Pairs of ``"--vary"`` or ``"--cell"`` and its values. Without any the cells are ``default_cells``.

    Raises:
        UserError: An option is unknown or does not take a value, or two cells have the same label or settings.
    """
    parts = [
        varied_cells(base, values) if flag == "--vary" else named_cell(base, values[0], values[1:])
        for flag, values in options
    ]
    return joined_cells(parts or [default_cells(base)])


def default_cells(base: Config) -> dict[str, Config]:
    """Return the cells without memory, with a plain queue and with XBN, of those that the mode of the base allows.

    Example:
        >>> from selfsup_xbn.config.modes import PretrainConfig
        >>> list(default_cells(PretrainConfig()))
        ['XBM', 'XBN']
    """
    return {
        name: replace(base, **changes)
        for name, changes in MEMORIES.items()
        if base.labelled or changes.get("queue_size") != "0"
    }


def varied_cells(base: Config, assignments: Sequence[str]) -> dict[str, Config]:
    """Return a cell for each combination of the values of some options.

    Args:
        base: Configuration that the cells are variants of.
        assignments: ``"NAME=VALUE,VALUE,..."`` for each option.

    Raises:
        UserError: An option is unknown, or does not take a value.

    Example:
        >>> from selfsup_xbn.config.modes import PretrainConfig
        >>> list(varied_cells(PretrainConfig(), ["adaptation=xbm,xbn", "batch-size=64"]))
        ['adaptation=xbm, batch-size=64', 'adaptation=xbn, batch-size=64']
    """
    options = [_split(text, "--vary") for text in assignments]
    combinations = itertools.product(*([(name, value) for value in values.split(",")] for name, values in options))
    cells = [(", ".join(f"{name}={value}" for name, value in pairs), pairs) for pairs in combinations]
    return _distinct((label, _changed(base, pairs, "--vary")) for label, pairs in cells)


def named_cell(base: Config, label: str, assignments: Sequence[str]) -> dict[str, Config]:
    """Return one cell with a label of the user's choice.

    Args:
        base: Configuration that the cell is a variant of.
        label: Label of the cell.
        assignments: ``"NAME=VALUE"`` for each option that differs from the base.

    Raises:
        UserError: An option is unknown, or does not take a value.

    Example:
        >>> from selfsup_xbn.config.modes import SuperviseConfig
        >>> cell = named_cell(SuperviseConfig(), "XBM*", ["adaptation=xbm", "batch-loss-weight=1"])
        >>> cell["XBM*"].batch_loss_weight
        1.0
    """
    if not label.strip() or "=" in label:
        raise UserError(f"--cell: expected a label without '=' before the options, got {label!r}")
    return {label: _changed(base, [_split(text, f"--cell {label}") for text in assignments], f"--cell {label}")}


def joined_cells(parts: Iterable[Cells]) -> dict[str, Config]:
    """Return the cells of all parts.

    Raises:
        UserError: Two cells have the same label or the same settings.
    """
    cells = _distinct(item for part in parts for item in part.items())
    for (one, config), (other, config2) in itertools.combinations(cells.items(), 2):
        if not differences(config, config2):
            raise UserError(
                f"expected cells that differ in a setting that changes results, got the same for {one!r} and {other!r}"
            )
    return cells


def _distinct(items: Iterable[tuple[str, Config]]) -> dict[str, Config]:
    cells: dict[str, Config] = {}
    for label, config in items:
        if label in cells:
            raise UserError(f"expected cells with different labels, got two cells {label!r}")
        cells[label] = config
    return cells


def _split(text: str, where: str) -> tuple[str, str]:
    name, equals, values = text.partition("=")
    if not (name and equals):
        raise UserError(f"{where}: expected NAME=VALUE with the name of an option, got {text!r}")
    return name.removeprefix("--").replace("_", "-"), values


def _changed(base: Config, pairs: Iterable[tuple[str, str]], where: str) -> Config:
    """Return the base with the options of ``pairs`` changed, after a check of names and values."""
    types = get_type_hints(type(base))
    known = {item.name.replace("_", "-"): types[item.name] for item in fields(base) if item.name not in NOT_VARIED}
    changes: dict[str, Any] = {}
    for name, text in pairs:
        if name in NOT_VARIED:
            raise UserError(f"{where}: --{name} cannot be varied: {NOT_VARIED[name]}")
        if name not in known:
            hint = options_of_other_modes(base).get(name) or near(name, known)
            raise UserError(f"{where}: unknown option --{name} of {base.mode}{hint}")
        changes[name.replace("-", "_")] = _value(text, known[name], f"{where}: --{name}")
    try:
        return replace(base, **changes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _value(text: str, kind: type, where: str) -> Any:
    choices = SWITCHES if kind is bool else {}
    try:
        return choices[text] if choices else kind(text)
    except (KeyError, ValueError):
        expected = "true or false" if choices else f"a value of type {kind.__name__}"
        raise UserError(f"{where}: expected {expected}, got {text!r}") from None
