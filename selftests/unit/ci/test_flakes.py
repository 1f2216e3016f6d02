"""Check the history of ci/flakes: what is counted, and which rates are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ci.flakes import History, Run, rate
from harness.errors import HarnessError

if TYPE_CHECKING:
    from pathlib import Path


def run(number: int, *failed: str, spinners: int = 0) -> Run:
    return Run(
        number=number, seed=7, spinners=spinners, status=1 if failed else 0, seconds=number, tests=10, failed=failed
    )


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History.open(tmp_path / "history", "abc")


@pytest.mark.parametrize(
    ("bad", "of", "text"),
    [
        (3, 200, "3 of 200 (1.50 %)"),
        (0, 200, "0 of 200 (below 1.50 %)"),
        (0, 1, "0 of 1 (below 100.00 %)"),
        (2, 2, "2 of 2 (100.00 %)"),
    ],
)
def test_rate_is_printed_with_upper_bound_when_zero(bad: int, of: int, text: str) -> None:
    assert rate(bad, of) == text


def test_runs_are_read_back_as_they_were_written(history: History) -> None:
    history.add(run(1))
    history.add(run(2, "a", "b", spinners=2))
    assert History.open(history.file.parent, "abc").runs == history.runs


def test_fresh_books_delete_earlier_runs_and_files(history: History) -> None:
    history.add(run(1, "a"))
    (history.file.parent / "001").mkdir()
    assert History.open(history.file.parent, "abc", fresh=True).runs == []
    assert list(history.file.parent.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"subject": "abc", "runs": [{"number": 1}]}'])
def test_malformed_books_file_is_named_in_error(history: History, text: str) -> None:
    history.file.write_text(text)
    with pytest.raises(HarnessError, match=r"flakes.json: not a results file of ci/flakes: .*; --fresh deletes it"):
        History.open(history.file.parent, "abc")


def test_summary_prints_rates_by_load_and_failures_by_test(history: History) -> None:
    for finished in (run(1), run(2, "a", "b", spinners=2), run(3), run(4, "b", spinners=2)):
        history.add(finished)
    assert history.summary().splitlines() == [
        "all        2 of 4 (50.00 %) of runs red; median 3 s",
        "quiet      0 of 2 (below 100.00 %) of runs red; median 3 s",
        "under load 2 of 2 (100.00 %) of runs red; median 4 s",
        "tests      3 of 40 (7.50 %) of executions failed",
        "    2 x b",
        "    1 x a",
    ]


def test_run_without_exit_status_is_red_when_no_test_failed() -> None:
    assert Run(number=1, seed=7, spinners=0, status=None, seconds=1200.0, tests=3).red
