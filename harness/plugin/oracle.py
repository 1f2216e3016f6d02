"""Judge the captures of each test, and report what the oracle finds as results.

Each test is judged in the process that ran it. Its findings travel with the test's report, from xdist workers and from
guests; the controller adds them up and reports the sums when all tests have run. A test keeps its own state.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import pytest

from harness import suite
from harness.plugin.session import is_worker, state_of_run

if TYPE_CHECKING:
    from harness.implementations.interface import Interface
    from harness.implementations.manifest import Manifest
    from harness.lab.judged import Judgement
    from harness.lab.lab import Lab
    from harness.report.invariants import Outcome

# What the oracle found in a test, as it goes into the facts of its report.
FOUND: Final = pytest.StashKey[list[dict[str, object]]]()
# Whether the test's evidence is kept because the oracle found something for the first time in this process.
IS_WITNESS: Final = pytest.StashKey[bool]()
_NOTE: Final = "oracle.txt"


def judge_lab(item: pytest.Item, made: Lab, sides: tuple[Manifest | None, Manifest | None]) -> None:
    """Judge what the captures of a test's lab have recorded; keep the findings for its report.

    The first violation of each invariant by each program writes the captures into the evidence.
    """
    from harness.lab.judged import judge

    if sides[0] is None or not made.made:
        return
    judgement = judge(made)
    item.stash[FOUND] = found = _as_facts(judgement, sides)
    if not judgement.findings:
        return
    seen = state_of_run(item.config).seen_by_oracle
    new = {(finding.requirement, interface.manifest.name) for interface, finding in judgement.findings} - seen
    seen |= new
    item.stash[IS_WITNESS] = bool(new)
    for entry in found:
        for violation in entry["violations"]:  # type: ignore[attr-defined]
            text = f"{violation['requirement']}: {entry['impl']} {violation['message']}\n"
            made.note(_NOTE, f"{text}    {violation['packet']}: {violation['datagram']}\n")
    if new:
        made.save_captures()


def _as_facts(judgement: Judgement, sides: tuple[Manifest | None, Manifest | None]) -> list[dict[str, object]]:
    entries: dict[Interface, dict[str, object]] = {}
    checked: dict[Interface, dict[str, int]] = {}
    violations: dict[Interface, list[dict[str, str]]] = {}
    for (interface, requirement), count in judgement.checked.items():
        checked.setdefault(interface, {})[requirement] = count
    for interface, finding in judgement.findings:
        datagram = finding.datagram
        violations.setdefault(interface, []).append(
            {
                "requirement": finding.requirement,
                "message": finding.message,
                "packet": datagram.place,
                "datagram": f"{datagram.source} to {datagram.destination}: {datagram.payload[:_SHOWN].hex()}",
            }
        )
    for interface in dict.fromkeys([*checked, *violations]):
        entries[interface] = {
            "role": _role(interface, sides),
            "impl": interface.manifest.name,
            "checked": checked.get(interface, {}),
            "violations": violations.get(interface, []),
        }
    return list(entries.values())


# Bytes of a datagram that the evidence shows: a whole handshake message.
_SHOWN: Final = 148


def _role(interface: Interface, sides: tuple[Manifest | None, Manifest | None]) -> str:
    """Return whether it is A or B: as its tunnel says, or else by its implementation."""
    a, b = sides
    if interface.role or b is None:
        return interface.role or "a"
    return "b" if interface.manifest.name == b.name != a.name else "a"  # type: ignore[union-attr]


def report_invariants(session: pytest.Session) -> None:
    """Report one result for each invariant that was judged in this run, through pytest's own hook."""
    state = state_of_run(session.config)
    if not state.used or is_worker(session.config) or state.plan.lane_of_guest:
        return
    from harness.plugin.session import REPORTER

    every = state.programs.alone if state.plan.concerns_lab else ()
    # Those of `--like` are the expectations of the other program.
    files = {manifest.name: manifest.expectations for manifest in every if manifest.expectations is not None}
    directory = state.suite / suite.EXPECTATIONS
    outcomes = list(state.invariants.outcomes(directory, files, datetime.now(UTC).date()))
    if outcomes:
        session.config.pluginmanager.getplugin(REPORTER).expect(len(outcomes))
    for outcome in outcomes:
        for report in _reports(outcome):
            session.config.hook.pytest_runtest_logreport(report=report)


def _reports(outcome: Outcome) -> list[pytest.TestReport]:
    """Return the phases of an outcome as pytest reports them: a call, and a tear-down that ends the test case."""
    from harness.report.results import set_facts

    place = ("oracle", 0, outcome.id.partition("::")[2])
    call = pytest.TestReport(outcome.id, place, {}, "passed", None, "call")
    match outcome.state:
        case "failed":
            call.outcome, call.longrepr = "failed", outcome.message
        case "differs":
            call.outcome, call.longrepr = "skipped", ("oracle", 0, f"Skipped: {outcome.message}")
        case "xfailed":
            call.outcome, call.longrepr, call.wasxfail = "skipped", outcome.message, outcome.explanation
    special = {"state": outcome.state, "message": outcome.message} if outcome.state != "passed" else {}
    set_facts(call, outcome.facts | special)
    end = pytest.TestReport(outcome.id, place, {}, "passed", None, "teardown")
    set_facts(end, outcome.facts)
    return [call, end]
