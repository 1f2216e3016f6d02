"""Notice when files leave a directory, by inotify(7), which the standard library lacks."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_IN_MOVED_FROM: Final = 0x40
_IN_MOVED_TO: Final = 0x80
_IN_DELETE: Final = 0x200
_IN_NONBLOCK: Final = 0o4000
_IN_CLOEXEC: Final = 0o2000000
_BUFFER: Final = 1 << 16
# inotify(7) has limits of its own for each user; the texts of these errors name only the general ones.
_REMEDIES: Final = {
    errno.EMFILE: " (raise fs.inotify.max_user_instances, or RLIMIT_NOFILE)",
    errno.ENOSPC: " (raise fs.inotify.max_user_watches)",
}


class RemovalWatch:
    """Readable when a file of the directory was removed or renamed; raises OSError if inotify is not available."""

    def __init__(self, directory: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor: int = libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        events = _IN_DELETE | _IN_MOVED_FROM | _IN_MOVED_TO
        if self._descriptor < 0 or libc.inotify_add_watch(self._descriptor, os.fsencode(directory), events) < 0:
            number = ctypes.get_errno()
            remedy = _REMEDIES.get(number, "")
            raise OSError(number, f"inotify: {os.strerror(number)}{remedy}", str(directory))

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._descriptor

    def drain(self) -> None:
        """Read and discard all events so far; the caller looks at the directory itself."""
        with suppress(BlockingIOError):
            os.read(self._descriptor, _BUFFER)
