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


class RunsFailed(RuntimeError):  # noqa: N818
    """Some runs of a comparison failed; exit code 5. The message names them. The other runs are finished."""


class Interrupted(Exception):  # noqa: N818  (not an error: the run was stopped on request)
    """The run received SIGTERM or SIGINT and wrote a checkpoint after the current step; exit code 75."""


def near(word: str, choices: Iterable[str], likeness: float = 0.5, count: int = 1) -> str:
    """Return ``"; did you mean X or Y?"`` for the choices that are most similar to a word, or ``""`` for none.

    Args:
        word: Mistyped word.
        choices: Valid words.
        likeness: Smallest similarity of a suggestion, in [0, 1], as in ``difflib.get_close_matches``.
        count: Largest number of suggestions.

    Example:
        >>> near("resnet19", ["resnet18", "convnet4"])
        '; did you mean resnet18?'
    """
    matches = difflib.get_close_matches(str(word), list(choices), n=count, cutoff=likeness)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def one_line(error: BaseException, length: int = 200) -> str:
    """Return the type and the message of an exception in one line.

    Args:
        error: Exception.
        length: Maximum number of characters.

    Example:
        >>> one_list = []
        >>> try:
        ...     one_list[0]
        ... except IndexError as error:
        ...     print(one_line(error))
        IndexError: list index out of range
    """
    return " ".join(f"{type(error).__name__}: {error}".split())[:length]


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
