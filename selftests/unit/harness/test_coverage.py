"""Check what counts as covered, the record of outcomes, and the command that prints both."""

from __future__ import annotations

import io
import json
import os
import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from harness import suite
from harness.cli import commands
from harness.cli.coverage import show
from harness.cli.kernel_defects import read_defects
from harness.cli.mutants import read_mutants
from harness.errors import UsageError
from harness.report.citations import read_citations
from harness.report.conformance import Conformance, Entry, read_conformance
from harness.report.coverage import (
    Cell,
    Covered,
    cover,
    is_black_box,
    merge,
    read_record,
    record_of,
    record_text,
    total,
)
from harness.report.results import Invocation, Result, RunResults
from harness.wire.script import RULES

if TYPE_CHECKING:
    from harness.cli.kernel_defects import Defect
    from harness.cli.mutants import Mutant
    from harness.report.coverage import Record

ROOT: Final = Path(__file__).parents[3]
TEST: Final = "selftests/netns/test_it.py::test_it"
DAY: Final = "2026-11-30"
KNOWN: Final = read_conformance(ROOT)


def covered(kind: Any, *cells: tuple[str, str, str], seen: str = "", source: str = "") -> Covered:
    """An entry that a test cites. cells: implementation, lane, state."""
    entry = Entry(id="X-1", title="it", seen_to_fail=seen, source=source)
    return Covered(
        kind=kind, entry=entry, tests=[TEST], cells={(name, lane): Cell(state=state) for name, lane, state in cells}
    )


HERE, VM, WARP = "netns", "vm", "warp"
PASSED_HERE: Final = ("refwg", HERE, "passed")
GO_PASSED: Final = ("wireguard-go", HERE, "passed")


@pytest.mark.parametrize(
    ("cells", "seen", "missing"),
    [
        ([PASSED_HERE, GO_PASSED], "mutant x", []),
        ([("kernel", VM, "passed"), GO_PASSED], "wire drop", []),
        ([PASSED_HERE, GO_PASSED], "", ["never seen to fail"]),
        ([PASSED_HERE], "mutant x", ["passed only on refwg (netns)"]),
        ([PASSED_HERE, ("refwg", WARP, "passed")], "mutant x", ["passed only on refwg (netns, warp)"]),
        (
            [PASSED_HERE, ("kernel", VM, "not_reached"), ("wireguard-go", HERE, "xfailed")],
            "mutant x",
            ["passed only on refwg (netns)", "kernel not reached (vm), wireguard-go xfailed (netns)"],
        ),
        ([("kernel", VM, "differs")], "", ["passed nowhere", "kernel differs (vm)", "never seen to fail"]),
        ([], "", ["passed nowhere", "never seen to fail"]),
    ],
)
def test_requirement_counts_if_passed_on_two_and_seen_to_fail(
    cells: list[tuple[str, str, str]], seen: str, missing: list[str]
) -> None:
    each = covered("must", *cells, seen=seen)
    assert (each.missing, each.counts) == (missing, not missing)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([("kernel 6.1", VM, "passed"), ("kernel 6.12", VM, "passed")], (True, True)),
        ([("wireguard-go", HERE, "passed"), ("wireguard-go-debian", HERE, "passed")], (True, True)),
        ([("kernel 6.1", VM, "passed"), ("kernel 6.1", WARP, "passed")], (False, False)),
        ([("kernel 6.1", VM, "passed"), ("kernel 6.12", VM, "differs")], (False, False)),
        ([("kernel 6.1", VM, "passed"), ("kernel 6.12", VM, "passed"), PASSED_HERE], (True, False)),
    ],
)
def test_two_versions_of_one_program_count_and_are_told_apart(
    cells: list[tuple[str, str, str]], expected: tuple[bool, bool]
) -> None:
    each = covered("should", *cells)
    assert (each.has_passed, each.has_passed_on_one_program) == expected
    assert total([each], "should").passed_on_one_program == int(expected[1])


