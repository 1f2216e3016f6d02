"""Check the output of a run: its counts, its lines, its conclusion."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from harness import suite
from harness.cli import terminal
from harness.cli.terminal import (
    Conclusion,
    Events,
    Outcome,
    Progress,
    Tally,
    conclude,
    matrix,
    uncollected,
    usage_error,
)
from harness.report.blame import Blame, undecided
from harness.report.results import Result

GOOD = Outcome(id="selftests/netns/test_a.py::test_x[a~b]", pair="a~b")
BAD = Outcome(id="selftests/t.py::test_x[b~a]", pair="b~a", state="failed", message="why", artifacts="evidence/x")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal_that_can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose catalogues have one requirement and one bug."""
    conformance = tmp_path / "selftests" / "conformance"
    conformance.mkdir(parents=True)
    monkeypatch.setenv(suite.SUITE, str(tmp_path))
    (conformance / "requirements.toml").write_text(
        '[[requirement]]\nid = "HS-07"\ntitle = "replayed initiation is dropped"\n'
    )
    (conformance / "real-bugs.toml").write_text('[[bug]]\nid = "IB-05"\ntopic = "handshake/spoofed-response"\n')
    return tmp_path


def tally(*outcomes: Outcome) -> Tally:
    return Tally(outcomes={outcome.identity: outcome for outcome in outcomes})


def summary(*outcomes: Outcome) -> list[str]:
    stream = io.StringIO()
    terminal.summary(terminal.console(stream), tally(*outcomes), Path("/report"))
    return stream.getvalue().splitlines()


def event(**facts: object) -> bytes:
    return json.dumps(facts).encode()


def test_events_are_counted_in_tally() -> None:
    counts = Tally()
    for line in (event(event="collected", count=2), event(event="result", id="t", pair="", state="passed")):
        counts.take(line)
    assert str(counts) == "1 of 2 tests, 1 passed"


def test_differences_of_one_kind_are_counted_by_program() -> None:
    lines = summary(
        *(
            Outcome(
                id=f"oracle::CR-12[{name}~c-{number}]",
                pair=f"{name}~c",
                state="differs",
                message=f"{name} sent a timestamp with {number} ns",
            )
            for name, number in (("a", 5), ("a", 77), ("b", 6))
        )
    )
    assert {"2 differs: a sent a timestamp with 5 ns", "1 differs: b sent a timestamp with 6 ns"} <= set(lines)


def test_difference_is_printed_and_blocked_test_fails_run() -> None:
    different = Outcome(id="t.py::test_mtu[a~b]", pair="a~b", state="differs", message="1360 bytes, not 1359")
    blocked = Outcome(id="t.py::test_drop[a~b]", pair="a~b", state="blocked", message="positive control failed")
    lines = summary(different, blocked)
    assert "1 differs: 1360 bytes, not 1359" in lines
    assert {"blocked: a~b  test_drop[a~b]", "    positive control failed"} <= set(lines)
    assert conclude(1, {"differs", "blocked", "passed"}, []).status == terminal.FAILED
    unreached = Outcome(id="t.py::test_load[a~b]", pair="a~b", state="not_reached", message="no cookie reply")
    assert {"not reached: a~b  test_load[a~b]", "    no cookie reply"} <= set(summary(unreached))
    assert conclude(1, {"not_reached", "passed"}, []).status == terminal.FAILED
    assert conclude(0, {"differs", "passed"}, []).status == terminal.OK


@pytest.mark.parametrize("line", [b"", b"[]", b"{", b'{"event":"new"}', b'{"event":"result","moon":1}', b"\xff"])
def test_malformed_event_line_is_ignored(line: bytes) -> None:
    counts = Tally()
    assert counts.take(line) is None
    assert str(counts) == "0 tests"


def test_incomplete_event_line_waits_for_its_rest() -> None:
    reading, writing = os.pipe()
    events = Events(reading)
    os.write(writing, b"one\ntw")
    assert events.lines() == [b"one"]
    os.write(writing, b"o\n")
    assert events.lines() == [b"two"]
    os.close(writing)
    assert (events.lines(), events.ended) == ([], True)
    os.close(reading)


def test_tally_takes_pair_of_test_from_results() -> None:
    counts = Tally()
    a, b = {"impl": "x", "version": "1"}, {"impl": "y", "version": "1"}
    counts.replace([Result(id="t", a=a, b=b, state="failed", artifacts="e", lane="vm", kernel="6.1")])
    assert counts.outcomes["t", "vm", "6.1"].pair == "x~y"
    assert counts.outcomes["t", "vm", "6.1"].artifacts == "e"


