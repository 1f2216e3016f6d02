"""Write results as they come and at the end: events, results.json, page, summary."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from harness.errors import HarnessError
from harness.lanes import EVENTS
from harness.plugin import sandboxed
from harness.plugin.past import note_run
from harness.plugin.selection import runs_here
from harness.plugin.session import INTERACTIVE, is_worker, state_of_run

if TYPE_CHECKING:
    from harness.plugin.session import State


# The fields of a result in its event.
_TOLD: Final = ("id", "pair", "state", "seconds", "message", "lane", "kernel")


class Reporter:
    """Collects reports and writes events; on the xdist controller, or in a run without xdist."""

    def __init__(self, config: pytest.Config, state: State) -> None:
        self._config = config
        self._state = state
        self._expected = 0
        # Removed from the environment: programs that tests start, such as pytest, must not write events.
        target = os.environ.pop(EVENTS, None)
        self._whole = target == "stdout"
        self._events = os.dup(1) if self._whole else int(target) if target else None

    # tryfirst: pytest's own plugin for JUnit files reads the properties.
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self._state.used:
            return
        from harness.report.invariants import FACT
        from harness.report.results import facts_of, set_properties

        gate = self._state.gate
        if gate is not None:
            gate.judge(report)
        result = self._state.results.add(report)
        if found := facts_of(report).get(FACT):
            self._state.invariants.add(result, found)
        if gate is not None and report.when == "teardown":
            gate.end(result)
        set_properties(report, result, self._state.seed)
        if self._whole:
            data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
            # Under xdist the report names its worker, which means nothing elsewhere.
            data.pop("node", None)
            self._tell({"event": "report", "data": data})
        elif report.when == "teardown":
            facts = {name: getattr(result, name) for name in _TOLD}
            self._tell({"event": "result", **facts})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        plan = self._state.plan
        if not plan.only_guests:
            self.expect(sum(runs_here(item, plan) for item in session.items))

    def expect(self, count: int) -> None:
        """Add to the number of expected tests."""
        self._expected += count
        self._tell({"event": "collected", "count": self._expected})

    def note(self, text: str) -> None:
        """Report what the run does when all tests have ended, for the progress."""
        self._tell({"event": "note", "text": text})

    def remark(self, text: str) -> None:
        """Report what the user should see below the results."""
        self._tell({"event": "remark", "text": text})

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        # Every worker collects the same tests.
        if not self._expected:
            self.expect(len(ids))

    def _tell(self, event: dict[str, object]) -> None:
        if self._events is not None:
            mark = b"\x1e" if self._whole else b""
            with suppress(OSError):
                os.write(self._events, mark + json.dumps(event).encode() + b"\n")


def executes_tests(config: pytest.Config) -> bool:
    """Whether pytest was asked to run tests, and not only to show them or to set them up."""
    return not (sandboxed.only_looks(config) or getattr(config.option, "setuponly", False))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if hasattr(config, sandboxed.PEEKING):
        os._exit(sandboxed.PEEK_NO)
    state = state_of_run(config)
    if is_worker(config):
        return
    if state.used and executes_tests(config):
        # The host checks the results of a guest and draws their page.
        if state.plan.lane_of_guest:
            state.results.write(state.results_path)
        else:
            from harness.plugin.gating import why_not_included

            shortcoming = why_not_included(state.plan.must_include, state.results) if exitstatus in _ENDED else ""
            shortcoming = shortcoming or (_shortcoming(state) if exitstatus == pytest.ExitCode.OK else "")
            if shortcoming := shortcoming or _untraced(config):
                failed = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED or not exitstatus
                session.exitstatus = pytest.ExitCode.TESTS_FAILED if failed else exitstatus
                config.stash[_SHORTCOMING] = shortcoming
            if state.gate is not None:
                state.gate.close(complete=exitstatus in _SHOWS and not shortcoming)
            config.stash[_REPORT] = _write_report(config, exitstatus)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the run's directories, after the undo of a lab that was still up when the session was interrupted."""
    if not is_worker(config):
        state_of_run(config).close()


# pytest's statuses of a run that was not cut short; in the first two, tests ran.
_SHOWS: Final = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
_ENDED: Final = (*_SHOWS, pytest.ExitCode.NO_TESTS_COLLECTED)
_SHORTCOMING: Final = pytest.StashKey[str]()
# The lines that name the results and the page.
_REPORT: Final = pytest.StashKey[list[str]]()


