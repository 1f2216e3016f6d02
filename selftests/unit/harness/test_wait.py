"""Check waiting: a missed deadline reports what was seen, a past event ends it at once.

Polling returns the last state, in time or not; its tests use their own clock.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from harness import wait
from harness.errors import DeadlineExceeded
from harness.wait import (
    Datagram,
    EitherOf,
    EntryAppears,
    Exit,
    FileSays,
    poll_until,
    scaled,
    set_timeout_scale,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Seconds: a deadline that is missed, and the delay of an event that comes while a test waits.
SHORT = 0.02
# Longer than the timeout of a test, so that a wait that misses its event fails the test.
LONG = 60.0
pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """An empty log."""
    path = tmp_path / "log"
    path.touch()
    return path


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A UDP sender and the receiver that it is connected to."""
    with socket.socket(type=socket.SOCK_DGRAM) as sender, socket.socket(type=socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        sender.connect(receiver.getsockname())
        yield sender, receiver


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends when its input is closed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process


@dataclass
class Clock:
    """A clock that only `sleep` moves; replaces `time` in wait.py."""

    now: float = 100.0
    sleeps: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(wait, "time", clock)
    return clock


def late(function: object, *arguments: object) -> threading.Timer:
    """Call the function while the test waits."""
    timer = threading.Timer(SHORT, function, arguments)  # type: ignore[arg-type]
    timer.start()
    return timer


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("", "an empty log"),
        ("starting\nstill starting\n", "starting\nstill starting\n"),
        ("x" * 400, "x" * 300),
    ],
)
def test_missed_log_line_error_shows_end_of_log(log: Path, text: str, seen: str) -> None:
    log.write_text(text)
    event = FileSays(log, "ready")
    with pytest.raises(DeadlineExceeded) as missed:
        wait_for(event, SHORT, "the server")
    event.close()
    assert str(missed.value) == f"waited 0.02 s for the server; seen: {seen}"


def test_log_line_is_found_when_already_written(log: Path) -> None:
    log.write_text("starting\nready at 10:00\n")
    event = FileSays(log, r"^ready at (\S+)")
    assert wait_for(event, SHORT, "the server")[1] == "10:00"
    event.close()


def test_log_line_is_found_when_written_later(log: Path) -> None:
    event = FileSays(log, "ready")
    late(log.write_text, "ready\n")
    assert wait_for(event, LONG, "the server")
    event.close()


def test_directory_entry_is_found_among_others(tmp_path: Path) -> None:
    event = EntryAppears(tmp_path, "wg0.sock")
    (tmp_path / "other").touch()
    late((tmp_path / "wg0.sock").touch)
    assert wait_for(event, LONG, "the socket")
    event.close()


@pytest.mark.parametrize(("entries", "seen"), [((), "nothing new"), (("wg1.sock", "x"), "wg1.sock, x")])
def test_missed_entry_error_shows_other_entries(tmp_path: Path, entries: tuple[str, ...], seen: str) -> None:
    event = EntryAppears(tmp_path, "wg0.sock")
    for name in entries:
        (tmp_path / name).touch()
    with pytest.raises(DeadlineExceeded, match=f"for the socket; seen: {seen}$"):
        wait_for(event, SHORT, "the socket")
    event.close()


def test_missing_directory_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="inotify: No such file"):
        EntryAppears(tmp_path / "no", "wg0.sock")


def test_process_exit_ends_wait(sleeper: subprocess.Popen[bytes]) -> None:
    event = Exit(sleeper.pid)
    late(sleeper.send_signal, signal.SIGKILL)
    assert wait_for(event, LONG, "its end")
    event.close()


@pytest.mark.parametrize(("log", "seen"), [("", "it wrote nothing"), ("busy", "busy")])
def test_missed_process_exit_error_shows_its_log(sleeper: subprocess.Popen[bytes], log: str, seen: str) -> None:
    event = Exit(sleeper.pid, lambda: log)
    with pytest.raises(DeadlineExceeded, match=f"for its end; seen: it still runs; {seen}$"):
        wait_for(event, SHORT, "its end")
    event.close()


def test_datagram_event_returns_first_accepted_datagram(sockets: tuple[socket.socket, socket.socket]) -> None:
    for data in (b"one", b"two", b"three"):
        sockets[0].send(data)
    assert wait_for(Datagram(sockets[1], lambda data: b"w" in data), SHORT, "two") == (b"two", sockets[0].getsockname())


@pytest.mark.parametrize(("sent", "seen"), [([], "no datagram"), ([b"1", b"2", b"3", b"4"], "b'2'; b'3'; b'4'")])
def test_missed_datagram_error_shows_last_three_others(
    sockets: tuple[socket.socket, socket.socket], sent: list[bytes], seen: str
) -> None:
    for data in sent:
        sockets[0].send(data)
    with pytest.raises(DeadlineExceeded, match=re.escape(f"for five; seen: {seen}") + "$"):
        wait_for(Datagram(sockets[1], lambda _: False), SHORT, "five")


def test_wait_for_two_events_ends_with_first_one(sleeper: subprocess.Popen[bytes], log: Path) -> None:
    says, ends = FileSays(log, "ready"), Exit(sleeper.pid)
    either = EitherOf(says, ends)
    late(log.write_text, "ready\n")
    assert wait_for(either, LONG, "it") is says
    for event in (either, says, ends):
        event.close()


def test_missed_deadline_of_two_events_shows_both(sleeper: subprocess.Popen[bytes], log: Path) -> None:
    says, ends = FileSays(log, "ready"), Exit(sleeper.pid)
    either = EitherOf(says, ends)
    with pytest.raises(DeadlineExceeded, match=r"seen: an empty log; it still runs; it wrote nothing$"):
        wait_for(either, SHORT, "it")
    for event in (either, says, ends):
        event.close()


def test_every_deadline_is_scaled(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "_scale", 1.0)
    set_timeout_scale(0.5)
    assert scaled(10) == 5
    event = FileSays(log, "ready")
    with pytest.raises(DeadlineExceeded, match=r"^waited 0\.01 s for"):
        wait_for(event, SHORT, "it")
    event.close()


def test_acceptable_state_is_returned_without_sleep(clock: Clock) -> None:
    assert poll_until(lambda: "up", lambda state: state == "up", 1.0) == "up"
    assert clock.sleeps == []


def test_state_is_polled_at_interval_until_acceptable(clock: Clock) -> None:
    states = iter(["down", "starting", "up", "down"])
    assert poll_until(lambda: next(states), lambda state: state == "up", 1.0, interval=0.25) == "up"
    assert clock.sleeps == [0.25, 0.25]


def test_last_state_is_returned_when_deadline_is_over(clock: Clock) -> None:
    assert poll_until(clock.monotonic, lambda _: False, 1.0, interval=0.5) == 101.0
    assert clock.sleeps == [0.5, 0.5]


def test_state_is_looked_at_once_when_deadline_is_zero(clock: Clock) -> None:
    assert poll_until(clock.monotonic, lambda _: False, 0.0) == 100.0
    assert clock.sleeps == []


def test_deadline_of_poll_is_scaled_and_its_interval_is_not(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "_scale", 2.0)
    assert poll_until(clock.monotonic, lambda _: False, 1.0, interval=0.5) == 102.0
    assert clock.sleeps == [0.5] * 4


def test_error_of_look_ends_poll(clock: Clock) -> None:
    def look() -> str:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        poll_until(look, lambda _: True, 1.0)
    assert clock.sleeps == []
