"""Check how `wg-interop mutants` chooses mutants and judges what their killers did."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from harness.cli import mutants
from harness.cli.mutants import Mutant, choose, judge, read_mutants
from harness.errors import UsageError
from harness.report.results import Result

if TYPE_CHECKING:
    from pathlib import Path

ROW = """
[[mutant]]
name = "{name}"
requirements = ["DT-03"]
module = "refwg.counter"
text = "a"
replacement = "b"
killer = "test_x.py::test_y"
role = "{role}"
"""
DEAF, WHOLE = "refwg+deaf", "refwg"


def a_mutant(name: str = "deaf", area: str = "data", role: str = "a") -> Mutant:
    return Mutant(
        name=name, area=area, requirements=("DT-03", "DT-04"), killer="test_x.py::test_y", role=role, lane="netns"
    )


def result(a: str, state: str, *, cites: tuple[str, ...] = (), message: str = "") -> Result:
    sides = [{"impl": name, "version": "1"} for name in (a, "wireguard-go")]
    entry = Result(id="test_x.py::test_y", state=state, requirements=list(cites), message=message)
    entry.a, entry.b = sides
    return entry


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with two tables."""
    folder = tmp_path / mutants.FOLDER
    folder.mkdir(parents=True)
    (folder / "data.toml").write_text(ROW.format(name="deaf", role="a") + ROW.format(name="dumb", role="alone"))
    (folder / "timers.toml").write_text(ROW.format(name="late", role="b"))
    return tmp_path


def test_mutants_are_chosen_by_name_and_by_area(root: Path) -> None:
    known = read_mutants(root)
    assert [mutant.name for mutant in choose(known, ["late"], [])] == ["late"]
    assert [mutant.name for mutant in choose(known, ["late"], ["data"])] == ["deaf", "dumb", "late"]
    assert choose(known, [], []) == known


@pytest.mark.parametrize(
    ("names", "areas", "error"),
    [
        (["lame"], [], "no mutant lame; there are: deaf, dumb, late"),
        ([], ["date"], "no area date; there are: data, timers"),
    ],
)
def test_unknown_name_or_area_is_refused(root: Path, names: list[str], areas: list[str], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        choose(read_mutants(root), names, areas)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        (ROW.format(name="x", role="c"), "role must be one of a, b, both, alone, not 'c'"),
        (ROW.format(name="x", role="a").replace('["DT-03"]', "[]"), "requirements names no requirement"),
        (ROW.format(name="x", role="a") + "color = 1", "unknown key color"),
        (ROW.format(name="x", role="a") + 'engine = "fast"', "engine must be one of simple, batch, not 'fast'"),
    ],
)
def test_mistake_in_table_is_refused_with_its_file(root: Path, table: str, error: str) -> None:
    (root / mutants.FOLDER / "data.toml").write_text(table)
    with pytest.raises(UsageError, match=f"mutants data.toml: mutant 1: {error}"):
        read_mutants(root)


@pytest.mark.parametrize(
    ("role", "options"),
    [
        ("a", ["--lane=netns", "--pair=refwg+deaf~wireguard-go", "--pair=refwg~wireguard-go"]),
        ("b", ["--lane=netns", "--pair=wireguard-go~refwg+deaf", "--pair=wireguard-go~refwg"]),
        ("both", ["--lane=netns", "--pair=refwg+deaf~refwg+deaf", "--pair=refwg~refwg"]),
        ("alone", ["--lane=netns", "--impl=refwg+deaf", "--impl=refwg"]),
    ],
)
def test_killer_runs_with_mutant_and_with_refwg_as_it_is(role: str, options: list[str]) -> None:
    assert a_mutant(role=role).options() == options


def test_killer_runs_with_engine_that_mutant_needs(root: Path) -> None:
    (root / mutants.FOLDER / "data.toml").write_text(ROW.format(name="deaf", role="alone") + 'engine = "batch"')
    (mutant,) = choose(read_mutants(root), ["deaf"], [])
    assert mutant.options() == ["--lane=netns", "--impl=refwg+deaf", "--impl=refwg+batch"]
    failed = judge(mutant, [result(DEAF, "failed"), result("refwg+batch", "failed", message="no answer")], 1.0)
    assert failed.reason == "test_x.py::test_y is failed with refwg+batch as it is, too: no answer"


