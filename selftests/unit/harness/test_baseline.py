"""Check the baseline: which failures are known, which entries are gone, and the file."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import UsageError
from harness.report.baseline import (
    Baseline,
    Comparison,
    Failure,
    baseline_text,
    failure_of,
    read_baseline,
    read_comparison,
)
from harness.report.causes import essence, fingerprint
from harness.report.results import GATING, read_results
from harness.sandbox.launcher import REFUSED
from harness.tables import Table

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

KNOWN = Failure(id="test_x.py::test_it[mine~other]", a="mine", b="other", lane="netns", message="counter is 7, not 8")


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, True),
        ({"message": "counter is 12, not 8"}, True),
        ({"note": "reported"}, True),
        ({"message": "no answer"}, False),
        ({"state": "error"}, False),
        ({"lane": "vm"}, False),
        ({"b": "third"}, False),
        ({"id": "test_x.py::test_other[mine~other]"}, False),
    ],
)
def test_entry_knows_test_pair_lane_state_and_message(changes: dict[str, str], known: bool) -> None:
    baseline = Baseline([KNOWN])
    assert baseline.forgives(replace(KNOWN, **changes)) is known
    found = baseline.compare("known.toml")
    assert (found.known, found.new) == (int(known), int(not known))


@pytest.mark.parametrize(
    ("state", "gone", "untested"),
    [
        ("passed", 1, 0),
        ("differs", 1, 0),
        ("failed", 1, 0),
        ("skipped", 0, 1),
        ("unsupported", 0, 1),
        ("", 0, 1),
    ],
)
def test_entry_is_gone_only_if_its_test_ran(state: str, gone: int, untested: int) -> None:
    baseline = Baseline([KNOWN])
    baseline.end(KNOWN, state)
    found = baseline.compare("known.toml")
    assert (len(found.gone), found.untested, found.known) == (gone, untested, 0)
    assert len(baseline.entries()) == untested


def test_update_adds_new_removes_gone_and_keeps_untested() -> None:
    gone, untested = replace(KNOWN, id="b"), replace(KNOWN, id="c")
    baseline = Baseline([replace(KNOWN, note="theirs"), gone, untested], update=True)
    new = replace(KNOWN, id="d")
    assert baseline.forgives(new)
    # On another kernel the same test fails in the same way: one entry.
    assert baseline.forgives(replace(new, message="counter is 9, not 8"))
    assert baseline.forgives(replace(KNOWN, message="counter is 9, not 8"))
    for ended, state in ((KNOWN, "xfailed"), (new, "xfailed"), (gone, "passed"), (untested, "skipped")):
        baseline.end(ended, state)
    assert baseline.entries() == [untested, new, replace(KNOWN, note="theirs")]
    assert baseline.compare("k", updated=True).lines() == [
        "baseline k is written: 1 added, 1 removed, 2 kept",
        "removed, because it no longer fails: b",
    ]


@pytest.mark.parametrize(
    ("known", "gone", "untested", "lines"),
    [
        (1, (), 0, ["baseline k: 1 known failure, 0 new"]),
        (2, (), 3, ["baseline k: 2 known failures, 0 new, 3 not tested"]),
        (
            0,
            ("a",),
            0,
            [
                "baseline k: 0 known failures, 0 new, 1 no longer fails (--update-baseline removes)",
                "no longer fails: a",
            ],
        ),
    ],
)
def test_comparison_is_told_in_lines(known: int, gone: tuple[str, ...], untested: int, lines: list[str]) -> None:
    assert Comparison(file="k", known=known, new=0, gone=gone, untested=untested).lines() == lines


def test_comparison_names_ten_gone_entries() -> None:
    lines = Comparison(file="k", known=0, new=0, gone=tuple(map(str, range(12))), untested=0).lines()
    assert (len(lines), lines[-1]) == (12, "... and 2 more")


def test_written_baseline_is_read_as_it_was(tmp_path: Path) -> None:
    entries = [
        KNOWN,
        Failure(id="t", state="error", message='"quoted" \\ \x7f\x01 \u2028 \t', note="a\nb"),
        Failure(id="u", message=""),
    ]
    path = tmp_path / "known.toml"
    path.write_text(baseline_text(entries))
    assert read_baseline(path, GATING) == entries
    # One key a line, so that a diff shows what has changed.
    assert 'test = "test_x.py::test_it[mine~other]"\na = "mine"\nb = "other"\nlane = "netns"\n' in path.read_text()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, r"baseline .*known.toml: there is no such file; to write it from this run, add --update-baseline"),
        ('[[failure]]\ntest = "t"', "failure 1: message is missing"),
        ('[[failure]]\ntest = "t"\nmessage = ""\nwhy = ""', "failure 1: unknown key why"),
        ('[[failure]]\ntest = "t"\nmessage = ""\nstate = "passed"', "failure 1: state is one of blocked, .*'passed'"),
        ("[[failures]]", "unknown key failures"),
    ],
)
def test_mistake_in_baseline_is_named(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "known.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=complaint):
        read_baseline(path, GATING)


def test_failure_takes_its_facts_from_report() -> None:
    facts: dict[str, object] = {"a": {"impl": "mine"}, "b": None, "lane": "warp"}
    made = failure_of(facts, nodeid="t", state="error", message="no \ud800; seen: 12 packets\nmore")
    assert made == Failure(id="t", a="mine", lane="warp", state="error", message="no ?")
    assert (made.pair, made.bugs, made.blamed) == ("mine", (), None)


@pytest.mark.parametrize(
    ("message", "lines"),
    [
        ("no answer; seen: 7 packets\nmore", "no answer"),
        (
            "assert 0 == 8128\n  where 0 = PeerState(x=1).rx_bytes\n  other",
            "assert 0 == 8128\nwhere 0 = PeerState(x=1).rx_bytes",
        ),
        ("; seen: nothing", ""),
        (
            "mine padded to 15 (a~b 7); in 3 tests, first in selftests/netns/test_x.py::test_it[a~b]",
            "mine padded to 15 (a~b 7)",
        ),
    ],
)
def test_essence_has_fingerprint_of_whole_message(message: str, lines: str) -> None:
    assert essence(message) == lines
    assert fingerprint(replace(KNOWN, message=lines)) == fingerprint(replace(KNOWN, message=message))


def test_entry_of_baseline_blames_nobody() -> None:
    assert (KNOWN.blamed, KNOWN.is_inferred, KNOWN.requirements, KNOWN.bugs) == (None, False, (), ())


def test_comparison_is_read_from_results() -> None:
    values = {"file": "k", "known": 1, "new": 2, "gone": ["a"], "untested": 3, "updated": True}
    assert read_comparison(Table("r", values)) == Comparison(
        file="k", known=1, new=2, gone=("a",), untested=3, updated=True
    )
    assert read_comparison(Table("r", {})) is None


# In a run


TESTS = """
import pytest
@pytest.fixture
def broken(): raise OSError("no way")
@pytest.fixture
def not_undone():
    yield
    raise OSError("undo")
