"""Argument parser whose errors are exceptions of the package."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import Field
from typing import Any, NoReturn

from selfsup_xbn.errors import UserError, near


class AppendNamed(argparse.Action):
    """Append the option string and its values as a pair, so that a list keeps the order of several options."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Append to a copy of the list, because the list may be the default."""
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), (option_string, values)])


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors as a ``UserError`` and suggests corrections of mistyped options.

    Args:
        add_options: Adds the options, given the arguments, before the parser is used for the first time. It may import
            torch.
        kwargs: Arguments of ``argparse.ArgumentParser``.

    Attributes:
        elsewhere: What to say of options that the parser does not have.
    """

    def __init__(self, add_options: Callable[[Parser, Sequence[str]], None] | None = None, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | kwargs)
        self._add_options = add_options
        self.elsewhere: dict[str, str] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None, **kwargs: Any) -> Any:
        """Add the options if needed, and parse the known arguments."""
        if self._add_options is not None:
            self._add_options(self, args or ())
            self._add_options = None
        return super().parse_known_args(args, namespace, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise a ``UserError`` with a message of ``argparse``."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all arguments.

        Raises:
            UserError: An argument is unknown or invalid.
        """
        options, unknown = self.parse_known_args(argv)
        if unknown:
            word = unknown[0].split("=")[0]
            parser = options.parser
            known = [option for action in parser._actions for option in action.option_strings]
            hint = parser.elsewhere.get(word) or near(word, known)
            parser.error(f"unknown option {word!r}{hint}" if word[0] == "-" else f"unexpected {word!r}")
        return options


def flag_of(item: Field[Any]) -> str:
    """Return the option string of a field."""
    return "--" + item.name.replace("_", "-")


def add_option(parser: Parser, item: Field[Any], kind: type, default: Any, note: str = "") -> None:
    """Add the option of a field.

    Args:
        parser: Parser to add the option to.
        item: Field of a configuration, made by ``option``.
        kind: Type of the field.
        default: Value that ``--help`` shows as the default. ``""`` is not shown.
        note: Text that ``--help`` shows after the default.
    """
    text = item.metadata["help"].format(names=", ".join(item.metadata["names"]))
    arguments: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    shown = "yes" if default else "no"
    if kind is not bool:
        arguments = {"type": kind, "metavar": "|".join(item.metadata["choices"]) or kind.__name__.upper()}
        shown = repr(default)
    if notes := "; ".join(filter(None, [f"default: {shown}" if default != "" else "", note])):
        text += f" ({notes})"
    parser.add_argument(flag_of(item), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **arguments)


def early_options(args: Sequence[str]) -> argparse.Namespace:
    """Return ``--recipe`` and ``--data`` of the arguments, which the defaults in ``--help`` depend on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", nargs="?", default="")
    parser.add_argument("--data", nargs="?", default="")
    return parser.parse_known_args(args)[0]
