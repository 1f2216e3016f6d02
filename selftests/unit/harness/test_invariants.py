"""Check the oracle's results: findings of many tests add up to one result per invariant, pair, role and lane."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.report import expectations
from harness.report.causes import judged_side
from harness.report.conformance import read_conformance
from harness.report.invariants import BUGS, SHOULDS, Invariants
from harness.report.results import Result
from harness.wire.oracle import INVARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.report.invariants import Outcome

ROOT = Path(__file__).parents[3]
EXPECT = """
[[expect]]
test = "oracle::DT-01"
versions = "*"
requirement = "DT-01"
observed = "two datagrams of counter 7"
message = "counter 7"
link = "https://example.org/1"
side = "a"
"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    expectations.load_expectations.cache_clear()
    yield
    expectations.load_expectations.cache_clear()


def result(name: str = "t.py::test_x", a: str = "mine", b: str = "", **more: Any) -> Result:
    sides = [{"impl": impl, "version": "1"} if impl else None for impl in (a, b)]
    pair = "~".join(filter(None, (a, b)))
    return Result(**{"id": f"{name}[{pair}]", "a": sides[0], "b": sides[1], "lane": "netns", "kernel": "6.1"} | more)


def found(*violated: str, role: str = "a", message: str = "sent data with counter 7", **checked: int) -> list[Any]:
    violations = [{"requirement": each, "message": message, "packet": "lo.pcapng, frame 3"} for each in violated]
    counts = {name.replace("_", "-"): count for name, count in checked.items()}
    return [{"role": role, "checked": counts, "violations": violations}]


def outcomes(*tests: tuple[Result, object], directory: Path = ROOT / "no such place") -> dict[str, Outcome]:
    invariants = Invariants()
    for test, facts in tests:
        invariants.add(test, facts)
    return {outcome.id: outcome for outcome in invariants.outcomes(directory)}


def test_invariant_without_violation_passes() -> None:
    tests = ((result(), found(DT_01=3)), (result("t.py::test_y"), found(DT_01=2, MSG_12=1)))
    made = outcomes(*tests)
    assert {name: outcome.state for name, outcome in made.items()} == {
        "oracle::DT-01[mine-a]": "passed", "oracle::MSG-12[mine-a]": "passed",
    }  # fmt: skip
    assert made["oracle::DT-01[mine-a]"].message == ""


def test_violated_must_fails_and_names_first_test() -> None:
    tests = [
        (result("t.py::test_one"), found(DT_01=3)),
        (result("t.py::test_two", artifacts="evidence/two"), found("DT-01", DT_01=3)),
        (result("t.py::test_three", artifacts="evidence/three"), found("DT-01", message="sent otherwise")),
    ]
    (outcome,) = outcomes(*tests).values()
    assert (outcome.state, outcome.facts["artifacts"]) == ("failed", "evidence/two")
    assert outcome.message == (
        "mine sent data with counter 7 (lo.pcapng, frame 3); in 2 tests, first in t.py::test_two[mine]"
    )
    assert (outcome.facts["requirements"], outcome.facts["bugs"]) == (["DT-01"], [])


def test_single_violation_names_its_test() -> None:
    (outcome,) = outcomes((result(), found("CR-11"))).values()
    assert outcome.message == "mine sent data with counter 7 (lo.pcapng, frame 3); in t.py::test_x[mine]"
    assert outcome.facts["bugs"] == ["IB-48"]


@pytest.mark.parametrize(
    ("program", "state"), [("mine", "differs"), ("refwg", "failed"), ("refwg+batch", "failed"), ("kernel", "failed")]
)
def test_violated_should_differs_except_for_driver_and_refwg(program: str, state: str) -> None:
    (outcome,) = outcomes((result(a=program), found("MSG-12"))).values()
    assert outcome.state == state