def test_passed_result_without_end_event_is_not_counted() -> None:
    counts = tally(GOOD)
    counts.replace([Result(id=name, lane="", state="passed") for name in (GOOD.id, "interrupted")])
    assert list(counts.outcomes) == [GOOD.identity]


def test_matrix_has_first_sides_as_rows_and_second_as_columns() -> None:
    lines = summary(GOOD, BAD)
    assert [line.split("│")[1:-1] for line in lines if line.startswith("│ ")] == [
        [" a     ", "          ", " 1 passed "],
        [" b     ", " 1 failed ", "          "],
    ]


def test_implementation_alone_has_its_own_column() -> None:
    table = matrix([GOOD, Outcome(id="t[a]", pair="a")])
    assert table is not None
    assert [column.header for column in table.columns] == ["A \\ B", "b", "(alone)"]


def test_tests_without_implementation_are_counted_separately() -> None:
    assert summary(Outcome(id="t")) == ["without an implementation: 1 passed"]


def test_failure_is_printed_with_pair_test_message_and_evidence() -> None:
    assert summary(BAD)[-4:] == [
        "failed: b~a  test_x[b~a]",
        "    why",
        "    test: selftests/t.py::test_x[b~a]",
        "    evidence: /report/evidence/x",
    ]


def test_long_message_keeps_its_start_and_its_end() -> None:
    lines = summary(Outcome(id="t", state="error", message="\n".join(map(str, range(99)))))
    texts = [line.strip() for line in lines[5:-1]]
    assert texts == [*map(str, range(50)), "... 39 more lines; all are in the page", *map(str, range(89, 99))]


def test_program_to_blame_is_printed_with_difference_on_wire() -> None:
    blame = Blame(verdict="a_deviates", programs=("b",), text="b deviates: refwg~a passes", wire="message 2: nothing")
    lines = summary(BAD, replace(BAD, id="selftests/t.py::test_y[b~a]", blame=blame))
    assert "2 failed: b" in lines
    at = lines.index("    blame: b deviates: refwg~a passes")
    assert lines[at + 1] == "    on the wire: message 2: nothing"


def test_failure_that_was_not_run_again_is_printed_with_reason() -> None:
    lines = summary(replace(BAD, blame=undecided("failed", "the 300 s were over")))
    assert "    blame: not run again: the 300 s were over" in lines
    assert not any(line.startswith("    on the wire") for line in lines)


def test_progress_shows_that_tests_are_run_again() -> None:
    counted, clock, stream = tally(GOOD), iter(range(9)), io.StringIO()
    assert counted.take(b'{"event": "note", "text": "3 of 10 tests run again"}') is None
    progress = Progress(terminal.console(stream), counted, lambda: float(next(clock) * 4))
    progress.tick()
    assert "3 of 10 tests run again" in stream.getvalue()


def test_failures_are_printed_by_cause_with_their_requirements(checkout: Path) -> None:
    lost = [
        Outcome(
            id=f"t.py::test_{n:02}[bad~{peer}]", pair=f"bad~{peer}", state="failed", requirements=("HS-07", "X-1"),
            bugs=("IB-05",),
            message=f"ns1: ping ::{n}: 0 of 1 answered\nA logs {n}", artifacts=f"evidence/{n}",
        )
        for n in range(6) for peer in ("x", "y")
    ]  # fmt: skip
    other = Outcome(id="t.py::test_other[x~y]", pair="x~y", state="xpassed", message="the expectation must go")
    stream = io.StringIO()
    terminal.summary(terminal.console(stream), tally(other, *reversed(lost), GOOD), checkout / "report")
    lines = stream.getvalue().splitlines()
    assert lines[lines.index("13 failures of 2 causes") + 1 :] == [
        "    bad: 12 failures of 1 cause",
        "    x or y: 1 failure of 1 cause",
        "",
        "12 failed: bad",
        "    ns1: ping ::0: 0 of 1 answered",
        "    A logs 0",
        "    requirement: HS-07 (replayed initiation is dropped)",
        "    requirement: X-1",
        "    bug: IB-05 (handshake/spoofed-response)",
        "    test: t.py::test_00[bad~x]",
        f"    evidence: {checkout}/report/evidence/0",
        *(f"    test: {entry.id}" for entry in lost[1:10]),
        "    ... and 2 more; all are in the page",
        "",
        "xpassed: x~y  test_other[x~y]",
        "    the expectation must go",
        "    test: t.py::test_other[x~y]",
    ]


