"""What the watchman takes for the cry of a program that has gone wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.implementations.health import COMPLAINTS, Cries

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
def test_crash_is_heard_among_other_lines(log: Path, line: str) -> None:
    write(log, f"all is well\n{line}\nno more\n")
    expected = f"wrote: {line} no more" if line.endswith(":") else f"wrote: {line}"
    assert Cries(log, COMPLAINTS).heard() == [expected]


@pytest.mark.parametrize("line", ["do not panic: all is well", "a fatal error: not at the start", "DATA RACE"])
def test_other_lines_are_not_heard(log: Path, line: str) -> None:
    write(log, f"{line}\n")
    assert Cries(log, COMPLAINTS).heard() == []


def test_each_cry_is_told_once_however_often_one_listens(log: Path) -> None:
    cries = Cries(log, COMPLAINTS)
    write(log, "well\npanic: one\nwell\n")
    assert cries.heard() == cries.heard() == ["wrote: panic: one"]
    write(log, "well\nwell\npanic: two\n")
    assert cries.heard() == cries.heard() == ["wrote: panic: one", "wrote: panic: two"]


@pytest.mark.parametrize("cut", range(len("well\nthread 'main' panicked at x:\nno peer\nwell\nwell\n")))
def test_cry_is_heard_whole_wherever_the_log_was_cut_by_an_earlier_look(log: Path, cut: int) -> None:
    cries = Cries(log, COMPLAINTS)
    text = "well\nthread 'main' panicked at x:\nno peer\nwell\nwell\n"
    write(log, text[:cut])
    cries.heard()
    write(log, text[cut:])
    assert cries.heard() == ["wrote: thread 'main' panicked at x: no peer"]


def test_first_three_are_enough(log: Path) -> None:
    write(log, "".join(f"runtime error: {number}\npanic: {number}\n" for number in range(9)))
    assert Cries(log, COMPLAINTS).heard() == [
        "wrote: runtime error: 0", "wrote: panic: 0", "wrote: runtime error: 1",
    ]  # fmt: skip


def test_pattern_of_a_manifest_never_matches_over_the_end_of_a_line(log: Path) -> None:
    write(log, "bad\nnews\n")
    assert Cries(log, [r"bad\s+news"]).heard() == []
    write(log, "bad news\n")
    assert Cries(log, [r"bad\s+news"]).heard() == ["wrote: bad news"]


def test_bytes_that_are_no_text_are_no_hindrance(log: Path) -> None:
    log.write_bytes(b"\xff\xfe\npanic: \xff\n")
    assert Cries(log, COMPLAINTS).heard() == ["wrote: panic: �"]


def test_line_with_several_cries_is_told_once_and_hides_no_other(log: Path) -> None:
    write(log, "SIGSEGV SIGSEGV SIGSEGV SIGSEGV\nwell\nSIGSEGV again\n")
    assert Cries(log, COMPLAINTS).heard() == ["wrote: SIGSEGV SIGSEGV SIGSEGV SIGSEGV", "wrote: SIGSEGV again"]


def test_match_over_the_end_of_a_line_hides_none_that_begins_behind_it(log: Path) -> None:
    write(log, "<bad\n<news>\n")
    assert Cries(log, ["<[^>]*>"]).heard() == ["wrote: <news>"]