def test_record_tells_kernels_apart_by_version() -> None:
    release = "6.12.117+deb12-cloud-amd64"
    releases = ("6.1.0-57", release)
    record = record_of(run(*(result("passed", "kernel", lane=VM, kernel=name, bugs=[]) for name in releases)), DAY)
    assert {key: cell.kernel for key, cell in record.items()} == {
        ("X-1", "kernel 6.1", VM): "6.1.0-57",
        ("X-1", "kernel 6.12", VM): release,
    }


def test_kernel_with_own_module_is_not_recorded() -> None:
    own = Invocation(kernel_modules=("/src/wireguard.ko",))
    record = record_of(run(result("passed", "refwg", "kernel", bugs=[]), invocation=own), DAY)
    assert [*record] == [("X-1", "refwg", HERE)]


def test_record_without_kernel_versions_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "record.toml"
    path.write_text('[X-1]\nkernel.vm = {state = "passed", kernel = "6.1.0-57-cloud-amd64", date = "2026-11-30"}\n')
    assert [*read_record(path)] == [("X-1", "kernel 6.1", VM)]


def test_requirement_without_black_box_test_is_not_cited() -> None:
    each = Covered(kind="should", entry=Entry(id="X-1"), tests=[], cells={("refwg", HERE): Cell(state="passed")})
    assert (each.missing, each.counts) == (["not cited"], False)


@pytest.mark.parametrize(
    ("source", "cells", "missing"),
    [
        ("boringtun", [PASSED_HERE, GO_PASSED], []),
        ("boringtun 0.6", [("boringtun", HERE, "xfailed"), PASSED_HERE], []),
        ("early Linux", [("kernel", VM, "xfailed"), PASSED_HERE], []),
        ("wireguard-go 0.0.2022", [("wireguard-go-debian", HERE, "xfailed"), PASSED_HERE], []),
        # refwg is not the program that has the bug.
        ("boringtun", [("gotatun", HERE, "xfailed"), PASSED_HERE],
         ["passed only on refwg (netns)", "gotatun xfailed (netns)"]),
        ("boringtun", [("boringtun", HERE, "xfailed")], ["passed nowhere", "boringtun xfailed (netns)"]),
    ],
)  # fmt: skip
def test_bug_counts_if_it_fails_its_program_and_no_other(
    source: str, cells: list[tuple[str, str, str]], missing: list[str]
) -> None:
    each = covered("bug", *cells, source=source)
    assert (each.missing, each.counts) == (missing, not missing)


def test_bug_needs_pass_of_program_that_does_not_have_it() -> None:
    mixed = Cell(state="passed", also=("xfailed",))
    each = Covered(
        kind="bug", entry=Entry(id="IB-1", source="boringtun"), tests=[TEST], cells={("boringtun", HERE): mixed}
    )
    assert (each.failed_as_expected, each.counts) == (["boringtun"], False)


@pytest.mark.parametrize(
    ("test", "is_one"),
    [
        (TEST, True),
        ("selftests/conformance/test_it.py::test_it[refwg]", True),
        ("selftests/unit/harness/test_it.py::test_it", False),
        ("selftests/lab/test_it.py::test_it", False),
        ("tests/netns/test_it.py::test_it", False),
        ("selftests/netns", False),
        ("vm::guest[6.1]", False),
    ],
)
def test_black_box_tests_are_those_of_five_folders(test: str, is_one: bool) -> None:
    assert is_black_box(test) == is_one


# Runs and the record


def run(*results: Result, invocation: Invocation | None = None, date: str = f"{DAY}T21:04:05+00:00") -> RunResults:
    return RunResults(seed=7, host={}, results=[*results], invocation=invocation or Invocation(), date=date)


def result(state: str, *names: str, test: str = TEST, lane: str = HERE, **more: Any) -> Result:
    a, b = [*({"impl": name, "version": "1"} for name in names), None, None][:2]
    facts: dict[str, Any] = {"requirements": ["X-1"], "bugs": ["IB-1"], "kernel": "6.1"}
    return Result(id=f"{test}[{'~'.join(names)}]", a=a, b=b, lane=lane, state=state, **(facts | more))


def states(record: Record) -> dict[str, str]:
    return {
        f"{entry} {name} {lane}": "/".join([cell.state, *cell.also]) for (entry, name, lane), cell in record.items()
    }