def _write_report(config: pytest.Config, exitstatus: int) -> list[str]:
    """Complete the report and replace the last one with it; without a result the last one stays."""
    from harness.plugin.publish import publish

    state = state_of_run(config)
    if not state.results.any:
        return [] if exitstatus == pytest.ExitCode.USAGE_ERROR else ["report: none, because no test ran"]
    results = state.report_directory / state.results_path.name
    if state.gate is not None:
        state.results.comparison = state.gate.compare()
    state.results.complaint = _complaint(config, exitstatus)
    lines = _add_bench(state)
    state.results.write(results, files=_beside(state.report_directory))
    try:
        page = state.results_path.with_name(_draw(config, results).name)
        lines.append(f"report: {page}")
    except (HarnessError, OSError) as error:
        lines.append(f"report: none: {error}")
    except Exception as error:  # noqa: BLE001 - a defect of the page must not lose the results
        lines.append(f"report: none, because of a defect in wg-interop: {error!r}")
    try:
        publish(state.report_directory, state.results_path)
    except (HarnessError, OSError) as error:
        return [f"report: not moved to its place: {error}"]
    note_run(state, config.rootpath)
    return [f"results: {state.results_path}", *lines]


def _beside(directory: Path) -> list[str]:
    """Return the report's entries beside its results; with the page, which is drawn from the results later."""
    from harness.report.results import BESIDE, PAGE

    return [name for name in BESIDE if name == PAGE or (directory / name).exists()]


def _add_bench(state: State) -> list[str]:
    """Add the measurements that lie beside the results; returns a line if the file is malformed, else none."""
    from harness.report.bench import beside

    try:
        state.results.bench = beside(state.results_path)
    except (HarnessError, OSError) as error:
        return [f"measurements: none: {error}"]
    return []


def _complaint(config: pytest.Config, exitstatus: int) -> str:
    """Return why the run failed, if not by its tests; else empty."""
    ends: dict[int, str] = {
        pytest.ExitCode.INTERRUPTED: "interrupted",
        pytest.ExitCode.INTERNAL_ERROR: "pytest itself failed",
    }
    return config.stash.get(_SHORTCOMING, ends.get(exitstatus, ""))


def _draw(config: pytest.Config, results: Path) -> Path:
    """Draw the page beside the results; returns its path."""
    from harness.report.gather import render

    complaint = state_of_run(config).results.complaint
    place = state_of_run(config).results_path
    return render([results], results.parent, root=state_of_run(config).suite, complaint=complaint, place=place)


def _shortcoming(state: State) -> str:
    """Return why a run fails although no test failed; empty if it does not."""
    plan = state.plan
    every = list(state.results.by_id.values())
    if every and not any(result.state == "passed" for result in every):
        return "no test passed"
    ran = [result for result in every if result.state != "skipped"]
    for lane in plan.lanes:
        if not any(result.lane == lane for result in ran):
            return f"lane {lane} was asked for and did not run"
    for name in state.programs.named if plan.names_programs else ():
        tested = {side["impl"] for result in ran for side in (result.a, result.b) if side}
        # A variant, `mine+fast`, is the implementation `mine`, too.
        if every and name not in tested | {each.partition("+")[0] for each in tested}:
            return f"{name} was asked for and all its tests were skipped"
    return ""


def _write_ktap(terminalreporter: pytest.TerminalReporter, state: State, failure: str) -> None:
    from harness.report.ktap import ktap_text
    from harness.report.results import write_in_one_step

    text = ktap_text((result for result in state.results.by_id.values() if result.state), failure)
    if state.plan.ktap == "-":
        terminalreporter.ensure_newline()
        terminalreporter.write(text)
    else:
        write_in_one_step(Path(state.plan.ktap), text)
        terminalreporter.write_line(f"KTAP: {state.plan.ktap}")


def _untraced(config: pytest.Config) -> str:
    watching = config.pluginmanager.getplugin(INTERACTIVE)
    return watching.untraced() if watching else ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    state = state_of_run(config)
    if not state.used or is_worker(config):
        return
    if _SHORTCOMING in config.stash:
        terminalreporter.write_line(f"wg-interop: {config.stash[_SHORTCOMING]}", red=True)
    if state.plan.ktap:
        _write_ktap(terminalreporter, state, config.stash.get(_SHORTCOMING, ""))
    if state.gate is not None:
        for line in filter(None, [*state.gate.compare().lines(), state.gate.remark]):
            terminalreporter.write_line(line)
    for line in config.stash.get(_REPORT, ()):
        terminalreporter.write_line(line)
    plan = state.plan
    failed = any(each.state in {"failed", "error"} and each.lane == "netns" for each in state.results.by_id.values())
    if failed and not (plan.keeps_lab_up or plan.lane_of_guest):
        terminalreporter.write_line("to look into the lab of a failed test: --pause-on-error, --shell NODE")
