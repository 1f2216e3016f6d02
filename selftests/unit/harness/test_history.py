"""Check the history of runs: bounds, durations, order of tests, flake rates and trends."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from harness.cli import commands
from harness.report import history
from harness.report.history import Run, add, durations, longest_first, read, run_of, trends
from harness.report.results import Result
from harness.sandbox.launcher import REFUSED

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]


def runs(*outcomes: str, seconds: tuple[float, ...] = (), name: str = "netns a.py::test") -> list[Run]:
    """Runs of one test, `COMMIT STATE` each."""
    words = [outcome.split() for outcome in outcomes]
    times = seconds or (1.0,) * len(words)
    return [
        Run(date=f"2026-11-{number:02}T00:00:00", commit=commit, results={name: (state, times[number - 1])})
        for number, (commit, state) in enumerate(words, 1)
    ]


def test_run_keeps_states_durations_and_versions() -> None:
    side = {"impl": "mine", "version": "1.2"}
    results = [Result(id="a.py::test[mine]", a=side, lane="vm", state="failed", seconds=1.234), Result(id="b.py::x")]
    run = run_of(results, "2026", "")
    assert run.results == {"vm a.py::test[mine]": ("failed", 1.23)}
    assert run.tree == "mine 1.2"
    assert run_of(results, "2026", "abc").tree == "abc"


def test_file_is_bounded_in_runs_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history" / "runs.jsonl"
    monkeypatch.setattr(history, "MOST_RUNS", 3)
    for run in runs(*["a passed"] * 5):
        add(path, run)
    assert [run.date[8:10] for run in read(path)] == ["03", "04", "05"]
    monkeypatch.setattr(history, "MOST_BYTES", 1)
    add(path, runs("b failed")[0])
    assert [run.commit for run in read(path)] == ["b"]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"date": "", "commit": "", "versions": {}, "results": {"a": 1}}'])
def test_line_that_is_not_run_is_left_out(tmp_path: Path, line: str) -> None:
    add(tmp_path / "runs.jsonl", runs("a passed")[0])
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write(f"{line}\n")
    assert [run.commit for run in read(tmp_path / "runs.jsonl")] == ["a"]
    assert read(tmp_path / "none") == []


def test_duration_is_that_of_last_run() -> None:
    assert durations(runs("a passed", "b passed", seconds=(1, 7))) == {"a.py::test": 7}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [(1, ["new", "9", "5", "4", "1"]), (2, ["new", "5", "1", "9", "4"]), (9, ["new", "9", "5", "4", "1"])],
)
def test_longest_tests_begin_each_part(parts: int, expected: list[str]) -> None:
    ids = ["1", "5", "new", "9", "4"]
    order = longest_first(ids, {name: float(name) for name in ids if name != "new"}, parts=parts)
    assert [ids[index] for index in order] == expected


@pytest.mark.parametrize(
    ("outcomes", "flaky", "failed", "since"),
    [
        (("a passed", "a failed", "a passed", "a passed"), 0.25, 1, "2026-11-03 a"),
        (("a passed", "b failed", "b failed"), 0, 2, "2026-11-02 b"),
        (("a passed", "a skipped"), 0, 0, "2026-11-02 a"),
        (("a passed", "b passed"), 0, 0, "2026-11-01 a"),
    ],
)
def test_flaky_is_who_passes_and_fails_on_one_commit(
    outcomes: tuple[str, ...], flaky: float, failed: int, since: str
) -> None:
    (trend,) = trends(runs(*outcomes))
    assert (trend.flaky, trend.failed, trend.since, trend.runs) == (flaky, failed, since, len(outcomes))


def test_slower_test_is_shown_with_its_time_before() -> None:
    (trend,) = trends(runs(*["a passed"] * 8, seconds=(1, 1, 1, 3, 3, 3, 3, 3)))
    assert trend.line() == "passed since 2026-11-01 a: netns a.py::test: 0 of 8 failed; 3.0 s (before 1.0 s)"


def test_flaky_tests_come_before_failing_and_slow_ones() -> None:
    every = [
        *runs("a passed", seconds=(9,), name="netns slow"), *runs("a failed", name="netns bad"),
        *runs("a passed", "a failed", name="netns flaky"),
    ]  # fmt: skip
    assert [trend.test for trend in trends(every)] == ["netns flaky", "netns bad", "netns slow"]
    assert "2 of" not in trends(every)[0].line()
    assert ", flaky 50%" in trends(every)[0].line()


def test_command_report_shows_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in runs("a passed", "a failed"):
        add(tmp_path / "history" / "runs.jsonl", run)
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as left:
            commands.main(["report", "--history", *options, str(tmp_path / "results.json")])
        assert left.value.code == 0
        printed = capsys.readouterr().out
        if options:
            assert json.loads(printed)["trends"][0]["flaky"] == 0.5
        else:
            assert printed.startswith("2 runs, 1 tests, 1 flaky\nfailed since 2026-11-02 a: netns a.py::test: 1 of 2")


def test_workers_begin_with_longest_test_of_last_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REFUSED, "this test needs no sandbox")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", raising=False)
    pytester.makepyfile(test_it="def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass")
    known = {
        f"core test_it.py::test_{letter}": ("passed", seconds) for letter, seconds in (("a", 1), ("b", 9), ("c", 2))
    }
    path = pytester.path / "report" / "history" / "runs.jsonl"
    add(path, Run(date="2026", results=known))
    for options, order in ((["-n1"], "bca"), ([], "abc")):
        run = pytester.runpytest_subprocess("--results=report/results.json", "-v", *options)
        run.assert_outcomes(passed=3)
        begun = re.findall(r"test_it\.py::test_(\w) PASSED|PASSED test_it\.py::test_(\w)", run.stdout.str())
        assert "".join(map("".join, begun)) == order
    assert len(read(path)) == 3