def test_pass_counts_for_both_sides_and_every_id() -> None:
    record = record_of(run(result("passed", "refwg", "wireguard-go")), "")
    assert states(record) == {
        f"{entry} {name} netns": "passed" for entry in ("X-1", "IB-1") for name in ("refwg", "wireguard-go")
    }
    assert record["X-1", "refwg", "netns"] == Cell(state="passed", version="1", kernel="6.1", date=DAY)


def test_best_of_several_tests_counts_and_others_are_kept() -> None:
    given = enumerate(("xfailed", "passed", "failed", "passed"))
    found = [result(state, "refwg", bugs=[], test=f"{TEST}_{number}") for number, state in given]
    assert states(record_of(run(*found), "")) == {"X-1 refwg netns": "passed/xfailed/failed"}


def test_test_has_passed_if_all_its_rows_did_with_one_pair() -> None:
    rows = [
        *(result(state, "refwg", "kernel", bugs=[]) for state in ("passed", "passed")),
        *(result(state, "refwg", "boringtun", bugs=[]) for state in ("passed", "xfailed", "passed")),
        result("failed", "boringtun", requirements=[]),
    ]
    assert states(record_of(run(*rows), "")) == {
        "X-1 refwg netns": "passed/xfailed",
        "X-1 kernel 6.1 netns": "passed",
        "X-1 boringtun netns": "xfailed",
        "IB-1 boringtun netns": "failed",
    }


@pytest.mark.parametrize(
    "left_out",
    [
        run(result("skipped", "refwg")),
        run(result("unsupported", "refwg")),
        run(result("passed")),
        run(result("passed", "refwg", test="selftests/unit/test_it.py::test_it")),
        run(result("failed", "refwg+no-clamp")),
        run(result("passed", "mine"), invocation=Invocation(programs={"mine": "./wg"})),
        run(result("passed", "mine"), invocation=Invocation(manifests={"mine": "mine.toml"})),
        run(Result(id=TEST, a={"impl": "x", "version": "1", "like": "refwg"}, state="passed", requirements=["X-1"])),
    ],
)
def test_result_that_shows_nothing_of_program_is_not_recorded(left_out: RunResults) -> None:
    assert record_of(left_out, DAY) == {}


def test_day_of_old_file_is_given_by_caller() -> None:
    record = record_of(run(result("passed", "refwg"), date=""), "2025-01-02")
    assert {cell.date for cell in record.values()} == {"2025-01-02"}


@pytest.mark.parametrize(
    ("old", "new", "state"),
    [
        (("passed", "2026-11-29"), ("failed", DAY), "failed"),
        (("passed", DAY), ("failed", "2026-11-29"), "passed"),
        (("failed", DAY), ("passed", DAY), "passed/failed"),
    ],
)
def test_newer_day_replaces_older_and_same_day_is_merged(
    old: tuple[str, str], new: tuple[str, str], state: str
) -> None:
    key = ("X-1", "refwg", HERE)
    record: Record = {key: Cell(state=old[0], date=old[1])}
    merge(record, {key: Cell(state=new[0], date=new[1])})
    assert states(record) == {"X-1 refwg netns": state}


def test_record_is_sorted_and_read_back_as_written(tmp_path: Path) -> None:
    record: Record = {
        ("X-2", "kernel 6.1", WARP): Cell(state="passed", also=("failed",), kernel="6.1", date=DAY),
        ("X-1", "wireguard-go", HERE): Cell(state="passed", version='v1 "\\\n', date=DAY),
        ("X-1", "kernel", VM): Cell(state="differs", date=DAY),
    }
    path = tmp_path / "record.toml"
    path.write_text(record_text(record))
    safe = Cell(state="passed", version='v1 "\\?', date=DAY)
    assert read_record(path) == record | {("X-1", "wireguard-go", HERE): safe}
    lines = path.read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [
        "[X-1]",
        f'kernel.vm = {{state = "differs", version = "", kernel = "", date = "{DAY}"}}',
        f'wireguard-go.netns = {{state = "passed", version = "v1 \\"\\\\?", kernel = "", date = "{DAY}"}}',
        "[X-2]",
        f'"kernel 6.1".warp = {{state = "passed", also = ["failed"], version = "", kernel = "6.1", date = "{DAY}"}}',
    ]