def test_cause_names_five_requirements_and_counts_others() -> None:
    ids = tuple(f"X-{n}" for n in range(7))
    lines = summary(
        Outcome(id="t.py::test_0[a]", pair="a", state="failed", message="it broke", requirements=ids, bugs=ids[:6]),
        Outcome(id="t.py::test_1[a]", pair="a", state="failed", message="it broke", requirements=ids[6:]),
    )
    shown = ["X-6", "X-0", "X-1", "X-2", "X-3", "and 2 more"]
    assert [text.strip() for text in lines if "requirement: " in text] == [f"requirement: {id_}" for id_ in shown]
    assert [text.strip() for text in lines if "bug: " in text][4:] == ["bug: X-4", "bug: and 1 more"]


def test_single_failure_names_program_that_peer_clears() -> None:
    bad = Outcome(id="t.py::test_x[a~b]", pair="a~b", state="failed", message="why")
    good = Outcome(id="t.py::test_x[a~c]", pair="a~c")
    assert "    program: b" in summary(bad, good)
    assert "    program: " not in "\n".join(summary(bad, GOOD))


def test_skips_of_one_reason_are_one_line() -> None:
    skips = [Outcome(id=name, state="skipped", message="no x; install x") for name in "ab"]
    assert summary(*skips)[-1] == "2 skipped: no x; install x"


def test_long_line_is_not_wrapped_in_pipe() -> None:
    assert summary(Outcome(id="t", state="skipped", message="x " * 400))[-1].count("x") == 400


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_pipe_gets_no_control_characters(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    text = "\n".join(summary(GOOD, BAD))
    assert [character for character in text if ord(character) < 32 and character != "\n"] == []


def test_terminal_progress_is_redrawn_in_place() -> None:
    stream = Terminal()
    counts = tally(GOOD)
    counts.total = 2
    times = iter([0.0, 1.0, 2.0, 3.0])
    with Progress(terminal.console(stream), counts, lambda: next(times)) as progress:
        progress.tick()
    assert "1 of 2 tests, 1 passed" in stream.getvalue()
    assert "\x1b[2K" in stream.getvalue()  # erases the line


def test_log_receives_progress_line_every_three_seconds() -> None:
    stream = io.StringIO()
    now = [0.0]
    with Progress(terminal.console(stream), Tally(total=9), lambda: now[0]) as progress:
        for now[0] in (1.0, 2.9, 3.0, 3.1, 6.1):
            progress.tick()
    assert stream.getvalue() == "0 of 9 tests, 3 s\n0 of 9 tests, 6 s\n"


def test_failure_is_printed_at_once() -> None:
    stream = io.StringIO()
    Progress(terminal.console(stream), Tally()).moved(BAD)
    assert stream.getvalue() == f"failed: {BAD.id}\n"


@pytest.mark.parametrize(
    ("status", "states", "output", "expected"),
    [
        (0, {"passed", "skipped"}, [], Conclusion(0)),
        (1, {"passed", "failed"}, [], Conclusion(1)),
        (2, {"error"}, [], Conclusion(1)),
        (0, {"skipped"}, [], Conclusion(125, "could not test: no test passed")),
        (1, {"passed"}, ["wg-interop: x was asked for"], Conclusion(125, "could not test: x was asked for")),
        (
            1,
            {"passed"},
            ["wg-interop: box, seed 1"],
            Conclusion(125, "could not test: pytest ended with status 1", True),
        ),
        (1, {"passed"}, ["_ ERROR collecting t.py _"], Conclusion(125, "could not test: tests could not be collected")),
        (3, set(), [], Conclusion(125, "could not test: pytest ended with status 3", True)),
        (5, set(), [], Conclusion(125, "could not test: no test was selected")),
        (-9, set(), [], Conclusion(125, "could not test: pytest ended with status -9", True)),
    ],
)
def test_run_verdict_follows_status_states_and_output(
    status: int, states: set[str], output: list[str], expected: Conclusion
) -> None:
    assert conclude(status, states, output) == expected


def test_uncollectable_file_is_named_with_its_error() -> None:
    output = ["___ ERROR collecting a/t.py ___", "a/t.py:1: in <module>", "E   NameError: x", "E   more"]
    assert uncollected(output) == {"a/t.py": "NameError: x"}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            ["ERROR: usage: pytest", "pytest: error: no such --x", "  rootdir: /"],
            "no such --x; see wg-interop run --help",
        ),
        (["ERROR: unknown implementation"], "unknown implementation; see wg-interop run --help"),
        (["odd"], "odd"),
        ([], "pytest refused the command line and printed no reason"),
    ],
)
def test_usage_error_is_taken_from_pytest_output(output: list[str], expected: str) -> None:
    assert usage_error(output) == expected


@pytest.mark.parametrize(("size", "expected"), [(0, "0 B"), (2048, "2 KiB"), (3 << 20, "3 MiB"), (5 << 30, "5.0 GiB")])
def test_size_is_printed_in_readable_unit(size: int, expected: str) -> None:
    assert terminal.human(size) == expected
