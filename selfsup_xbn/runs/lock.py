"""Lock of a run folder, so that two runs do not write to the same files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from selfsup_xbn.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """An exclusive lock (flock) on a folder. The system releases it when the process ends, however it ends.

    File systems without locks, such as some network file systems, do not lock.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.release)  # workers may live longer than a killed process

    def acquire(self) -> bool:
        """Lock the folder if it exists and this object has not locked it. Return whether this call has locked it.

        Raises:
            UserError: Another process has locked the folder.
        """
        if self._descriptor is not None or fcntl is None or not self.folder.is_dir():
            return False
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"another process is writing to {self.folder}: wait until it ends, or choose another --out"
            ) from None
        except OSError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Release the lock, if this object has locked the folder."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None