def test_good(): pass
def test_bad(): assert "moon" == "{text}"
def test_broken(broken): pass
def test_not_undone(not_undone): pass
@pytest.mark.xfail(strict=True)
def test_mended(): pass
@pytest.mark.skip(reason="no x")
def test_skipped(): assert 0
"""


def run(pytester: pytest.Pytester, *options: str, text: str = "cheese") -> tuple[pytest.RunResult, dict[str, Any]]:
    """Run the tests with a baseline; returns the run and its results."""
    pytester.makepyfile(test_few=TESTS.format(text=text))
    result = pytester.runpytest_subprocess("--results=results.json", "--baseline=known.toml", *options)
    path = pytester.path / "results.json"
    return result, json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(autouse=True)
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFUSED, "unit tests need no sandbox")


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_run_fails_only_for_new_failure(pytester: pytest.Pytester, workers: list[str]) -> None:
    first, results = run(pytester, "--update-baseline", *workers)
    assert first.ret == pytest.ExitCode.OK
    first.stdout.fnmatch_lines("baseline known.toml is written: 4 added, 0 removed, 0 kept")
    states = {entry["id"].rpartition("::")[2]: (entry["state"], entry["baseline"]) for entry in results["results"]}
    assert states == {
        "test_good": ("passed", ""),
        "test_bad": ("xfailed", "failed"),
        "test_broken": ("xfailed", "error"),
        "test_not_undone": ("xfailed", "error"),
        "test_mended": ("xfailed", "xpassed"),
        "test_skipped": ("skipped", ""),
    }
    known = (pytester.path / "known.toml").read_text()
    again, results = run(pytester, *workers, "--junit-xml=junit.xml")
    assert again.ret == pytest.ExitCode.OK
    again.assert_outcomes(passed=2, xfailed=4, skipped=1)
    assert results["baseline"] == {
        "file": "known.toml", "known": 4, "new": 0, "gone": [], "untested": 0, "updated": False,
    }  # fmt: skip
    assert "lists it as xpassed" in (pytester.path / "index.html").read_text()
    changed, results = run(pytester, *workers, text="soup")
    assert changed.ret == pytest.ExitCode.TESTS_FAILED
    changed.assert_outcomes(passed=2, failed=1, xfailed=3, skipped=1)
    mended, _ = run(pytester, *workers, text="moon")
    assert mended.ret == pytest.ExitCode.OK
    mended.stdout.fnmatch_lines("no longer fails: test_few.py::test_bad")
    # Only --update-baseline writes the file.
    assert (pytester.path / "known.toml").read_text() == known
    run(pytester, "--update-baseline", "-k", "bad or good", text="moon")
    left = tomllib.loads((pytester.path / "known.toml").read_text())["failure"]
    assert [entry["test"].rpartition("::")[2] for entry in left] == ["test_broken", "test_mended", "test_not_undone"]


@pytest.mark.parametrize("options", [["-k", "bad"], ["-k", "moon"], ["--must-include=refwg"]])
def test_baseline_is_not_written_after_run_that_shows_nothing(pytester: pytest.Pytester, options: list[str]) -> None:
    result, _ = run(pytester, "--update-baseline", *options)
    assert result.ret != pytest.ExitCode.OK
    assert not (pytester.path / "known.toml").exists()
    result.stdout.fnmatch_lines("baseline known.toml is not written: *")


def test_mistake_in_baseline_is_usage_error(pytester: pytest.Pytester) -> None:
    result, _ = run(pytester)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("ERROR: baseline */known.toml: there is no such file; *")
    alone = pytester.runpytest_subprocess("--update-baseline")
    alone.stderr.fnmatch_lines("ERROR: --update-baseline: which file? add --baseline FILE")


@pytest.mark.parametrize(
    ("body", "name", "expected"),
    [
        ("pass", "mine", ""),
        ("pass", "refwg", "wg-interop: --must-include refwg: no test of refwg ran"),
        (
            "pytest.skip('no x')",
            "mine",
            "wg-interop: --must-include mine: none of 1 tests of mine passed; skipped: no x",
        ),
        ("assert 'a' == 'b'", "mine", "wg-interop: --must-include mine: none of 1 tests of mine passed; failed: *"),
        ("pytest.skip(allow_module_level=True)", "moon", "ERROR: unknown implementation 'moon'; there are: *"),
    ],
)
def test_must_include_demands_passed_test(pytester: pytest.Pytester, body: str, name: str, expected: str) -> None:
    program = pytester.makefile("", program="#!/bin/sh\necho v1.5\n")
    program.chmod(0o755)
    pytester.makepyfile(f"import pytest\ndef test_impl(implementation): {body}\ndef test_good(): pass")
    result = pytester.runpytest_subprocess(f"--impl=mine={program}", f"--must-include={name}", "--results=r.json")
    assert (result.ret == pytest.ExitCode.OK) is not bool(expected)
    if name != "moon":
        assert result.ret in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}
    lines = result.stdout if name != "moon" else result.stderr
    if expected:
        lines.fnmatch_lines(expected)


def test_results_file_has_comparison(pytester: pytest.Pytester) -> None:
    run(pytester, "--update-baseline")
    contents = read_results(pytester.path / "results.json")
    assert contents.comparison == Comparison(file="known.toml", known=0, new=4, gone=(), untested=0, updated=True)
    assert {result.baseline for result in contents.results} == {"", "failed", "error", "xpassed"}
