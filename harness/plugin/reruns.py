"""Run failed tests again in other pairs, to name the program to blame (`--blame`).

The tests run one after the other in another pytest, with the programs, the seed and the kernel of this run. It has a
sandbox below that of this run, which the kernel removes when the time is over. harness/report/blame.py gives the
verdict, harness/report/wire_difference.py compares the captures.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import pytest

from harness.lanes import GUESTS
from harness.plugin.reporter import executes_tests
from harness.plugin.session import REPORTER, file_name, is_worker, state_of_run

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence
    from pathlib import Path

    from harness.plugin.nested import NestedPytest
    from harness.plugin.session import State
    from harness.report.blame import Blame, Rerun, Trial
    from harness.report.results import Result

# Programs that take the place of A or B, the first one that is neither and is installed.
_REFEREES: Final = ("refwg", "wireguard-go", "kernel")
# Seconds that must be left to boot a guest for reruns: a boot takes a minute under emulation.
_GUEST: Final = 90.0
# Folder of the evidence of reruns, in that of the run's tests.
_FOLDER: Final = "again"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """A failed result that is to be run again. ids: of its reruns, by pair."""

    result: Result
    trial: Trial
    ids: Mapping[str, str]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Run the failed tests again when all others have ended, those in guests too (hook)."""
    try:
        answer = yield
    except session.Failed:
        # -x or --maxfail has ended the run; Ctrl-C is another exception.
        _blame(session.config)
        raise
    _blame(session.config)
    return answer


def _blame(config: pytest.Config) -> None:
    state = state_of_run(config)
    if not state.used or state.plan.lane_of_guest or is_worker(config) or not executes_tests(config):
        return
    from harness.report.blame import RUN_AGAIN
    from harness.report.invariants import PREFIX

    failed = [result for result in state.results.by_id.values() if result.state in RUN_AGAIN and result.a]
    tests = [result for result in failed if not result.id.startswith(PREFIX)]
    for result in failed:
        if result not in tests:
            result.blame = _of_oracle(result)
    # With --pdb, --shell and the like the user is looking at the failures.
    if tests and state.plan.blame and not (state.plan.is_watched or config.option.usepdb):
        _Blaming(config, state).run(tests)


def _of_oracle(result: Result) -> Blame:
    """Return the blame of an invariant of the oracle: the role of the sender ends its id."""
    from harness.report.blame import of_sender

    a, b = _sides(result)
    return of_sender(a, b, "b" if b and result.id.endswith("-b]") else "a")


def _sides(result: Result) -> tuple[str, str]:
    """Return the names of A and B; B is empty for a test of one implementation."""
    a, b = ((side or {}).get("impl", "") for side in (result.a, result.b))
    return a, b


