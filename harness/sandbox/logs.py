"""Note when each line of a program's log was written, to print it with a stamp.

The program itself writes to the log. inotify(7) wakes a thread of this process when the log grows, and the thread notes
the log's size and the time by CLOCK_REALTIME, the clock of the steps (harness/steps.py) and of the captures. So a stamp
is never early, and usually less than a millisecond late; it is later while this process is busy.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from harness.sandbox.kept import keep_descriptor, keep_thread
from harness.wait import Watches

if TYPE_CHECKING:
    from pathlib import Path

# Times kept of one log; at this number every second one is deleted.
_MOST: Final = 20_000
_SECOND: Final = 1_000_000_000
# Bytes of the beginning and of the end of a log that are read: a program may write gigabytes.
_MOST_BYTES: Final = 1 << 24

# Bytes at the end of a log that have its last lines.
_TAIL: Final = 1 << 16


class Growth:
    """The sizes of a log with the time of each; both lists ascend."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sizes: list[int] = []
        self._times: list[int] = []
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """The last size noted."""
        return self._sizes[-1] if self._sizes else 0

    def look(self) -> None:
        """Note the current size and time, if the log has grown."""
        with suppress(OSError), self._lock:
            size, now = self._path.stat().st_size, time.time_ns()
            if size <= self.size:
                return
            if len(self._sizes) >= _MOST:
                del self._sizes[::2], self._times[::2]
            self._sizes.append(size)
            self._times.append(now)

    def lines(self) -> list[tuple[int, bytes]]:
        """Return the lines of the log, each with its time in ns of wall time; 0 for one whose time is not known."""
        self.look()
        lines: list[tuple[int, bytes]] = []
        pieces = read_pieces(self._path)
        for end, piece in pieces:
            if end:
                lines.append((0, _gap(pieces[0], (end, piece))))
            for line in piece.splitlines(keepends=True):
                end += len(line)  # noqa: PLW2901 - the offset behind this line
                index = bisect_left(self._sizes, end)
                lines.append((self._times[index] if index < len(self._sizes) else 0, line))
        return lines

    def stamped(self) -> bytes:
        """Return the log, with a stamp (UTC) before each line."""
        return b"".join(b"%s  %s" % (_stamp(time), line) for time, line in self.lines())


def _stamp(wall: int) -> bytes:
    if not wall:
        return b" " * 15
    return f"{datetime.fromtimestamp(wall // _SECOND, UTC):%H:%M:%S}.{wall % _SECOND // 1000:06}".encode()


class _Watcher:
    """The thread, and the logs that it watches by inotify watch descriptor."""

    def __init__(self) -> None:
        self._watches = Watches()
        self._growths: dict[int, Growth] = {}
        self._by_path: dict[Path, Growth] = {}
        self._lock = threading.Lock()
        thread = threading.Thread(target=self._run, name="log stamps", daemon=True)
        thread.start()
        keep_thread(thread.native_id or 0, thread.name)
        keep_descriptor(self._watches.fileno(), thread.name)

    def add(self, path: Path) -> Growth:
        with self._lock:
            number = self._watches.add_growth(path)
            # A program that is started again appends to the same log.
            growth = self._growths.setdefault(number, Growth(path))
            self._by_path[path] = growth
            return growth

    def find(self, path: Path) -> Growth | None:
        with self._lock:
            return self._by_path.get(path)

    def _run(self) -> None:
        while True:
            for number, is_gone in self._watches.wait():
                with self._lock:
                    growth = self._growths.pop(number, None) if is_gone else self._growths.get(number)
                    if is_gone:
                        self._by_path = {path: kept for path, kept in self._by_path.items() if kept is not growth}
                if growth is not None and not is_gone:
                    growth.look()


_watcher: _Watcher | None = None
_making = threading.Lock()


def read_pieces(path: Path, begin: int = _MOST_BYTES, end: int = _MOST_BYTES) -> list[tuple[int, bytes]]:
    """Return a log as one piece, or so many bytes of its beginning and of its end, each with its offset.

    Raises OSError.
    """
    with path.open("rb") as log:
        size = os.fstat(log.fileno()).st_size
        if size <= begin + end:
            return [(0, log.read(begin + end))]
        pieces = [(0, log.read(begin))]
        log.seek(size - end)
        return [*pieces, (size - end, log.read(end))]


def read_log(path: Path) -> bytes:
    """Return a log; of a long one its beginning and its end, with a line between that says so. Raises OSError."""
    first, *rest = read_pieces(path)
    return first[1] + b"".join(_gap(first, piece) + piece[1] for piece in rest)


def _gap(first: tuple[int, bytes], last: tuple[int, bytes]) -> bytes:
    return b"\n[%d bytes left out]\n" % (last[0] - len(first[1]))


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a log, of its last 64 KiB at most. Raises OSError."""
    _, last = read_pieces(path, 0, _TAIL)[-1]
    return last.decode(errors="replace").splitlines()[-count:]


def watch(path: Path) -> Growth | None:
    """Watch the growth of an existing log until it is deleted; None if inotify(7) refuses."""
    global _watcher  # noqa: PLW0603 - one thread for the whole process
    with _making, suppress(OSError):
        if _watcher is None:
            _watcher = _Watcher()
        return _watcher.add(path.absolute())
    return None


def stamped(path: Path) -> bytes | None:
    """Return a log with a stamp before each line; None if it was not watched, or was deleted."""
    growth = _find(path)
    with suppress(OSError):
        return None if growth is None else growth.stamped()
    return None


def timed(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a log with their times, as `Growth.lines`; none if it was not watched, or was deleted."""
    growth = _find(path)
    with suppress(OSError):
        if growth is not None:
            return [(time, line.decode(errors="replace").strip("\n")) for time, line in growth.lines()]
    return []


def _find(path: Path) -> Growth | None:
    return _watcher.find(path.absolute()) if _watcher is not None else None
