"""What a run may end with besides success, and the exit code that the command line gives each."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class UserError(ValueError):
    """A fault in the user's input; exit code 2. The message is one line that names the value and the cure."""


class Diverged(RuntimeError):  # noqa: N818
    """The loss is no longer finite; exit code 3. The message names step, learning rate and the last checkpoint."""


class ProcessLost(RuntimeError):  # noqa: N818
    """Another process of the run ended, or did not answer in time; exit code 4. The last checkpoint stands."""


class Interrupted(Exception):  # noqa: N818  (no error: the run was asked to stop, and saved itself)
    """SIGTERM or SIGINT came, the step was finished and a checkpoint written; exit code 75, try again later."""


def near(word: str, choices: Iterable[str], likeness: float = 0.5) -> str:
    """``"; did you mean X?"`` for the choice nearest to the word, or nothing where none is near."""
    found = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=likeness)
    return f"; did you mean {found[0]}?" if found else ""


def require_package(package: str, option: str, extra: str) -> None:
    """Refuses an option whose package is not installed; asked before anything is written.

    Raises:
        UserError: it is not; the extra of this project that installs it is named.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{option} needs the package {package}, which is missing: pip install 'selfsup-xbn[{extra}]'")