class _Blaming:
    """The reruns of one session, within the seconds of `--blame-seconds`."""

    def __init__(self, config: pytest.Config, state: State) -> None:
        self._config = config
        self._state = state
        self._deadline = time.monotonic() + state.plan.blame_seconds
        self._over = f"the {state.plan.blame_seconds:g} s for that were over (--blame-seconds)"
        self._installed: dict[str, bool] = {}
        # The results for whose reruns the time was over.
        self._late: list[Result] = []

    def run(self, failed: Sequence[Result]) -> None:
        """Run these results again, the shortest test of each cause first, and set what they show."""
        from harness.plugin.nested import INTERRUPTED
        from harness.report.blame import by_turns, undecided
        from harness.report.results import causes_of

        causes = causes_of(failed)
        ordered = by_turns([sorted(cause.witnesses, key=lambda result: result.seconds) for cause in causes])
        lanes: dict[tuple[str, str], list[_Failure]] = {}
        for result in ordered:
            if (failure := self._failure(result)) is not None:
                lanes.setdefault((result.lane, result.kernel), []).append(failure)
        try:
            # A guest takes a minute to boot, so its tests come last.
            for lane, kernel in sorted(lanes, key=lambda place: place[0] in GUESTS):
                self._run_in(lane, kernel, lanes[lane, kernel])
        except KeyboardInterrupt:
            for result in ordered:
                result.blame = result.blame or undecided(result.state, INTERRUPTED)
            raise
        for cause in causes:
            self._infer(cause.witnesses)

    def _infer(self, witnesses: Sequence[Result]) -> None:
        """Set the blame of the tests of a cause for which the time was over, by its other tests."""
        from harness.report.blame import like_others

        late = [result for result in witnesses if result in self._late]
        others = [result.blame for result in witnesses if result.blame and result not in late]
        for result in late:
            if result.blame is not None:
                result.blame = like_others(*_sides(result), result.blame, others)

    def _failure(self, result: Result) -> _Failure | None:
        """Return what to run for a failed result; None, with the reason in the result, if that is not possible."""
        from harness.report.blame import Trial, choose_referee, other_id, undecided

        a, b = _sides(result)
        referee = choose_referee(a, b or None, (name for name in self._candidates() if self._has(name, result.lane)))
        trial = Trial(a=a, b=b or None, referee=referee)
        ids = {pair: other_id(result.id, result.pair, pair) for pair in trial.pairs}
        reason = "" if referee else "no other program is installed that could take the place of A or B"
        if result.id.startswith("::"):
            reason = f"its file is not below the root directory {self._config.rootpath} (--rootdir)"
        elif not all(ids.values()):
            reason = f"the parameters of its id do not begin with {result.pair}"
        if reason:
            result.blame = undecided(result.state, reason)
            return None
        return _Failure(result=result, trial=trial, ids=ids)

    def _candidates(self) -> Iterable[str]:
        programs = self._state.programs
        return dict.fromkeys((*_REFEREES, *(programs.named or programs.known)))

    def _has(self, name: str, lane: str) -> bool:
        """Whether this program can run in a lane."""
        from harness.implementations.registry import Registry

        if name == "kernel" and lane in GUESTS:
            return True
        if name not in self._installed:
            plan = self._state.plan
            registry = Registry.of_options(plan.programs, plan.manifests, plan.likes)
            self._installed[name] = not registry.get(name).why_unavailable()
        return self._installed[name]

    def _run_in(self, lane: str, kernel: str, failures: Sequence[_Failure]) -> None:
        """Run all failures of a lane on a kernel again, and set their results."""
        from harness.report.blame import undecided

        left = self._deadline - time.monotonic()
        reason = self._over if left <= 0 else ""
        if lane in GUESTS and left < _GUEST:
            reason = f"a guest takes {_GUEST:g} s or more, and {max(left, 0):.0f} s were left (--blame-seconds)"
        if reason:
            for failure in failures:
                failure.result.blame = undecided(failure.result.state, reason)
                self._late.append(failure.result)
            return
        nested = self._nested(lane, kernel, failures)
        try:
            nested.run(self._deadline, self._show)
        finally:
            # Ctrl-C ends the reruns; what they have shown until then counts.
            reruns = nested.reruns()
            for failure in failures:
                failure.result.blame = self._judge(failure, reruns, nested)
                if failure.result.blame.verdict == "flaky":
                    failure.result.state = "flaky"

    def _nested(self, lane: str, kernel: str, failures: Sequence[_Failure]) -> NestedPytest:
        from harness.plugin.nested import NestedPytest

        return NestedPytest(
            self._config,
            self._state,
            lane=lane,
            kernel=self._state.results.invocation.kernels.get(kernel, ""),
            ids=list(dict.fromkeys(name for failure in failures for name in failure.ids.values())),
            pairs=list(dict.fromkeys(pair for failure in failures for pair in _pairs(failure.trial))),
            directory=self._state.scratch() / _FOLDER / file_name(f"{lane}-{kernel}"),
        )

    def _show(self, done: int, of: int) -> None:
        """Report the progress to `wg-interop run`."""
        left = max(0.0, self._deadline - time.monotonic())
        text = f"to find out who is to blame, {done} of {of} tests run again, {left:.0f} s left for that"
        self._config.pluginmanager.getplugin(REPORTER).note(text)

    def _judge(self, failure: _Failure, reruns: Mapping[str, Rerun], nested: NestedPytest) -> Blame:
        from harness.report.blame import FLAKY, UNDECIDED, judge

        result, trial = failure.result, failure.trial
        own = {pair: replace(reruns[name], pair=pair) for pair, name in failure.ids.items() if name in reruns}
        blame = judge(trial, own, result.state, nested.complaint or self._over)
        if blame.verdict == UNDECIDED and len(own) < len(failure.ids) and not nested.complaint:
            self._late.append(result)
        wire = "" if blame.verdict == FLAKY else _wire(trial, own, nested.place)
        kept = tuple(self._keep(rerun, failure.ids[rerun.pair], trial, nested.place) for rerun in blame.reruns)
        return replace(blame, wire=wire, reruns=kept)

    def _keep(self, rerun: Rerun, name: str, trial: Trial, place: Path) -> Rerun:
        """Copy the evidence of a rerun that failed, or that others are compared with, into the report."""
        from harness.report.blame import RUN_AGAIN

        source = place / rerun.artifacts
        is_of_use = rerun.state in RUN_AGAIN or rerun.pair in {trial.again, trial.reference}
        if self._state.plan.keep == "none" or not (rerun.artifacts and is_of_use and source.is_dir()):
            return replace(rerun, artifacts="")
        report = self._state.report_directory
        target = report / "evidence" / _FOLDER / place.name / file_name(name)
        # Several failed tests may share a rerun.
        if not target.exists():
            shutil.copytree(source, target)
        return replace(rerun, artifacts=str(target.relative_to(report)))


def _pairs(trial: Trial) -> Iterable[str]:
    """Return the pairs that pytest must know; a test of one implementation takes its programs from them, too."""
    return trial.pairs if trial.b else [f"{trial.a}~{trial.referee}"]


def _wire(trial: Trial, reruns: Mapping[str, Rerun], place: Path) -> str:
    """Return the first difference on the wire between the failing pair and the referee with itself."""
    from harness.report.wire_difference import difference

    ends = [reruns.get(pair) for pair in (trial.reference, trial.again)]
    folders = [place / rerun.artifacts for rerun in ends if rerun and rerun.artifacts]
    if len(folders) < len(ends):
        return ""
    return difference(folders[0], folders[1], named=trial.reference, b="B" if trial.b else "the peer")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print for each failed test who is to blame, and the reason (hook)."""
    state = state_of_run(config)
    if not (state.plan.blame and state.used) or is_worker(config):
        return
    if blamed := [result for result in state.results.by_id.values() if result.blame]:
        terminalreporter.section("who is to blame")
        for result in blamed:
            _print(terminalreporter, result.id, result.blame)


def _print(terminalreporter: pytest.TerminalReporter, name: str, blame: Blame | None) -> None:
    if blame is not None:
        terminalreporter.write_line(f"{blame.words.upper()} {name} - {blame.text}")
        if blame.wire:
            terminalreporter.write_line(f"    on the wire: {blame.wire}")
