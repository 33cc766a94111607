"""Image files in a tree of folders. Each folder is visited once, and what is skipped is counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from selfsup_xbn.errors import UserError


class ImageTree:
    """The image files of a part of a data set, such as its training set.

    Links are followed, except for those that would repeat images, which would get the label of another class: a link to
    a folder of the data set, to a folder above it, to a folder that was visited before, or to a file of the part. Only
    regular files are returned.

    Args:
        parts: The folders of all parts of the data set.
    """

    def __init__(self, parts: Sequence[Path]) -> None:
        self._parts = [os.path.realpath(part) for part in parts]
        self._visited: dict[tuple[int, int], str] = {}
        self._inodes: set[tuple[int, int]] = set()
        self._formats: Counter[str] = Counter()
        self._skipped: dict[str, list[str]] = {}

    def class_names(self, folder: Path) -> list[str]:
        """Return the sorted names of the folders in a folder. The other files in it are counted as skipped.

        Raises:
            UserError: If the folder cannot be listed.
        """
        names = []
        for entry in _entries(str(folder)):
            if _is_folder(entry):
                names.append(entry.name)
            else:
                self._skip("outside of a class folder", entry.path)
        return sorted(names)

    def files(self, folders: Iterable[Path]) -> list[list[str]]:
        """Return the sorted image files in each folder, at any depth.

        A dangling link is returned too, so that it is reported as a broken image.

        Raises:
            UserError: If two of the folders are the same one, or a folder cannot be listed.
        """
        roots = [str(folder) for folder in folders]
        for root in roots:
            first = self._visited.setdefault(_identity(root), root)
            if first is not root:
                raise UserError(f"{root} and {first} are the same folder; remove one of the two")
        images = [[entry for entry in self._walk(root) if self._is_image(entry)] for root in roots]
        entries = [entry for members in images for entry in members]
        if any(entry.is_symlink() for entry in entries):
            self._inodes.update(_identity(entry.path) for entry in entries if not entry.is_symlink())
        return [sorted(entry.path for entry in entries if self._is_new(entry)) for entries in images]

    def notes(self) -> list[str]:
        """Return a line for each reason to skip files or folders."""
        lines = []
        if self._formats:
            counts = ", ".join(f"{number:,} {ending or 'no extension'}" for ending, number in self._formats.items())
            lines.append(f"not of a format that is read ({' '.join(IMG_EXTENSIONS)}): {counts}")
        lines += [f"{reason}: {len(paths):,}, such as {paths[0]}" for reason, paths in self._skipped.items()]
        return [f"warning: skipped, because {line}" for line in lines]

    def _skip(self, reason: str, path: str) -> None:
        self._skipped.setdefault(reason, []).append(path)

    def _walk(self, root: str) -> Iterator[os.DirEntry[str]]:
        """Yield the entries that are not folders, without those whose names begin with a dot."""
        folders = [root]
        while folders:
            for entry in _entries(folders.pop(), hidden_folders=True):
                if not _is_folder(entry):
                    yield entry
                elif self._enters(entry):
                    folders.append(entry.path)

    def _enters(self, entry: os.DirEntry[str]) -> bool:
        """Return whether to visit a folder, and count it as visited or skipped."""
        target = os.path.realpath(entry.path)
        known = entry.is_symlink() and any(_contains(target, part) or _contains(part, target) for part in self._parts)
        if known or self._visited.setdefault(_identity(entry.path), entry.path) is not entry.path:
            self._skip("a link to a folder of the data set, or to one above it", entry.path)
            return False
        return True

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        if not entry.name.lower().endswith(IMG_EXTENSIONS):
            self._formats[os.path.splitext(entry.name)[1].lower()] += 1
            return False
        if not os.path.isfile(entry.path) and os.path.exists(entry.path):
            self._skip("not a regular file", entry.path)
            return False
        return True

    def _is_new(self, entry: os.DirEntry[str]) -> bool:
        if entry.is_symlink() and os.path.exists(entry.path):
            identity = _identity(entry.path)
            if identity in self._inodes:
                self._skip("a link to an image of the data set", entry.path)
                return False
            self._inodes.add(identity)
        return True


def _entries(folder: str, *, hidden_folders: bool = False) -> list[os.DirEntry[str]]:
    """Return the entries of a folder whose names do not begin with a dot.

    Args:
        folder: The folder.
        hidden_folders: Whether to return folders whose names begin with a dot.

    Raises:
        UserError: If the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return [
                entry for entry in entries if not entry.name.startswith(".") or (hidden_folders and _is_folder(entry))
            ]
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed ({error.strerror}); change its permissions or remove it"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: str) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_dev, state.st_ino


def _contains(folder: str, path: str) -> bool:
    return os.path.commonpath([folder, path]) == folder