def test_roles_pairs_and_lanes_have_results_of_their_own() -> None:
    facts = found(DT_01=1)
    tests = [
        (result(b="other"), facts),
        (result(b="other"), found("DT-01", role="b")),
        (result(a="other", b="mine"), facts),
        (result(b="other", lane="vm"), facts),
        (result(), facts),
    ]
    invariants = Invariants()
    for test, entries in tests:
        invariants.add(test, entries)
    made = [(outcome.id, outcome.facts["lane"], outcome.state) for outcome in invariants.outcomes(ROOT)]
    assert made == [
        ("oracle::DT-01[mine-a]", "netns", "passed"),
        ("oracle::DT-01[mine~other-a]", "netns", "passed"),
        ("oracle::DT-01[mine~other-b]", "netns", "failed"),
        ("oracle::DT-01[other~mine-a]", "netns", "passed"),
        ("oracle::DT-01[mine~other-a]", "vm", "passed"),
    ]


def test_message_names_program_that_sent_datagram() -> None:
    (outcome,) = outcomes((result(b="other"), found("DT-01", role="b"))).values()
    assert outcome.message.startswith("other sent data")


@pytest.mark.parametrize(
    ("pair", "counter", "state"),
    [
        ("mine", 7, "xfailed"),
        ("mine~other-a", 7, "xfailed"),
        ("other~mine-b", 7, "failed"),
        ("mine~other-b", 7, "failed"),
        ("mine", 8, "failed"),
    ],
    ids=["alone", "pair", "other-side", "other-program", "other-message"],
)
def test_expectation_explains_result_of_its_side_only(tmp_path: Path, pair: str, counter: int, state: str) -> None:
    (tmp_path / "mine.toml").write_text(EXPECT)
    programs, _, role = pair.partition("-")
    a, _, b = programs.partition("~")
    test = (result(a=a, b=b), found("DT-01", role=role or "a", message=f"sent data with counter {counter}"))
    (outcome,) = outcomes(test, directory=tmp_path).values()
    assert outcome.state == state
    explanation = "DT-01: two datagrams of counter 7 (https://example.org/1)"
    assert outcome.explanation == (explanation if state == "xfailed" else "")


@pytest.mark.parametrize(("day", "state"), [(31, "xfailed"), (32, "failed")])
def test_expectation_of_manifest_explains_until_its_day(tmp_path: Path, day: int, state: str) -> None:
    path = tmp_path / "known.toml"
    path.write_text('[[expect]]\ntest = "oracle::DT-01*"\nmessage = "counter 7"\nuntil = 2027-01-31\n')
    gathered = Invariants()
    gathered.add(result(), found("DT-01", message="sent data with counter 7"))
    today = date(2027, 1, 1) + timedelta(days=day - 1)
    (outcome,) = gathered.outcomes(tmp_path, {"mine": path}, today)
    assert outcome.state == state
    again = "this failure was expected until 2027-01-31, so it counts again: "
    assert (again in outcome.message) is (state == "failed")


@pytest.mark.parametrize(
    ("test", "facts"), [(result(), None), (result(a=""), found("DT-01"))], ids=["no-findings", "no-program"]
)
def test_test_without_findings_or_program_adds_nothing(test: Result, facts: object) -> None:
    assert outcomes((test, facts)) == {}


def test_levels_and_bugs_are_those_of_catalogue() -> None:
    catalogue = read_conformance(ROOT)
    levels = {name: catalogue.requirements[name].level for name in INVARIANTS}
    assert {name for name, level in levels.items() if level == "should"} == SHOULDS
    assert {bug for bugs in BUGS.values() for bug in bugs} <= catalogue.bugs.keys()
    assert BUGS.keys() <= INVARIANTS


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("oracle::DT-01[x~y-a]", ["x"]),
        ("oracle::DT-01[x~y-b]", ["y"]),
        ("oracle::DT-01[x-a]", ["x"]),
        ("t.py::test_x[x~y-a]", ["x", "y"]),
    ],
)
def test_result_of_oracle_is_about_one_side(name: str, programs: list[str]) -> None:
    pair = ["x", "y"] if "~" in name else ["x"]
    assert pair[judged_side(name)] == programs
