"""A kind of input that ``bad_input.py`` damages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        write: Writes valid files into an empty folder.
        spoiled: Pattern of the files of which one is damaged.
        read: Reads the folder as the program does; returns the number of rows.
        count: Returns the number of rows of a folder that was read without error, counted another way.
        opened: Whether the program opens the damaged file itself, which may then be replaced by a FIFO or a link.
    """

    write: Callable[[Path], Any]
    spoiled: str
    read: Callable[[Path], int]
    count: Callable[[Path], int]
    opened: bool = True


VALID = b"as it was written"


def seeded(
    read: Callable[[Path], int], count: Callable[[Path], int], write: Callable[[Path], Any] = lambda folder: None
) -> Target:
    """Return a target whose damaged file is a seed, from which ``read`` draws the damage."""

    def write_all(folder: Path) -> None:
        write(folder)
        (folder / "seed").write_bytes(VALID)

    return Target(write_all, "seed", read, count, opened=False)