def test_killer_runs_with_engine_that_user_chose(root: Path) -> None:
    rows = ROW.format(name="deaf", role="alone") + ROW.format(name="dumb", role="alone") + 'engine = "simple"'
    (root / mutants.FOLDER / "data.toml").write_text(rows)
    (mutant,) = choose(read_mutants(root), ["deaf", "dumb"], [], "batch")
    assert mutant.options() == ["--lane=netns", "--impl=refwg+deaf+batch", "--impl=refwg+batch"]
    assert [mutant.options()[1] for mutant in choose(read_mutants(root), ["deaf", "dumb"], [], "simple")] == [
        "--impl=refwg+deaf+simple",
        "--impl=refwg+dumb",
    ]
    with pytest.raises(UsageError, match="none of these mutants runs with engine batch"):
        choose(read_mutants(root), ["dumb"], [], "batch")


def test_mutant_is_caught_when_test_fails_with_it_only() -> None:
    results = [result(DEAF, "failed", cites=("DT-03", "RT-04")), result(WHOLE, "passed")]
    found = judge(a_mutant(), results, 1.5)
    assert (found.caught, found.by, found.cited, found.seconds) == (True, ("test_x.py::test_y",), ("DT-03",), 1.5)
    assert found.lines() == (
        "caught     deaf                                1.5 s  DT-03, DT-04\n"
        "           by test_x.py::test_y, which cites DT-03"
    )


def test_bug_that_killer_cites_is_reported_as_cited() -> None:
    failed = result(DEAF, "failed", cites=("DT-03",))
    failed.bugs = ["DT-04", "IB-01"]
    assert judge(a_mutant(), [failed, result(WHOLE, "passed")], 1.0).cited == ("DT-03", "DT-04")


@pytest.mark.parametrize(
    ("results", "tested", "reason"),
    [
        ([result(DEAF, "passed"), result(WHOLE, "passed")], True, "test_x.py::test_y is passed"),
        (
            [result(DEAF, "error", message="refwg+deaf ended"), result(WHOLE, "passed")],
            True,
            "test_x.py::test_y is error: refwg+deaf ended",
        ),
        (
            [result(DEAF, "failed"), result(WHOLE, "failed", message="no answer")],
            True,
            "test_x.py::test_y is failed with refwg as it is, too: no answer",
        ),
        ([result(DEAF, "skipped"), result(WHOLE, "skipped", message="no /dev/net/tun")], False, "no /dev/net/tun"),
        ([], False, "pytest's last words"),
        (
            [result(DEAF, "passed"), result(WHOLE, "passed"), replace(result(DEAF, "failed"), id="oracle::DT-03[x-a]")],
            True,
            "test_x.py::test_y is passed",
        ),
    ],
    ids=["passed", "error", "control-failed", "skipped", "no-results", "oracle-only"],
)
def test_mutant_is_not_caught_when_test_shows_nothing(results: list[Result], tested: bool, reason: str) -> None:
    found = judge(a_mutant(), results, 1.0, "pytest's last words")
    assert (found.caught, found.tested, found.reason) == (False, tested, reason)
    assert found.lines().startswith("not caught" if tested else "not tested")


@pytest.mark.parametrize(("whole", "caught"), [("passed", True), ("differs", False)])
def test_difference_catches_mutant_unless_refwg_shows_it_too(whole: str, caught: bool) -> None:
    found = judge(a_mutant(), [result(DEAF, "differs", cites=("DT-03",)), result(WHOLE, whole)], 1.0)
    assert (found.caught, found.by) == (caught, ("test_x.py::test_y",) if caught else ())


def test_json_has_fixed_names_of_format() -> None:
    found = judge(a_mutant(), [result(DEAF, "failed"), result(WHOLE, "passed")], 1.0)
    entry = json.loads(json.dumps(found.as_json()))
    fixed = {"name": "deaf", "requirement": "DT-03", "caught": True, "by": ["test_x.py::test_y"], "seconds": 1.0}
    assert fixed.items() <= entry.items()
