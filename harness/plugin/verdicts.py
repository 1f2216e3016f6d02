"""Run health checks, undo and expectations around each test; offer `differs` and `twin`.

Tests call `differs`, `not_reached` and `twin`. `differs` ends a test whose program does not do what the kernel does,
and need not. `not_reached` ends a test that did not get to what it is about. `twin` surrounds the positive control of a
test that expects a refusal.
"""

from __future__ import annotations

import platform
import shutil
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn

import pytest
from _pytest.outcomes import Failed, Skipped

from harness import suite
from harness.errors import HarnessError, LoadNotReached, Unsupported
from harness.plugin import phases
from harness.plugin.assertions import put_clue_first
from harness.plugin.marks import cited, why_no_difference
from harness.plugin.oracle import FOUND, IS_WITNESS, judge_lab
from harness.plugin.selection import label_of, lane_of, sides
from harness.plugin.session import (
    LAB,
    UNDONE,
    file_name,
    state_of_run,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping

    from harness.implementations.manifest import Manifest
    from harness.lab.lab import Lab


class Differs(Skipped):
    """The program does not do what the kernel does, and need not: the result is `differs`, which fails no run.

    kind, name: the marker and the id of the should or scenario that allows it; empty if none is named.
    """

    # Like pytest's own outcomes, so that reports print the name without a module.
    __module__ = "builtins"

    def __init__(self, message: str, kind: str = "", name: str = "") -> None:
        super().__init__(f"{message} (allowed by {name})" if name else message)
        self.kind = kind
        self.name = name


class Blocked(Failed):
    """The test could prove nothing: the result is `blocked`, which fails the run.

    Either a positive control failed, or an implementation has failed its smoke test.
    """

    __module__ = "builtins"


class NotReached(Failed):
    """The test did not get to what it is about, such as load: the result is `not_reached`, which fails the run."""

    __module__ = "builtins"


class SmokeFailed(Failed):
    """An implementation failed its smoke test: the result is `error`. lab: the lab of the smoke test."""

    __module__ = "builtins"

    def __init__(self, message: str, lab: Lab) -> None:
        super().__init__(message, pytrace=False)
        self.lab = lab


def differs(how: str, *, by: Iterable[str] = (), requirement: str = "", scenario: str = "") -> NoReturn:
    """End the test: the program's behaviour is allowed, and is not the kernel's.

    how: what was measured. by: the names of the programs that differ, if that is known; for `kernel` and `refwg` a
    difference is a failure. requirement, scenario: the id of the should, or of the scenario whose text allows the
    difference; the test cites it. A test that cites a must has to name one, else the difference is a failure. The
    health checks still run, and the lab is still undone; what they find fails the test.
    """
    from harness.report.invariants import AS_THE_KERNEL

    if wrong := sorted(AS_THE_KERNEL & {name.partition("+")[0] for name in by}):
        pytest.fail(f"{' and '.join(wrong)}: {how}")
    kind = "requirement" if requirement else "scenario" if scenario else ""
    raise Differs(how, kind, requirement or scenario)


def not_reached(why: str) -> NoReturn:
    """End the test: it did not get to what it is about, so it shows nothing; the result is `not_reached`.

    why: what was tried and measured, such as "no cookie reply in 20000 initiations, 9100 a second". It is not a pass
    and not a fault of the program. It fails the run, because a load that is never reached would hide every defect
    behind it; an expectation may name it (`selftests/expectations/`).
    """
    raise NotReached(why)


@contextmanager
def twin(shows: str) -> Iterator[None]:
    """Surround the positive control of a test that expects a refusal; if it fails, the result is `blocked`.

    shows: a sentence, such as "a datagram from an allowed address arrives". Without the control, a tunnel that carries
    nothing at all would pass every test of a refusal.
    """
    try:
        yield
    except (Exception, Failed) as error:
        if isinstance(error, Blocked | NotReached | LoadNotReached | Unsupported):
            raise
        plain = isinstance(error, HarnessError | AssertionError | Failed)
        reason = str(error) if plain else f"{type(error).__name__}: {error}"
        raise Blocked(f"positive control failed: {shows}: {reason}") from error


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run the health checks and undo the lab as a part of each test, so that their errors fail it (hook)."""
    made = item.stash.get(LAB, None)
    if made is None:
        try:
            return (yield)
        except Differs as found:
            _require_permission(item, found)
            raise
    made.steps.section = "the test itself"
    different: Differs | None = None
    answer: object = None
    try:
        try:
            answer = yield
        except Differs as found:
            _require_permission(item, found)
            different = found
        finally:
            phases.start(item, "teardown")
        made.check_health()
        if different is None:
            made.check_scripts()
        judge_lab(item, made, _a_and_b(item))
    except BaseException as error:
        _judge_failed(item, made, error)
        _snapshot(made)
        # With --pdb, --pause-on-error or --shell the lab stays up for the user; the fixture undoes it afterwards.
        if item.config.option.usepdb or state_of_run(item.config).plan.keeps_lab_up:
            from harness.plugin.interactive import enter_text

            made.note("enter.txt", enter_text(made))
        else:
            _close_after(made, error)
        raise
    if state_of_run(item.config).plan.keep == "all":
        made.snapshot()
    made.close()
    item.stash[UNDONE] = True
    if different is not None:
        raise different
    return answer


def _require_permission(item: pytest.Item, different: Differs) -> None:
    """Fail the test if no should and no scenario that it cites allows a difference."""
    if why := why_no_difference(item, different.kind, different.name):
        raise Failed(f"{different.msg}; {why}") from different


def _judge_failed(item: pytest.Item, made: Lab, error: BaseException) -> None:
    """Judge the captures of a test that did not pass, unless that is what went wrong."""
    if FOUND not in item.stash:
        try:
            judge_lab(item, made, _a_and_b(item))
        except Exception as late:  # noqa: BLE001 - the test's own error stays the verdict
            error.add_note(f"and the oracle: {late!r}")


def _close_after(made: Lab, error: BaseException) -> None:
    """Undo the lab of a failed test, and add to its error what may explain it: a rule that matched nothing."""
    if not isinstance(error, Skipped):
        for complaint in made.complaints_of_wires():
            if complaint not in str(error):
                error.add_note(complaint)
    from harness.lab.lab import Unhealthy

    try:
        made.close()
    except (Exception, Failed) as late:  # noqa: BLE001 - an error of the undo does not replace a failure
        if isinstance(late, Unhealthy) and isinstance(error, Blocked | NotReached | LoadNotReached):
            # The program has ended by itself: that is its fault, and the reason why the test has shown nothing.
            raise Unhealthy(f"{late}\nand before: {error}") from error
        error.add_note(f"and the undo: {late}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Apply the expectations, keep the evidence, and add the plugin's facts to the report (hook)."""
    report = yield
    special = _special_state(item, report, call)
    state = state_of_run(item.config)
    if lane_of(item) != "netns" and not state.used:
        if special:
            _describe(report, special)
        return report
    from harness.report.invariants import FACT

    put_clue_first(report)
    facts = _facts(item)
    if report.when == "call":
        applied = _apply_expectations(item, report, special.get("message", ""))
        special = applied if "state" in applied else special | applied
    if report.failed:
        _add_cited(item, report)
    if report.when == "call" or report.failed:
        error = call.excinfo.value if call.excinfo is not None else None
        facts["artifacts"] = _keep_evidence(item, report, error)
    if report.when == "call" and FOUND in item.stash:
        facts[FACT] = item.stash[FOUND]
    if report.when == "teardown" and (made := item.stash.get(LAB, None)) is not None:
        shutil.rmtree(made.directory, ignore_errors=True)
    _describe(report, facts | special)
    return report


def _add_cited(item: pytest.Item, report: pytest.TestReport) -> None:
    """Print below a failure what its test checks, requirements and bugs, as sections of pytest's report."""
    for kind in ("requirement", "bug"):
        if names := cited(item, kind):
            catalogue = state_of_run(item.config).conformance
            report.sections.append((f"{kind}s", "\n".join(str(catalogue.entry(name)) for name in names)))


def _special_state(item: pytest.Item, report: pytest.TestReport, call: pytest.CallInfo[None]) -> dict[str, str]:
    """Return state and message for a result for which pytest has no outcome; empty for all others."""
    error = call.excinfo.value if call.excinfo is not None else None
    match error:
        case Unsupported():
            # The lab did not use an undeclared capability. To pytest this is a skip, as if the test had its marker.
            path, line, _ = item.location
            report.outcome = "skipped"
            report.longrepr = (path, line or 0, f"Skipped: unsupported: {error}")
            return {"state": "unsupported", "message": str(error)}
        case Differs():
            return {"state": "differs", "message": str(error)}
        case Blocked():
            return {"state": "blocked", "message": str(error)}
        case NotReached() | LoadNotReached():
            return {"state": "not_reached", "message": str(error)}
        case SmokeFailed():
            return {"message": str(error)}
    # A test that failed without an exception was marked as a strict xfail.
    return {"state": "xpassed"} if report.failed and error is None else {}


def _apply_expectations(item: pytest.Item, report: pytest.TestReport, message: str) -> dict[str, str]:
    """Turn an expected failure into an xfail, and a success where a failure was expected into a failure.

    Returns the new state, or a message for a known failure that the user's build has fixed, or that is expected no
    longer; empty if nothing changes. message: that of a state for which pytest has no outcome.
    """
    from harness.report import expectations
    from harness.report.results import message_of

    if report.skipped:
        return {}
    a, b = _a_and_b(item)
    found = expectations.applying(state_of_run(item.config).suite / suite.EXPECTATIONS, item.nodeid, (a, b))
    today = datetime.now(UTC).date()
    if report.failed and (expected := expectations.explains(found, message_of(report), today)):
        if expected.has_expired(today):
            report.sections.append(("expired expectation", expected.expiry))
            return {"message": f"{message or message_of(report)}\n{expected.expiry}"}
        report.outcome = "skipped"
        report.wasxfail = str(expected)
        return {"state": "xfailed"}
    if report.passed and (wrong := expectations.refuted(found)):
        report.outcome = "failed"
        refuted = "; ".join(map(str, wrong))
        report.longrepr = f"[XPASS(strict)] it passes; remove the expectation: {refuted}"
        return {"state": "xpassed"}
    if report.passed and (news := expectations.fixed(found)):
        return {"message": "; ".join(news)}
    return {}


def _describe(report: pytest.TestReport, facts: Mapping[str, object]) -> None:
    from harness.report.results import set_facts

    set_facts(report, facts)


def _facts(item: pytest.Item) -> dict[str, object]:
    a, b = _a_and_b(item)
    facts: dict[str, object] = {
        "a": _side(a),
        "b": _side(b),
        "lane": label_of(item),
        "kernel": platform.release(),
        "scenarios": cited(item, "scenario"),
        "requirements": cited(item, "requirement"),
        "bugs": cited(item, "bug"),
    }
    return facts


def _a_and_b(item: pytest.Item) -> tuple[Manifest | None, Manifest | None]:
    """Return the implementations under test as A and B; None for a side that the test does not have."""
    a, b = [*sides(item), None, None][:2]
    return a, b


def _side(manifest: Manifest | None) -> dict[str, str] | None:
    if manifest is None:
        return None
    try:
        version = manifest.version()
    except HarnessError:
        version = "unknown"
    side = {"impl": manifest.name, "version": version}
    return side | {"like": manifest.like_name} if manifest.like_name else side


def _keep_evidence(item: pytest.Item, report: pytest.TestReport, error: BaseException | None) -> str:
    # A smoke test has its own lab. The tests that its failure blocks have no evidence.
    made = error.lab if isinstance(error, SmokeFailed) else item.stash.get(LAB, None)
    keep = state_of_run(item.config).plan.keep
    is_wanted = report.failed or item.stash.get(IS_WITNESS, False)
    if made is None or keep == "none" or (keep == "failed" and not is_wanted):
        return ""
    if report.when == "setup" and isinstance(error, Blocked):
        return ""
    target = state_of_run(item.config).report_directory / "evidence" / file_name(item.nodeid)
    if report.when == "setup" and not isinstance(error, SmokeFailed):
        # After the call of a test, its wrapper has done so.
        _snapshot(made)
    if report.longreprtext:
        made.note("failure.txt", report.longreprtext + "\n")
    made.keep(target)
    return str(target.relative_to(target.parent.parent))


def _snapshot(made: Lab) -> None:
    try:
        made.snapshot()
    except (Exception, Failed) as error:  # noqa: BLE001 - a lab half made; the test's error stays the verdict
        made.note("snapshot.txt", f"{error!r}\n")


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """Name the state `differs` in pytest's progress and summary; other states keep pytest's words (hook)."""
    if not report.skipped or not state_of_run(config).used:
        return None
    from harness.report.results import state_of

    return ("differs", "d", "DIFFERS") if state_of(report) == "differs" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List every difference and every fixed failure with its reason, whatever `-r` selects (hook)."""
    _show_fixed(terminalreporter)
    _show_disagreements(terminalreporter)
    different = terminalreporter.stats.get("differs", ())
    if different:
        from harness.report.results import message_of

        terminalreporter.section("allowed differences from the kernel")
        for report in different:
            terminalreporter.write_line(f"DIFFERS {report.nodeid} - {message_of(report)}")


def _show_disagreements(terminalreporter: pytest.TerminalReporter) -> None:
    state = state_of_run(terminalreporter.config)
    # Only in several lanes or on several kernels can a test have several results.
    if not state.used or len({(result.lane, result.kernel) for result in state.results.by_id.values()}) < 2:  # noqa: PLR2004
        return
    from harness.report.agreement import disagreements

    if found := disagreements(state.results.by_id.values()):
        terminalreporter.section("where lanes and kernels disagree")
        for each in found:
            terminalreporter.write_line(f"DISAGREE {each}")


def _show_fixed(terminalreporter: pytest.TerminalReporter) -> None:
    if not state_of_run(terminalreporter.config).used:
        return
    from harness.report.results import facts_of

    if fixed := [report for report in terminalreporter.stats.get("passed", ()) if facts_of(report).get("message")]:
        terminalreporter.section("known failures that are fixed")
        for report in fixed:
            terminalreporter.write_line(f"FIXED {report.nodeid} - {facts_of(report)['message']}")
