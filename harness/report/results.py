"""Results: what became of each test, in the format that other programs rely on (report/results.json, schema 1)."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pytest

SCHEMA: Final = 1
UNSUPPORTED: Final = "unsupported: "
# How pytest words the outcomes that harness.plugin.verdicts raises.
DIFFERS: Final = "Differs: "
BLOCKED: Final = "Blocked: "
# The user property of a report that carries what the plugin knows of the test.
PROPERTY: Final = "wg-interop"
GATING: Final = frozenset({"failed", "error", "xpassed", "blocked"})
STATES: Final = (
    "passed", "failed", "error", "xfailed", "xpassed", "differs", "unsupported", "blocked", "flaky", "skipped",
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Result:
    """One result; identified by (id, a, b, lane, kernel)."""

    id: str
    a: dict[str, str] | None = None
    b: dict[str, str] | None = None
    lane: str = "core"
    kernel: str = ""
    state: str = ""
    """One of STATES; empty until the test has come so far."""
    seconds: float = 0.0
    scenarios: list[str] = field(default_factory=list)
    requirements: list[str] = field(default_factory=list)
    message: str = ""
    artifacts: str = ""

    @property
    def pair(self) -> str:
        """`A~B`, `A` for one implementation, `` for none."""
        return "~".join(side["impl"] for side in (self.a, self.b) if side)


class Results:
    """Collects pytest's reports into results, and writes them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.by_id: dict[tuple[str, str, str], Result] = {}
        """Every result by node id, lane and kernel, in the order in which the tests began."""

    def add(self, report: pytest.TestReport) -> Result:
        """Take one phase (setup, call or teardown) of a test; returns the result as it stands now."""
        facts = dict(report.user_properties).get(PROPERTY) or {}
        # Only the phase that ends last knows all; what it does not know must not erase what was known.
        facts = facts if isinstance(facts, dict) else {}
        identity = (report.nodeid, str(facts.get("lane", "core")), str(facts.get("kernel", "")))
        result = self.by_id.setdefault(identity, Result(id=report.nodeid))
        for name, value in facts.items():
            setattr(result, name, value)
        result.seconds = round(result.seconds + report.duration, 4)
        state = state_of(report)
        if state is not None and result.state not in GATING:
            result.state = state
            # The state says it already.
            result.message = "" if state == "passed" else message_of(report).removeprefix(DIFFERS).removeprefix(BLOCKED)
        return result

    def document(self) -> dict[str, Any]:
        """The whole, as it is written."""
        return {
            "schema": SCHEMA,
            "seed": self.seed,
            "host": {
                "kernel": platform.release(),
                "machine": platform.machine(),
                "python": platform.python_version(),
                "cpus": os.cpu_count(),
                "root": os.geteuid() == 0,
            },
            "results": [asdict(result) for result in self.by_id.values() if result.state],
        }

    def write(self, path: Path) -> None:
        """Write the file in one step, so that a reader never sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.document(), indent=1) + "\n")
        part.replace(path)


def state_of(report: pytest.TestReport) -> str | None:
    """The state that this phase of a test decides; None if it decides nothing."""
    expected = hasattr(report, "wasxfail")
    if report.skipped:
        states = {DIFFERS: "differs", UNSUPPORTED: "unsupported"}
        return "xfailed" if expected else _worded(message_of(report), states, "skipped")
    if report.failed:
        # A text and no exception: pytest's own word for a strict xfail that passed.
        if isinstance(report.longrepr, str) and report.longrepr.startswith("[XPASS(strict)]"):
            return "xpassed"
        return _worded(message_of(report), {BLOCKED: "blocked"}, "failed" if report.when == "call" else "error")
    if report.when == "call":
        return "xpassed" if expected else "passed"
    return None


def _worded(message: str, states: Mapping[str, str], otherwise: str) -> str:
    """The state that the beginning of a message stands for."""
    return next((state for beginning, state in states.items() if message.startswith(beginning)), otherwise)


def message_of(report: pytest.TestReport) -> str:
    """Why, in one line or a few: the exception's message, or the reason of a skip."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return str(crash.message)
    return str(getattr(report, "wasxfail", "")) or report.longreprtext[-500:]
