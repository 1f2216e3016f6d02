"""Check which lines of a log the health check reports as crashes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.implementations import health
from harness.implementations.health import CRASH_PATTERNS, CrashReports

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").touch()
    return tmp_path / "log"


def write(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


@pytest.mark.parametrize(
    "line",
    [
        "panic: oops",
        "fatal error: concurrent map writes",
        "WARNING: DATA RACE",
        "thread 'main' panicked at x",
        "thread '<unnamed>' (7) panicked at x",
        "fatal runtime error: stack overflow",
        "memory allocation of 9 bytes failed",
        "==9==ERROR: AddressSanitizer: heap",
        "x.c:1:2: runtime error: shift",
        "Traceback (most recent call last):",
        "Segmentation fault (core dumped)",
        "[signal SIGSEGV: segmentation violation]",
    ],
)
def test_crash_message_is_reported_among_other_lines(log: Path, line: str) -> None:
    write(log, f"all is well\n{line}\nno more\n")
    expected = f"wrote: {line} no more" if line.endswith(":") else f"wrote: {line}"
    assert CrashReports(log, CRASH_PATTERNS).lines() == [expected]


@pytest.mark.parametrize("line", ["do not panic: all is well", "a fatal error: not at the start", "DATA RACE"])
def test_ordinary_log_line_is_not_reported(log: Path, line: str) -> None:
    write(log, f"{line}\n")
    assert CrashReports(log, CRASH_PATTERNS).lines() == []


def test_crash_message_is_listed_once_after_repeated_checks(log: Path) -> None:
    crashes = CrashReports(log, CRASH_PATTERNS)
    write(log, "well\npanic: one\nwell\n")
    assert crashes.lines() == crashes.lines() == ["wrote: panic: one"]
    write(log, "well\nwell\npanic: two\n")
    assert crashes.lines() == crashes.lines() == ["wrote: panic: one", "wrote: panic: two"]


@pytest.mark.parametrize("cut", range(len("well\nthread 'main' panicked at x:\nno peer\nwell\nwell\n")))
def test_crash_message_is_complete_when_log_is_read_in_parts(log: Path, cut: int) -> None:
    crashes = CrashReports(log, CRASH_PATTERNS)
    text = "well\nthread 'main' panicked at x:\nno peer\nwell\nwell\n"
    write(log, text[:cut])
    crashes.lines()
    write(log, text[cut:])
    assert crashes.lines() == ["wrote: thread 'main' panicked at x: no peer"]


@pytest.mark.parametrize("piece", [20, 64, 71])
def test_crash_message_is_found_in_log_that_is_read_by_pieces(
    log: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(health, "_PIECE", piece)
    write(log, f"{'x' * 100}\nwell\nwell\n" + "panic: one\n" + "y" * 100 + "\nSIGSEGV\nwell\n")
    assert CrashReports(log, CRASH_PATTERNS).lines() == ["wrote: panic: one", "wrote: SIGSEGV"]


def test_first_three_crash_messages_are_reported(log: Path) -> None:
    write(log, "".join(f"runtime error: {number}\npanic: {number}\n" for number in range(9)))
    assert CrashReports(log, CRASH_PATTERNS).lines() == [
        "wrote: runtime error: 0", "wrote: panic: 0", "wrote: runtime error: 1",
    ]  # fmt: skip


def test_manifest_pattern_does_not_match_across_lines(log: Path) -> None:
    write(log, "bad\nnews\n")
    assert CrashReports(log, [r"bad\s+news"]).lines() == []
    write(log, "bad news\n")
    assert CrashReports(log, [r"bad\s+news"]).lines() == ["wrote: bad news"]


def test_crash_message_is_found_in_log_with_invalid_utf8(log: Path) -> None:
    log.write_bytes(b"\xff\xfe\npanic: \xff\n")
    assert CrashReports(log, CRASH_PATTERNS).lines() == ["wrote: panic: �"]


def test_line_with_several_matches_counts_as_one_message(log: Path) -> None:
    write(log, "SIGSEGV SIGSEGV SIGSEGV SIGSEGV\nwell\nSIGSEGV again\n")
    assert CrashReports(log, CRASH_PATTERNS).lines() == [
        "wrote: SIGSEGV SIGSEGV SIGSEGV SIGSEGV",
        "wrote: SIGSEGV again",
    ]


def test_match_across_lines_does_not_hide_match_on_next_line(log: Path) -> None:
    write(log, "<bad\n<news>\n")
    assert CrashReports(log, ["<[^>]*>"]).lines() == ["wrote: <news>"]