def test_record_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_record(tmp_path / "record.toml") == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[X-1]\nrefwg.netns = 5", "X-1.refwg.netns must be a table, not 5"),
        ("[X-1]\nrefwg.netns = {date = '1'}", "X-1.refwg.netns.state is missing"),
        ("[X-1]\nrefwg.netns = {state = 'passed', date = '1', moon = 1}", "unknown key X-1.refwg.netns.moon"),
        ("[X-1]\nrefwg.netns = {state = 'good', date = '1'}", "X-1.refwg.netns.state 'good' is not one of passed, "),
    ],
)
def test_mistake_in_record_is_named_in_error(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "record.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_record(path)
    assert str(error.value).startswith(f"{path}: {complaint}")


# The whole catalogue


def test_sums_are_of_observable_requirements_and_of_bugs() -> None:
    every = cover(KNOWN, {}, {})
    tables = tomllib.loads((ROOT / "selftests/conformance/requirements.toml").read_text())["requirement"]
    levels = Counter(table["level"] for table in tables if table["observe"] != "unit")
    bugs = (ROOT / "selftests/conformance/real-bugs.toml").read_text().count("\n[[bug]]\n")
    assert {kind: total(every, kind).of for kind in ("must", "should", "bug")} == {**levels, "bug": bugs}


@pytest.mark.parametrize("name", ["requirements.toml", "real-bugs.toml"])
def test_no_key_of_entry_follows_heading_of_next_area(name: str) -> None:
    # A new entry between them would take the key.
    text = (ROOT / "selftests/conformance" / name).read_text()
    parts = re.split(r"(?m)^\[\[", text)
    assert [
        part.partition("\n#")[0].partition('"')[2][:5] for part in parts if re.search(r"\n#.*\n+[a-z_]+ = ", part)
    ] == []


def test_figures_are_kept_apart() -> None:
    conformance = Conformance(
        scenarios={},
        requirements={
            "X-1": Entry(id="X-1", level="must", observe="wire", seen_to_fail="mutant x"),
            "X-2": Entry(id="X-2", level="must", observe="config"),
            "X-3": Entry(id="X-3", level="must", observe="unit"),
            "X-4": Entry(id="X-4", level="should", observe="tunnel"),
        },
        bugs={},
    )
    record = record_of(run(result("passed", "refwg", "kernel", requirements=["X-1", "X-3"])), "")
    musts = total(cover(conformance, {"X-1": [TEST], "X-2": [TEST], "X-3": [TEST]}, record), "must")
    assert (musts.of, musts.cited, musts.passed, musts.seen_to_fail, musts.covered) == (2, 2, 1, 1, 1)


@cache
def mutants_here() -> dict[str, Mutant]:
    return {mutant.name: mutant for mutant in read_mutants(ROOT)}


@cache
def kernel_defects_here() -> dict[str, Defect]:
    return {defect.name: defect for defect in read_defects(ROOT)[1]}


def defects(kind: str) -> set[str]:
    """The names of the deliberate defects of this kind; for `wireguard-go` they are in no table."""
    match kind:
        case "mutant":
            return set(mutants_here())
        case "sabotage":
            return {path.stem for path in (ROOT / "selftests/faults/sabotage").iterdir()}
        case "wire":
            return set(RULES)
        case "kernel":
            return {f"defect {name}" for name in kernel_defects_here()}
        case _:
            return set()


SEEN: Final = {
    entry.id: entry.seen_to_fail
    for entries in (KNOWN.requirements, KNOWN.bugs)
    for entry in entries.values()
    if entry.seen_to_fail
}


@pytest.mark.parametrize("name", SEEN)
def test_seen_to_fail_names_defect_that_exists(name: str) -> None:
    kind, _, defect = SEEN[name].partition(" ")
    assert kind in {"mutant", "sabotage", "wire", "kernel", "wireguard-go"}, (
        f"{name}: want a kind and a name, not {SEEN[name]!r}"
    )
    assert defect, f"{name}: {SEEN[name]!r} names no defect"
    if kind != "wireguard-go":
        assert defect in defects(kind), f"{name}: there is no {kind} {defect}"


@cache
def cited_here() -> dict[str, set[str]]:
    return read_citations(ROOT)


@pytest.mark.parametrize("name", [name for name, seen in SEEN.items() if seen.startswith("mutant ")])
def test_seen_mutant_violates_requirement_that_its_killer_cites(name: str) -> None:
    mutant = mutants_here()[SEEN[name].removeprefix("mutant ")]
    assert name in mutant.requirements, f"mutant {mutant.name} violates {', '.join(mutant.requirements)}, not {name}"
    assert mutant.killer in cited_here()[name], f"the killer of {mutant.name} does not cite {name}"


@pytest.mark.parametrize("name", [name for name, seen in SEEN.items() if seen.startswith("kernel defect ")])
def test_seen_kernel_defect_violates_requirement_killer_cites(name: str) -> None:
    defect = kernel_defects_here()[SEEN[name].removeprefix("kernel defect ")]
    assert name in defect.requirements, f"{defect.name} violates {', '.join(defect.requirements)}, not {name}"
    assert defect.killer in cited_here()[name], f"the killer of kernel defect {defect.name} does not cite {name}"


# Citations in the sources

MODULE: Final = """
import pytest
TABLE: list[object] = [pytest.param(1, marks=pytest.mark.requirement("X-2"))]
OTHER = pytest.mark.bug("IB-1")
UNUSED = pytest.mark.requirement("X-9")
BARE: int
a, b = 1, 2

def rows():
    return [pytest.param(1, marks=OTHER), rows]

@pytest.mark.requirement("X-1", 5)
@pytest.mark.parametrize("n", TABLE)
@pytest.mark.parametrize("m", rows())
@pytest.mark.scenario("N01")
def test_one(n, m):
    pytest.mark.requirement("X-8")

class TestIt:
    @pytest.mark.bug("IB-2")
    async def test_two(self): pass

def helper(): pass
"""


def write_tests(root: Path, text: str) -> None:
    for folder in ("netns", "unit"):
        (root / "selftests" / folder).mkdir(parents=True)
        (root / "selftests" / folder / "test_it.py").write_text(text)


def test_citations_are_read_from_decorators_and_what_they_name(tmp_path: Path) -> None:
    write_tests(tmp_path, MODULE)
    two = "selftests/netns/test_it.py::test_two"
    one = two.replace("two", "one")
    assert read_citations(tmp_path) == {"X-1": {one}, "X-2": {one}, "IB-1": {one}, "IB-2": {two}}


def test_mark_of_module_is_cited_by_all_its_tests(tmp_path: Path) -> None:
    write_tests(tmp_path, f'{MODULE}\npytestmark = [pytest.mark.requirement("X-1")]\n')
    names = {test.rpartition("::")[2] for test in read_citations(tmp_path)["X-1"]}
    assert names == {"test_one", "test_two"}


# The command

CATALOGUE: Final = """
[[requirement]]
id = "X-1"
title = "first"
level = "must"
observe = "wire"
seen_to_fail = "mutant no-first"
[[requirement]]
id = "X-2"
title = "second"
level = "should"
observe = "config"
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a must, a should and a bug, a test that cites the must, and a run in which it passed."""
    write_tests(tmp_path, '@pytest.mark.requirement("X-1")\ndef test_it(): pass\n')
    folder = tmp_path / "selftests" / "conformance"
    folder.mkdir()
    (folder / "requirements.toml").write_text(CATALOGUE)
    (folder / "real-bugs.toml").write_text('[[bug]]\nid = "IB-1"\ntopic = "crash"\nimplementation = "boringtun"\n')
    sides = {key: {"impl": name, "version": "1"} for key, name in (("a", "refwg"), ("b", "kernel"))}
    rest = {"lane": "vm", "kernel": "6.1", "requirements": ["X-1"], "bugs": []}
    entry = {"id": f"{TEST}[refwg~kernel]", "state": "passed", **sides, **rest}
    (tmp_path / "report" / "vm").mkdir(parents=True)
    (tmp_path / "report" / "vm" / "results.json").write_text(json.dumps({"schema": 1, "seed": 7, "results": [entry]}))
    os.utime(tmp_path / "report" / "vm" / "results.json", (1_700_000_000, 1_700_000_000))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(suite.SUITE, str(tmp_path))
    return tmp_path


def printed(*results: Path, as_json: bool = False, everything: bool = False, record: bool = False) -> str:
    out = io.StringIO()
    assert show(results, out, as_json=as_json, everything=everything, record=record) == 0
    return out.getvalue()


def test_totals_come_first_then_what_is_missing(checkout: Path) -> None:
    assert printed().splitlines() == [
        "musts      1 of   1 covered: 1 cited, 1 passed on two implementations, 1 seen to fail",
        "shoulds    0 of   1 covered: 0 cited, 0 passed on two implementations, 0 seen to fail",
        "bugs       0 of   1 covered: 0 cited, 0 passed on two implementations",
        "",
        "shoulds not covered:",
        "  X-2    second: not cited",
        "",
        "bugs not covered:",
        "  IB-1   crash: not cited",
    ]
    assert not (checkout / "selftests/conformance/record.toml").exists()


def test_outcomes_of_each_implementation_are_listed_on_request(checkout: Path) -> None:
    lines = printed(checkout / "report/vm/results.json", everything=True).splitlines()
    table = lines[lines.index("requirement x implementation:") + 1 :]
    assert table == ["  X-1    kernel 6.1: passed (vm); refwg: passed (vm); seen to fail: mutant no-first"]


def test_recorded_run_is_remembered_without_its_results(checkout: Path) -> None:
    text = printed(record=True)
    assert text.endswith(f"record: {checkout}/selftests/conformance/record.toml, from 1 files of results\n")
    (checkout / "report/vm/results.json").unlink()
    assert "musts      1 of   1 covered" in printed()
    recorded = tomllib.loads((checkout / "selftests/conformance/record.toml").read_text())
    assert recorded["X-1"]["kernel 6.1"]["vm"] == {
        "state": "passed",
        "version": "1",
        "kernel": "6.1",
        "date": "2023-11-14",
    }


def test_json_has_uncovered_ids_and_outcomes(checkout: Path) -> None:
    found = json.loads(printed(as_json=True))
    uncovered = {key: found[key] for key in ("uncovered_must", "uncovered_should", "uncovered_bug")}
    assert uncovered == {"uncovered_must": [], "uncovered_should": ["X-2"], "uncovered_bug": ["IB-1"]}
    assert found["totals"]["must"] == {
        **dict.fromkeys(("of", "cited", "passed", "seen_to_fail", "covered"), 1),
        "passed_on_one_program": 0,
    }
    first = found["by_requirement"]["X-1"]
    assert (first["cited"], first["passed"]) == ([TEST], {"kernel 6.1": ["vm"], "refwg": ["vm"]})
    assert [outcome["implementation"] for outcome in first["outcomes"]] == ["kernel 6.1", "refwg"]
    assert found["by_bug"]["IB-1"]["missing"] == ["not cited"]
    assert checkout.is_dir()


def test_ids_that_only_results_cite_are_cited(checkout: Path) -> None:
    path = checkout / "report/vm/results.json"
    document = json.loads(path.read_text())
    document["results"][0]["bugs"] = ["IB-1"]
    document["results"].append({"id": "selftests/unit/test_it.py::test_it", "state": "passed", "requirements": ["X-2"]})
    path.write_text(json.dumps(document))
    assert json.loads(printed(as_json=True))["uncovered_bug"] == []
    assert json.loads(printed(as_json=True))["uncovered_should"] == ["X-2"]


def test_command_line_passes_its_options(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        commands.main(["coverage", "--all", "report/vm/results.json"])
    assert end.value.code == 0
    assert "requirement x implementation:" in capsys.readouterr().out
    assert checkout.is_dir()
