"""Wait for an event with a deadline, or poll a state that has no event.

An event has a file descriptor, which becomes readable when `look` may return something else. `wait_for` blocks in
poll(2) until then, so it uses no CPU time and returns at once. The error of a missed deadline lists what was seen.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import socket
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from harness import steps
from harness.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)
_IN_MODIFY, _IN_CREATE, _IN_IGNORED, _IN_CLOEXEC, _IN_NONBLOCK = 0x2, 0x100, 0x8000, 0o2000000, 0o4000
_MILLISECONDS: Final = 1000
_EVENT_BUFFER: Final = 65536
_POLL_INTERVAL: Final = 0.005
# Seconds for a request and its answer: a program on a tenth of a CPU needs them for 130 560 allowed-ips.
REQUEST_TIMEOUT: Final = 30.0

_scale = 1.0


def set_timeout_scale(factor: float) -> None:
    """Multiply all later deadlines of this process by a factor (`--timeout-scale`), for slow or emulated machines."""
    global _scale  # noqa: PLW0603 - one factor for the whole process
    _scale = factor


def scaled(seconds: float) -> float:
    """Return a deadline in seconds, multiplied by --timeout-scale."""
    return seconds * _scale


class Event(Protocol[T_co]):
    """An event that `wait_for` can wait for."""

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when `look` may return something else."""

    def look(self) -> T_co | None:
        """Return the awaited value, or None if the event has not happened yet."""

    def seen(self) -> str:
        """Describe what was seen instead, for the message of a missed deadline."""


def wait_for(event: Event[T], deadline: float, what: str) -> T:
    """Wait until an event has happened, and return its value.

    deadline: seconds, multiplied by --timeout-scale. what: completes "waited for ...". Raises DeadlineExceeded.
    """
    end = time.monotonic() + scaled(deadline)
    with steps.step("", f"wait for {what}", seen=event.seen, is_wait=True) as waiting:
        poll = select.poll()
        poll.register(event.fileno(), select.POLLIN)
        while (value := event.look()) is None:
            left = end - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(f"waited {scaled(deadline):g} s for {what}; seen: {event.seen()}")
            poll.poll(left * _MILLISECONDS)
        # The value of EitherOf is the event that happened, which has no short form.
        waiting.outcome = "" if hasattr(value, "look") else steps.in_short(value)
    return value


def readable(descriptor: int, seconds: float | None = 0.0) -> bool:
    """Return whether a descriptor is readable, or becomes so in `seconds`; None: wait without a limit.

    Unlike select(2) it takes descriptors above 1023, which a test with thousands of sockets has.
    """
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(None if seconds is None else seconds * _MILLISECONDS))


def poll_until(
    look: Callable[[], T],
    accept: Callable[[T], bool],
    deadline: float,
    *,
    interval: float = _POLL_INTERVAL,
    what: str = "",
) -> T:
    """Call `look` until `accept` returns true for its result or the deadline has passed; return the last result.

    A missed deadline does not raise, so the caller checks the result. Use it for state that changes without an event,
    such as a program's counters over UAPI; where there is an event, use `wait_for`. deadline: seconds, multiplied by
    --timeout-scale. interval: seconds between two calls, never scaled. what: completes "poll until ..." in the
    evidence; the default names the caller's file and line.
    """
    end = time.monotonic() + scaled(deadline)
    what = what or f"{_caller()} accepts"
    results: list[T] = []

    def seen() -> str:
        return ", ".join(map(steps.in_short, results)) or "nothing yet"

    with steps.step("", f"poll until {what}", seen=seen, is_wait=True) as polling:
        while True:
            results[:] = [look()]
            if (is_accepted := accept(results[0])) or time.monotonic() >= end:
                break
            time.sleep(interval)
        late = "" if is_accepted else f"not within {scaled(deadline):g} s; "
        polling.outcome = f"{late}seen: {steps.in_short(results[0]) or results[0]}"
    return results[0]


def _caller() -> str:
    """Return file and line of the code that called `poll_until`."""
    frame = sys._getframe(2)  # noqa: SLF001 - `inspect` does the same and takes long to import
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def let_pass(seconds: float, why: str) -> None:
    """Sleep, in a test of the passing of time itself. seconds: never scaled; why: for the reader and the evidence."""
    with steps.step("", f"let {seconds:g} s pass: {why}"):
        time.sleep(seconds)


