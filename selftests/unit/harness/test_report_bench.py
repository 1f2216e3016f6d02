"""Check that measurements of bench/run come into results.json and onto the page, with spread and ratio."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from bench.figures import Figure, Results, document
from harness.cli.report import report
from harness.errors import UsageError
from harness.report.bench import FILE, figure, read_file
from harness.report.results import Result, read_results
from harness.report.results import Results as RunResults
from selftests.support.inner_pytest import leave_outer_run
from selftests.support.results_schema import faults_of

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

outside = pytest.fixture(leave_outer_run, autouse=True)

FIGURES = (
    Figure(name="tcp1", title="TCP <b>, 1 stream", unit="Mbit/s", group="tcp1", more_is_better=True),
    Figure(name="tcp1_cpu_sender", title="CPU", unit="s", group="tcp1", is_detail=True),
    Figure(name="nat_ratio", title="lab over script", unit="", group="topology"),
)


def measured(folder: Path, **changes: Any) -> Path:
    """Write what bench/run writes after three rounds of `a` and `mine`; the third round of `a` failed."""
    results = Results()
    for number, (a, mine) in enumerate([(100.0, 50.0), (200.0, 120.0), (0.0, 90.0)], 1):
        if a:
            results.add(number, "a", {"tcp1": a, "tcp1_cpu_sender": 1.0})
        results.add(number, "mine", {"tcp1": mine})
        results.add(number, "", {"nat_ratio": 0.5})
    facts = {
        "time": 1_790_000_000,
        "interrupted": False,
        "baseline": "mine",
        "host": {"cpu": "a CPU", "cores": 2, "kernel": "6.1.0", "python": "3.11.2", "loads": [0.5]},
        "implementations": [{"name": "a", "version": "1.2"}, {"name": "mine", "version": ""}],
    }
    path = folder / FILE
    path.write_text(json.dumps(document(results, FIGURES, ["a", "mine"], facts) | changes))
    return path


def results_file(folder: Path) -> Path:
    results = RunResults(7)
    results.by_id["t.py::test", "core", ""] = Result(id="t.py::test", state="passed")
    results.complaint = "all tests of lane vm were skipped"
    results.write(folder / "results.json", ["index.html"])
    return folder / "results.json"


def test_ratio_compares_values_of_same_round_with_first_program(tmp_path: Path) -> None:
    bench = read_file(measured(tmp_path))
    first, mine, lab = bench.values
    assert (first.impl, first.median, first.least, first.most, first.rounds) == ("a", 150.0, 100.0, 200.0, 2)
    assert (first.ratio, first.ratio_least, first.ratio_most) == (None, None, None)
    assert (mine.impl, mine.median, mine.least, mine.most, mine.rounds) == ("mine", 90.0, 50.0, 120.0, 3)
    # 50 / 100 and 120 / 200; nothing is compared with 90.
    assert (mine.ratio, mine.ratio_least, mine.ratio_most) == (0.55, 0.5, 0.6)
    assert (lab.impl, lab.figure, lab.ratio) == ("", "nat_ratio", None)
    assert bench.date == "2026-09-21T14:13:20+00:00"


def test_report_command_adds_measurements_to_results_and_page(tmp_path: Path) -> None:
    results = results_file(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    bench = measured(tmp_path / "elsewhere")
    done = CliRunner().invoke(report, ["--bench", str(bench), str(results)], standalone_mode=False)
    assert done.exception is None
    assert f"report: {tmp_path / 'index.html'}" in done.output
    assert faults_of(results) == []
    assert read_results(results).bench == read_file(bench)
    page = (tmp_path / "index.html").read_text()
    assert "TCP &lt;b&gt;, 1 stream" in page
    assert "<b>90.0</b> Mbit/s" in page
    assert "50.0 to 120" in page
    assert '0.550 <span class="dim">(0.500 to 0.600)</span>' in page
    # A page that is drawn again keeps the reason why the run failed.
    assert "all tests of lane vm were skipped" in page


def test_page_without_measurements_has_no_table_of_them(tmp_path: Path) -> None:
    results = results_file(tmp_path)
    done = CliRunner().invoke(report, ["--bench", str(measured(tmp_path)), str(results)], standalone_mode=False)
    assert "Measurements</h2>" in (tmp_path / "index.html").read_text(), done.output
    document = json.loads(results.read_text()) | {"bench": None}
    results.write_text(json.dumps(document))
    from harness.report.gather import render  # noqa: PLC0415 - as the command does

    assert "Measurements</h2>" not in render([results], tmp_path).read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": []}, "no figure was measured"),
        ({"time": "now"}, "time must be an integer"),
        ({"runs": [{"figure": "tcp1", "impl": "a", "rounds": [1], "values": []}]}, "two lists of the same length"),
        ({"runs": [{"figure": "tcp1", "impl": "a", "rounds": [1], "values": ["x"]}]}, "values: want numbers"),
    ],
)
def test_malformed_measurements_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = measured(tmp_path, **changes)
    with pytest.raises(UsageError, match=f"bench {path}.*{message}"):
        read_file(path)


def test_run_adds_measurements_beside_its_results(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(lab): pass")
    place = pytester.path / "report"
    place.mkdir()
    measured(place)
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
    assert faults_of(place / "results.json") == []
    bench = read_results(place / "results.json").bench
    assert bench is not None
    assert [value.impl for value in bench.values] == ["a", "mine", ""]
    assert "Measurements</h2>" in (place / "index.html").read_text()
    # A broken file costs neither results nor page.
    (place / FILE).write_text("{")
    run = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    run.stdout.fnmatch_lines(["measurements: none: bench *: not JSON: *", "report: *index.html"])
    assert read_results(place / "results.json").bench is None


@pytest.mark.parametrize(
    ("value", "text"), [(2290.4, "2290"), (120, "120"), (90, "90.0"), (0.55, "0.550"), (0, "0"), (0.01234, "0.0123")]
)
def test_figure_has_three_digits(value: float, text: str) -> None:
    assert figure(value) == text
