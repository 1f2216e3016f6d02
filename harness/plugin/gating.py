"""Decide if a failure counts: baseline, and implementations that must be included."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.errors import UsageError
from harness.lanes import GUESTS

if TYPE_CHECKING:
    from harness.report.baseline import Baseline, Comparison
    from harness.report.results import Result, Results


class Gate:
    """The baseline of a run, on the controller of xdist or in a run without it."""

    def __init__(self, path: Path, *, update: bool) -> None:
        """Read the baseline; raises pytest.UsageError for a mistake in it."""
        from harness.report.baseline import Baseline, read_baseline
        from harness.report.results import GATING

        self._path = path
        self._name = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
        self._update = update
        try:
            # A run that writes the baseline makes it if it is not there.
            entries = [] if update and not path.exists() else read_baseline(path, GATING)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None
        self._baseline: Baseline = Baseline(entries, update=update)
        self._updated = False

    def judge(self, report: pytest.TestReport) -> None:
        """Turn the report of a known failure into an expected one; to be called before anything else takes it."""
        from harness.report.baseline import failure_of
        from harness.report.results import GATING, facts_of, message_of, set_facts, state_of

        state, facts = state_of(report), facts_of(report)
        # The death of a guest is never known: nobody can say what its tests would have shown.
        if not report.failed or state not in GATING or report.nodeid.partition("::")[0] in GUESTS:
            return
        message = message_of(report)
        failure = failure_of(facts, nodeid=report.nodeid, state=state, message=message)
        if not self._baseline.forgives(failure):
            return
        report.outcome = "skipped"
        report.wasxfail = f"known {state} of baseline {self._path.name}"
        set_facts(report, facts | {"state": "xfailed", "message": message, "baseline": state})

    def end(self, result: Result) -> None:
        """Take a test that has ended."""
        from harness.report.baseline import Failure

        names = [(side or {}).get("impl", "") for side in (result.a, result.b)]
        self._baseline.end(Failure(id=result.id, a=names[0], b=names[1], lane=result.lane), result.state)

    def close(self, *, complete: bool) -> None:
        """End the run. complete: whether it ran to its end and shows something, so that the baseline may be written."""
        if self._update and complete:
            from harness.report.baseline import baseline_text
            from harness.report.results import write_in_one_step

            write_in_one_step(self._path, baseline_text(self._baseline.entries()))
            self._updated = True

    def compare(self) -> Comparison:
        """Return the result of the run beside the baseline."""
        return self._baseline.compare(self._name, updated=self._updated)

    @property
    def remark(self) -> str:
        """Why the baseline was not written although it should be; empty otherwise."""
        kept = self._update and not self._updated
        return f"baseline {self._name} is not written: the run is not complete, or no test passed" if kept else ""


def open_gate(path: Path | None, *, update: bool) -> Gate | None:
    """Return the gate of `--baseline`; None without it."""
    if path is None:
        if update:
            raise pytest.UsageError("--update-baseline: which file? add --baseline FILE")
        return None
    return Gate(path, update=update)


def why_not_included(names: tuple[str, ...], results: Results) -> str:
    """Return why an implementation of `--must-include` is not included in what was shown; empty if all are."""
    for name in names:
        every = [result for result in results.by_id.values() if _is_of(result, name)]
        if any(result.state == "passed" for result in every):
            continue
        if not every:
            return f"--must-include {name}: no test of {name} ran"
        others = [result for result in every if result.message]
        why = f"; {others[0].state}: {others[0].message.splitlines()[0]}" if others else ""
        return f"--must-include {name}: none of {len(every)} tests of {name} passed{why}"
    return ""


def _is_of(result: Result, name: str) -> bool:
    # A variant, `mine+fast`, is the implementation `mine`, too.
    sides = {side["impl"] for side in (result.a, result.b) if side}
    return name in sides | {side.partition("+")[0] for side in sides}
