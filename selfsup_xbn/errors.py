"""Exceptions that end a run, and the checks that raise them. Each exception has an exit code of the command line."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


def printable(value: object) -> str:
    r"""Return the text of a value with an escape such as ``\x1b`` for each character that is not printable.

    Names of files, classes and tensors may contain control characters, which a terminal would execute, or characters
    that change the direction of text. Line breaks are escaped too, so that the result is one line.

    Example:
        >>> printable("cat\x1b[2J\n")
        'cat\\x1b[2J\\n'
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class UserError(ValueError):
    """Invalid input of the user; exit code 2.

    The message is one line that states the expected and the actual value, or how to mend the error.

    Args:
        message: The message. Characters that are not printable are escaped as in ``printable``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Diverged(RuntimeError):  # noqa: N818
    """The loss or a weight is not finite; exit code 3.

    The message states the step, the learning rate and the last checkpoint.
    """


class ProcessLost(RuntimeError):  # noqa: N818
    """Another process of a distributed run ended or timed out; exit code 4. The last checkpoint is kept."""


class Interrupted(Exception):  # noqa: N818  (not an error: the run was stopped on request)
    """The run received SIGTERM or SIGINT and wrote a checkpoint after the current step; exit code 75."""


def near(word: str, choices: Iterable[str], likeness: float = 0.5) -> str:
    """Return ``"; did you mean X?"`` for the choice that is most similar to a word, or ``""`` if none is similar.

    Args:
        word: Mistyped word.
        choices: Valid words.
        likeness: Smallest similarity of a suggestion, in [0, 1], as in ``difflib.get_close_matches``.

    Example:
        >>> near("resnet19", ["resnet18", "convnet4"])
        '; did you mean resnet18?'
    """
    matches = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=likeness)
    return f"; did you mean {matches[0]}?" if matches else ""


def require_package(package: str, option: str, extra: str) -> None:
    """Check that the package that an option requires is installed.

    Args:
        package: Name of the package.
        option: Option of the command line.
        extra: Extra of this project that installs the package.

    Raises:
        UserError: The package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{option} requires the package {package}, which is not installed: pip install 'selfsup-xbn[{extra}]'"
        )
