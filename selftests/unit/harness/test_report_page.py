"""Check what the report's page shows of results: verdict, causes, tables, names of tests."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import pytest

from harness.errors import UsageError
from harness.report.gather import gather, render, sort_names
from harness.report.gather import read_run as read
from harness.report.page import seconds, tone
from harness.report.results import GATING, STATES
from selftests.support.report_page import entry, page_of, tags, write

if TYPE_CHECKING:
    from pathlib import Path


# The verdict and the colours


@pytest.mark.parametrize(
    ("states", "complaint", "headline"),
    [
        (["passed", "passed"], "", ("good", "2 passed")),
        (["passed", "xfailed", "skipped", "unsupported", "differs"], "", ("good", "1 passed")),
        (["passed", "failed", "error", "failed"], "", ("bad", "2 failed, 1 error")),
        (["passed", "xpassed"], "", ("bad", "1 xpassed")),
        (["passed", "flaky"], "", ("bad", "1 flaky")),
        (["passed", "blocked"], "", ("bad", "1 blocked")),
        (["passed", "not_reached"], "", ("bad", "1 not reached")),
        (["skipped", "xfailed"], "", ("bad", "no test passed")),
        ([], "", ("bad", "no test passed")),
        (["passed"], "lane vm was asked for and did not run", ("bad", "lane vm was asked for and did not run")),
    ],
)
def test_verdict_is_good_when_tests_passed_and_none_failed(
    tmp_path: Path, states: list[str], complaint: str, headline: tuple[str, str]
) -> None:
    entries = [entry(f"test_it.py::test_{number}", state=state) for number, state in enumerate(states)]
    assert page_of(tmp_path, *entries, complaint=complaint).headline == headline


@pytest.mark.parametrize(
    ("states", "colour"),
    [
        ({"passed"}, "good"),
        ({"passed", "skipped", "unsupported"}, "good"),
        ({"passed", "xfailed"}, "mixed"),
        ({"passed", "differs"}, "mixed"),
        ({"xfailed", "skipped"}, "known"),
        ({"skipped", "unsupported"}, "none"),
        (set(), "none"),
        ({"passed", "of a later version"}, "bad"),
    ],
)
def test_cell_colour_follows_its_worst_state(states: set[str], colour: str) -> None:
    assert tone(states) == colour


@pytest.mark.parametrize("state", STATES)
def test_cell_is_red_exactly_when_it_holds_failing_state(state: str) -> None:
    assert (tone({state, "passed", "xfailed"}) == "bad") == (state in GATING | {"flaky", "blocked"})


def test_failures_come_first(tmp_path: Path) -> None:
    page = page_of(tmp_path, *(entry(f"test_it.py::test_{state}", state=state) for state in reversed(STATES)))
    assert [test.state for test in page.tests][:3] == ["failed", "error", "xpassed"]
    assert [state for state, _ in page.counts][-2:] == ["unsupported", "skipped"]


@pytest.mark.parametrize("message", ["x" * 900 + " the clue", "first\n" + "line\n" * 5000 + "the clue"])
@pytest.mark.parametrize("state", ["failed", "blocked", "xfailed", "differs"])
def test_message_stands_in_page_whole(tmp_path: Path, message: str, state: str) -> None:
    text = tags(render([write(tmp_path, entry(state=state, message=message))], tmp_path)).text
    assert message in text


def test_failures_are_grouped_by_cause(tmp_path: Path) -> None:
    lost: dict[str, Any] = {"state": "failed", "requirements": ["RT-03"]}
    page = page_of(
        tmp_path,
        *(entry(f"t.py::test_{n}", b=peer, message=f"{n} lost\nlog", **lost) for n in range(4) for peer in "yz"),
        entry("t.py::test_0", a="z", state="error", message="no handshake"),
        entry("t.py::test_0", b="z", a="z", message="5 lost", state="xfailed"),
    )
    assert [(cause.blame, cause.counts) for cause in page.causes] == [
        ("x", [("failed", 8)]),
        ("y or z", [("error", 1)]),
    ]
    assert page.causes[0].requirements == ["RT-03"]
    assert page.tally == ["9 failures of 2 causes", "x: 8 failures of 1 cause", "y or z: 1 failure of 1 cause"]


def test_each_cause_leads_to_all_its_tests(tmp_path: Path) -> None:
    entries = [entry(f"t.py::test_{n}", state="failed", message=f"{n} lost") for n in range(30)]
    found = tags(render([write(tmp_path, *entries)], tmp_path))
    assert "30 failures of 1 cause" in found.text
    # Ten of them are linked as the slowest, too.
    assert len({link for link in found.links if link.startswith("#t-")}) == 30


def test_cause_names_five_requirements_and_unfolds_others(tmp_path: Path) -> None:
    ids = [f"X-{n}" for n in range(7)]
    text = render([write(tmp_path, entry(state="failed", message="lost", requirements=ids))], tmp_path).read_text()
    (summary,) = [found for found in re.findall("<summary>(.*?)</summary>", text) if "and 2 more" in found]
    assert re.findall(r"X-\d", summary) == ids[:5]
    assert "X-6" in text


# Cells


def test_every_pair_has_cell_in_matrix_of_its_lane_and_kernel(tmp_path: Path) -> None:
    page = page_of(
        tmp_path, entry(), entry(a="y", b="x", state="failed"), entry(lane="vm"), entry(lane="vm", kernel="6.12")
    )
    assert {(group.lane, group.kernel): [*group.matrix] for group in page.groups} == {
        ("netns", "6.1"): [("x", "y"), ("y", "x")], ("vm", "6.1"): [("x", "y")], ("vm", "6.12"): [("x", "y")],
    }  # fmt: skip
    assert [cell.tone for cell in page.groups[0].matrix.values()] == ["good", "bad"]


def test_page_names_test_on_which_lanes_disagree(tmp_path: Path) -> None:
    here, there = entry(lane="netns", kernel="6.18"), entry(lane="vm", kernel="6.1", state="failed")
    out = render([write(tmp_path, here, there)], tmp_path)
    assert "passes in netns, Linux 6.18, and fails in vm, Linux 6.1" in tags(out).text
    out = render([write(tmp_path, here)], tmp_path)
    assert "Where lanes and kernels disagree" not in tags(out).text


def test_cell_counts_its_tests_by_state(tmp_path: Path) -> None:
    states = ["passed", "failed", "passed", "skipped"]
    page = page_of(tmp_path, *(entry(f"test_it.py::test_{n}", state=state) for n, state in enumerate(states)))
    assert page.groups[0].matrix["x", "y"].counts == [("failed", 1), ("passed", 2), ("skipped", 1)]


def test_tests_of_one_implementation_are_table_rows(tmp_path: Path) -> None:
    page = page_of(tmp_path, entry(b=""), entry(a="kernel", b="", state="failed"), entry("test_it.py::test_key", b=""))
    (group,) = page.groups
    rows = [(row.title, row.id, [tone for tone, _, _ in row.marks]) for row in group.configuration]
    assert rows == [("key", "v4", ["none", "good"]), ("ping", "v4", ["bad", "good"])]


def test_tests_without_implementation_are_listed_by_file(tmp_path: Path) -> None:
    page = page_of(tmp_path, entry("a.py::test_x", a="", b=""), entry("b.py::test_y", a="", b=""))
    assert [panel.title for panel in page.groups[0].others] == ["a.py", "b.py"]


def test_two_versions_of_program_have_separate_cells(tmp_path: Path) -> None:
    page = page_of(tmp_path, entry(b="z"), entry(b="z", a="x") | {"a": {"impl": "x", "version": "2"}})
    assert [*page.groups[0].matrix] == [("x 1", "z"), ("x 2", "z")]


def test_implementations_are_sorted_in_fixed_order() -> None:
    names = ["mine", "gotatun", "refwg+no-clamp", "wireguard-go", "refwg", "kernel"]
    assert sort_names(names) == ["kernel", "refwg", "refwg+no-clamp", "wireguard-go", "gotatun", "mine"]


# Names of tests, and commands to run them again


@pytest.mark.parametrize(("value", "text"), [(0.004, "0.00 s"), (1.25, "1.2 s"), (59.9, "59.9 s"), (61, "1 min 1 s")])
def test_duration_is_printed_in_short_form(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a/test_it.py::test_ping_is_answered[x~y]", ("a/test_it.py", "ping is answered", "")),
        ("test_it.py::test_ping[x~y-A-to-B-v4]", ("test_it.py", "ping", "A-to-B-v4")),
        ("test_it.py::TestIt::test_ping[x~y-fd00::1]", ("test_it.py::TestIt", "ping", "fd00::1")),
        ("test_it.py::test_ping", ("test_it.py", "ping", "")),
    ],
)
def test_name_of_test_is_shown_as_sentence(tmp_path: Path, name: str, shown: tuple[str, str, str]) -> None:
    (test,) = page_of(tmp_path, entry() | {"id": name}).tests
    assert (test.file, test.sentence, test.rest) == shown


@pytest.mark.parametrize(
    ("more", "command"),
    [
        ({}, "pytest 'test_it.py::test_ping[x~y-v4]' --pair 'x~y' --seed 7"),
        ({"lane": "vm", "b": None}, "pytest 'test_it.py::test_ping[x~y-v4]' --lane vm --impl x --seed 7"),
        ({"id": "vm::guest[6.1]", "lane": "vm"}, ""),
    ],
)
def test_command_to_run_test_again_is_shown(tmp_path: Path, more: dict[str, Any], command: str) -> None:
    (test,) = page_of(tmp_path, entry() | more).tests
    assert test.again == command


def test_result_of_oracle_blames_sender_and_is_no_test(tmp_path: Path) -> None:
    (test,) = page_of(tmp_path, entry(state="failed") | {"id": "oracle::DT-01[x~y-b]"}).tests
    assert (test.sentence, test.names, test.again) == ("DT-01", ["y"], "")
    (cause,) = page_of(tmp_path, entry(state="failed", message="y sent it") | {"id": "oracle::DT-01[x~y-b]"}).causes
    assert cause.blame == "y"


CHECKOUT: Final = {"root": "/my lab", "config_file": "/my lab/pyproject.toml", "results": "/my lab/report/results.json"}


@pytest.mark.parametrize(
    ("run", "more", "options"),
    [
        ({"programs": {"x": "/x", "z": "/z"}}, {}, "--impl x=/x --pair 'x~y' --seed 7"),
        ({"programs": {"x": "/x"}}, {"b": None}, "--impl x=/x --seed 7"),
        ({"manifests": {"y": "/y.toml", "z": "/z.toml"}}, {}, "--impl-manifest /y.toml --pair 'x~y' --seed 7"),
        (
            {"manifests": {"y": "/y.toml"}, "programs": {"y": "/y"}},
            {"a": None, "b": {"impl": "y+fast", "version": "1"}},
            "--impl-manifest /y.toml --impl y=/y --pair y+fast --seed 7",
        ),
        (
            {"programs": {"x": "/x"}},
            {"a": {"impl": "x", "version": "1", "like": "refwg"}},
            "--impl x=/x --like x=refwg --pair 'x~y' --seed 7",
        ),
        ({"kernels": {"6.1": "/src/linux"}}, {"lane": "vm"}, "--lane vm --kernel /src/linux --pair 'x~y' --seed 7"),
        ({"kernels": {"6.12": "6.12"}}, {"lane": "vm"}, "--lane vm --pair 'x~y' --seed 7"),
        ({"timeout_scale": 2.5, "keep": "all"}, {}, "--pair 'x~y' --seed 7 --timeout-scale 2.5 --keep all"),
        ({"nightly": True}, {}, "--pair 'x~y' --seed 7 --nightly"),
        ({"config_file": ""}, {}, "--rootdir=. --pair 'x~y' --seed 7"),
        ({"config_file": "/etc/x.ini"}, {}, "-c /etc/x.ini --rootdir=. --pair 'x~y' --seed 7"),
    ],
)
def test_command_to_run_test_again_names_its_options(
    tmp_path: Path, run: dict[str, Any], more: dict[str, Any], options: str
) -> None:
    path = write(tmp_path, entry() | more)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": CHECKOUT | run}))
    (test,) = gather([read(path)], tmp_path, None).tests
    start, end = "cd '/my lab' && pytest 'test_it.py::test_ping[x~y-v4]' ", " --results report/again/results.json"
    assert test.again == f"{start}{options}{end}"


def test_command_to_run_test_of_installed_suite_again(tmp_path: Path) -> None:
    path = write(tmp_path, entry())
    run = {"root": "/site", "config_file": "/site/selftests/pytest.toml", "results": "/home/me/report/results.json"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": run}))
    (test,) = gather([read(path)], tmp_path, None).tests
    options = "--pair 'x~y' --seed 7 --results /home/me/report/again/results.json"
    assert test.again == f"wg-interop run 'test_it.py::test_ping[x~y-v4]' {options}"


@pytest.mark.parametrize(
    ("results", "again"),
    [
        ("/my lab/report/again/results.json", "report/again/results.json"),
        ("/tmp/mine.json", "/tmp/again/mine.json"),  # noqa: S108 - a name, no file
    ],
)
def test_report_of_test_run_again_goes_beside_its_page(tmp_path: Path, results: str, again: str) -> None:
    path = write(tmp_path, entry())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": CHECKOUT | {"results": results}}))
    (test,) = gather([read(path)], tmp_path, None).tests
    assert test.again.endswith(f" --results {again}")


# Several files


def test_several_result_files_are_merged_into_one_page(tmp_path: Path) -> None:
    first = write(tmp_path / "1", entry(), entry(lane="vm", state="failed"), seed=1)
    second = write(tmp_path / "2", entry(lane="vm"), seed=2)
    page = gather([read(first), read(second)], tmp_path, None)
    assert sorted((test.result.lane, test.state) for test in page.tests) == [("netns", "passed"), ("vm", "passed")]
    assert [run.seed for run in page.runs] == [1, 2]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "seed": 1, "host": {}, "results": [{"id": 5}]}', "\udcff"],
)
def test_file_without_results_is_named_in_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"results\.json: "):
        render([path], tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        render([tmp_path / "absent.json"], tmp_path)
