"""Opening of files that other programs or users have written."""

from __future__ import annotations

import errno
import os
import stat
import zipfile
from os import PathLike
from typing import BinaryIO, cast

NOT_REGULAR = "not a regular file"

Path = str | PathLike[str]


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: str = "rb") -> BinaryIO:
    """Open a regular file. A folder, a device or a FIFO, which could block for ever, is refused.

    Args:
        path: The file, or a link to it.
        flags: The flags of ``os.open``.
        mode: The mode of the file object.

    Raises:
        OSError: If the file does not exist, cannot be opened or is not a regular file.
    """
    # Without O_NONBLOCK the call would wait for the writer of a FIFO. The flag has no effect on regular files.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, NOT_REGULAR, os.fspath(path))
        return cast(BinaryIO, os.fdopen(descriptor, mode))
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: If the file cannot be read or is not a regular file.
    """
    with open_regular(path) as file:
        return file.read()


def unpacked_bytes(file: BinaryIO) -> int:
    """Return the number of bytes that the members of a zip archive take once they are unpacked; 0 for another file.

    The number is that of the archive's directory, beyond which no reader unpacks.

    Args:
        file: The archive, whose position is set to its start.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile:
        return 0
    finally:
        file.seek(0)
