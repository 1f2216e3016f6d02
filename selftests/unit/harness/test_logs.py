"""Check stamps of log lines: each is the time at which its line was in the log."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from harness.sandbox import logs
from harness.sandbox.logs import read_pieces
from harness.wait import poll_until

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """An empty log that is watched."""
    path = tmp_path / "log"
    path.touch()
    logs.watch(path)
    return path


def append(log: Path, text: str) -> str:
    """Write to the log, wait until the watcher has noted it, and return the time of day then."""
    with log.open("a") as file:
        file.write(text)
    size, growth = log.stat().st_size, logs.watch(log)
    assert growth is not None
    assert poll_until(lambda: growth.size == size, bool, 10)
    return f"{datetime.now(UTC):%H:%M:%S.%f}"


def test_line_is_stamped_with_time_by_which_it_was_there(log: Path) -> None:
    start = f"{datetime.now(UTC):%H:%M:%S.%f}"
    between = append(log, "one\ntwo\nthr")
    end = append(log, "ee\n")
    one, two, three = (line.decode().split("  ") for line in (logs.stamped(log) or b"").splitlines())
    assert (one[1], two[1], three[1]) == ("one", "two", "three")
    assert start <= one[0] == two[0] <= between <= three[0] <= end


def test_line_not_yet_noticed_is_stamped_with_now(log: Path) -> None:
    with log.open("a") as file:
        file.write("late")
    assert (logs.stamped(log) or b"").endswith(b"  late")


def test_file_that_is_not_watched_has_no_stamps(log: Path) -> None:
    assert logs.stamped(log.with_name("other")) is None


def test_deleted_log_is_forgotten(log: Path) -> None:
    log.unlink()
    assert poll_until(lambda: logs.stamped(log), lambda text: text is None, 10) is None


def test_restarted_program_continues_stamps_of_its_log(log: Path) -> None:
    append(log, "one\n")
    logs.watch(log)
    append(log, "two\n")
    first, second = (logs.stamped(log) or b"").splitlines()
    assert first[:15] < second[:15]


def test_endless_log_keeps_bounded_number_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MOST", 10)
    path = tmp_path / "log"
    path.touch()
    growth = logs.Growth(path)
    begun = time.time_ns()
    for number in range(100):
        with path.open("a") as file:
            file.write(f"{number}\n")
        growth.look()
    stamps = [line[:15] for line in growth.stamped().splitlines()]
    assert len(set(stamps)) <= 10
    assert stamps == sorted(stamps)
    assert stamps[0].decode() >= f"{datetime.fromtimestamp(begun // 10**9, UTC):%H:%M:%S}"


def test_long_log_is_read_at_its_beginning_and_end(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(log, "one\ntwo\nthree\nfour\n")
    assert logs.read_log(log) == log.read_bytes()
    monkeypatch.setattr(logs, "read_pieces", lambda path: read_pieces(path, 4, 5))
    assert logs.read_log(log) == b"one\n\n[10 bytes left out]\nfour\n"
    lines = logs.timed(log)
    assert [line for _, line in lines] == ["one", "[10 bytes left out]", "four"]
    assert lines[0][0] == lines[2][0] > lines[1][0]


def test_last_lines_are_those_of_end_of_log(log: Path) -> None:
    log.write_text("x" * 70_000 + "\none\ntwo\n")
    assert logs.last_lines(log, 2) == ["one", "two"]
    assert len(logs.last_lines(log, 9)[0]) < 1 << 16
