"""Wait for an event with a deadline, or poll a state that has no event.

An event has a file descriptor that becomes readable when it is worth looking again. `wait_for` sleeps until then: it
costs nothing and ends as soon as the event is there. A missed deadline says what was seen instead.
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
# Seconds for a request and its answer: 130 560 allowed-ips of a program that has a tenth of a processor take so long.
REQUEST_TIMEOUT: Final = 30.0

_scale = 1.0


def set_timeout_scale(factor: float) -> None:
    """Multiply every deadline from now on (`--timeout-scale`), for slow or emulated machines."""
    global _scale  # noqa: PLW0603 - one factor for the whole process is what is meant
    _scale = factor


def scaled(seconds: float) -> float:
    """A deadline of so many seconds, as this machine needs it."""
    return seconds * _scale


class Event(Protocol[T_co]):
    """Something that may happen."""

    def fileno(self) -> int:
        """A descriptor that becomes readable when `look` may answer differently."""

    def look(self) -> T_co | None:
        """The awaited value if it is there; None if not yet."""

    def seen(self) -> str:
        """What there was instead, for the message of a missed deadline."""


def wait_for(event: Event[T], deadline: float, what: str) -> T:
    """Wait until the event has happened and return its value.

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
        # Of two events, the one that happened is the value.
        waiting.outcome = "" if hasattr(value, "look") else steps.in_short(value)
    return value


def poll_until(
    look: Callable[[], T],
    accept: Callable[[T], bool],
    deadline: float,
    *,
    interval: float = _POLL_INTERVAL,
    what: str = "",
) -> T:
    """Call `look` until `accept` takes its result or the deadline is over; return the last result.

    The caller checks the result: a missed deadline does not raise. Prefer `wait_for`; this is for state that changes
    without an event, such as a program's counters over UAPI. deadline: seconds, multiplied by --timeout-scale.
    interval: seconds between two looks, never scaled. what: completes "poll until ..." in the evidence; without it, the
    caller's file and line stand there.
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
    """File and line of the function that called the caller of this."""
    frame = sys._getframe(2)  # noqa: SLF001 - `inspect` does the same, and costs an import
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def let_pass(seconds: float, why: str) -> None:
    """Let time itself pass, where the passing of time is what is tested; `why` is for the reader. Never scaled."""
    with steps.step("", f"let {seconds:g} s pass: {why}"):
        time.sleep(seconds)


class Datagram:
    """The next datagram of a socket that `accept` takes: (data, sender)."""

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
    """The part that file events share: a descriptor of inotify(7), made in the calling thread's mount namespace."""

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
    """Files that are watched for growth by one descriptor of inotify(7), for a thread that does nothing else.

    It is never closed: the kernel takes 25 ms for that.
    """

    def __init__(self) -> None:
        self._descriptor: int = _libc.inotify_init1(_IN_CLOEXEC)
        if self._descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify: {os.strerror(number)}")

    def add_growth(self, path: Path) -> int:
        """Watch a file; returns its number, the same for the same file."""
        number: int = _libc.inotify_add_watch(self._descriptor, os.fsencode(path), _IN_MODIFY)
        if number < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"inotify: {os.strerror(error)}", str(path))
        return number

    def wait(self) -> list[tuple[int, bool]]:
        """Wait for events: the number of each file that has grown, and whether it was deleted instead."""
        data = os.read(self._descriptor, _EVENT_BUFFER)
        events = []
        while data:
            number, mask, length = struct.unpack_from("iI4xI", data)
            events.append((number, bool(mask & _IN_IGNORED)))
            data = data[16 + length :]
        return events


class FileSays(_Inotify):
    """A line of a growing file matches a pattern: the match."""

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
    """A directory gets an entry of this name: True."""

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
    """A process has ended: True. The process must not have been waited for."""

    def __init__(self, pid: int, log: Callable[[], str] = lambda: "") -> None:
        self._descriptor = os.pidfd_open(pid)
        self._log = log

    def fileno(self) -> int:
        return self._descriptor

    def look(self) -> bool | None:
        return True if select.select([self._descriptor], [], [], 0)[0] else None

    def seen(self) -> str:
        return f"it still runs; {self._log() or 'it wrote nothing'}"

    def close(self) -> None:
        os.close(self._descriptor)


class EitherOf:
    """The first of two events; the other's descriptor is watched too. Used for: ready, or dead."""

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
    """The end of one request, however many reads it takes: in so many seconds, multiplied by --timeout-scale."""

    def __init__(self, seconds: float) -> None:
        self._seconds = scaled(seconds)
        self._end = time.monotonic() + self._seconds

    def limit(self, sock: socket.socket) -> None:
        """Give the next call on this socket what is left of the time; TimeoutError when nothing is."""
        left = self._end - time.monotonic()
        # A socket takes a timeout of 0 for "do not wait at all" and raises something else then.
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)

    def exceeded(self, where: str, action: str, seen: str) -> DeadlineExceeded:
        """Make the error of a request that took longer."""
        return DeadlineExceeded(f"{where}: waited {self._seconds:g} s for the answer to {action}; seen: {seen}")
