"""Notices when a file is removed, by inotify(7), for which the standard library has no function."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_IN_MOVED_FROM: Final = 0x40
_IN_MOVED_TO: Final = 0x80
_IN_DELETE: Final = 0x200
_IN_NONBLOCK: Final = 0o4000
_IN_CLOEXEC: Final = 0o2000000
_BUFFER: Final = 1 << 16


class RemovalWatch:
    """Readable when something has happened beside the file; then ask `is_removed`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = _identity(path)
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor: int = libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        directory = os.fsencode(path.parent)
        if (
            self._descriptor < 0
            or libc.inotify_add_watch(self._descriptor, directory, _IN_DELETE | _IN_MOVED_FROM | _IN_MOVED_TO) < 0
        ):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path.parent))

    def fileno(self) -> int:
        return self._descriptor

    def is_removed(self) -> bool:
        """Whether the file is gone, or another one has its name."""
        os.read(self._descriptor, _BUFFER)
        return _identity(self._path) != self._identity


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