class Datagram:
    """Event: a socket receives a datagram for which `accept` returns true. Value: (data, sender)."""

    def __init__(self, receiver: socket.socket, accept: Callable[[bytes], bool] = lambda _: True) -> None:
        self._receiver = receiver
        self._accept = accept
        self._others: list[bytes] = []

    def fileno(self) -> int:
        return self._receiver.fileno()

    def look(self) -> tuple[bytes, tuple[str, int]] | None:
        while True:
            try:
                data, sender = self._receiver.recvfrom(65535, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if self._accept(data):
                return data, sender[:2]
            self._others.append(data)

    def seen(self) -> str:
        return "; ".join(repr(data[:32]) for data in self._others[-3:]) or "no datagram"


class _Inotify:
    """A watch of one path by inotify(7), opened in the mount namespace of the calling thread."""

    def __init__(self, path: Path, mask: int) -> None:
        self._descriptor: int = _libc.inotify_init1(_IN_CLOEXEC | _IN_NONBLOCK)
        if self._descriptor < 0 or _libc.inotify_add_watch(self._descriptor, os.fsencode(path), mask) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify: {os.strerror(number)}", str(path))

    def fileno(self) -> int:
        return self._descriptor

    def drain(self) -> bytes:
        try:
            return os.read(self._descriptor, _EVENT_BUFFER)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        os.close(self._descriptor)


class Watches:
    """Watches of many files by one inotify(7) descriptor, for a thread that does nothing else.

    There is no `close`, because the kernel takes 25 ms for it.
    """

    def __init__(self) -> None:
        self._descriptor: int = _libc.inotify_init1(_IN_CLOEXEC)
        if self._descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify: {os.strerror(number)}")

    def fileno(self) -> int:
        """Return the inotify descriptor."""
        return self._descriptor

    def add_growth(self, path: Path) -> int:
        """Watch a file for growth; returns its watch descriptor, the same for the same file."""
        number: int = _libc.inotify_add_watch(self._descriptor, os.fsencode(path), _IN_MODIFY)
        if number < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"inotify: {os.strerror(error)}", str(path))
        return number

    def wait(self) -> list[tuple[int, bool]]:
        """Block until there are events; returns for each the watch descriptor, and whether the file was deleted."""
        data = os.read(self._descriptor, _EVENT_BUFFER)
        events = []
        while data:
            number, mask, length = struct.unpack_from("iI4xI", data)
            events.append((number, bool(mask & _IN_IGNORED)))
            data = data[16 + length :]
        return events


class FileSays(_Inotify):
    """Event: a line of a growing file matches a pattern. Value: the match."""

    def __init__(self, path: Path, pattern: str) -> None:
        super().__init__(path, _IN_MODIFY)
        self._path = path
        self._pattern = re.compile(pattern, re.MULTILINE)

    def look(self) -> re.Match[str] | None:
        self.drain()
        return self._pattern.search(self._path.read_text(errors="replace"))

    def seen(self) -> str:
        return self._path.read_text(errors="replace")[-300:] or "an empty log"


class EntryAppears(_Inotify):
    """Event: an entry of this name is created in a directory. Value: True."""

    def __init__(self, directory: Path, name: str) -> None:
        super().__init__(directory, _IN_CREATE)
        self._name = name
        self._created: list[str] = []

    def look(self) -> bool | None:
        data = self.drain()
        while data:
            (length,) = struct.unpack_from("12xI", data)
            self._created.append(data[16 : 16 + length].rstrip(b"\0").decode())
            data = data[16 + length :]
        return True if self._name in self._created else None

    def seen(self) -> str:
        return ", ".join(self._created) or "nothing new"


class Exit:
    """Event: a process has ended. Value: True. Create it before the process is reaped."""

    def __init__(self, pid: int, log: Callable[[], str] = lambda: "") -> None:
        self._descriptor = os.pidfd_open(pid)
        self._log = log

    def fileno(self) -> int:
        return self._descriptor

    def look(self) -> bool | None:
        return readable(self._descriptor) or None

    def seen(self) -> str:
        return f"it still runs; {self._log() or 'it wrote nothing'}"

    def close(self) -> None:
        os.close(self._descriptor)


class EitherOf:
    """Event: one of two events has happened, such as ready or exited. Value: that event."""

    def __init__(self, first: Event[T], second: Event[T]) -> None:
        self._events = (first, second)
        self._both = select.epoll()
        for event in self._events:
            self._both.register(event.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        return self._both.fileno()

    def look(self) -> Event[object] | None:
        return next((event for event in self._events if event.look() is not None), None)

    def seen(self) -> str:
        return "; ".join(event.seen() for event in self._events)

    def close(self) -> None:
        self._both.close()


class Deadline:
    """One deadline for a request of several sends and receives, in seconds, multiplied by --timeout-scale."""

    def __init__(self, seconds: float) -> None:
        self._seconds = scaled(seconds)
        self._end = time.monotonic() + self._seconds

    def limit(self, sock: socket.socket) -> None:
        """Set the socket's timeout to the time that is left; raises TimeoutError if none is left."""
        left = self._end - time.monotonic()
        # settimeout(0) means non-blocking: the next call would raise BlockingIOError.
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)

    def exceeded(self, where: str, action: str, seen: str) -> DeadlineExceeded:
        """Make the error of a request that missed this deadline."""
        return DeadlineExceeded(f"{where}: waited {self._seconds:g} s for the answer to {action}; seen: {seen}")
