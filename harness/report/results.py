"""Decide each result's state from pytest's reports; write report/results.json (schema 1)."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from harness.report.baseline import read_comparison
from harness.report.bench import read_bench
from harness.report.blame import read_blame
from harness.report.causes import find_causes
from harness.tables import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import pytest

    from harness.report.baseline import Comparison
    from harness.report.bench import Bench
    from harness.report.blame import Blame
    from harness.report.causes import Cause
    from harness.tables import Table

SCHEMA: Final = 1
# The attribute of pytest's report that carries the plugin's facts about the test. xdist sends attributes from a worker
# as it sends user properties, but pytest does not write attributes into JUnit files.
_FACTS: Final = "wg_interop"
# The names of the properties that a test case has in JUnit files begin with this.
_PREFIX: Final = "wg."
PAGE: Final = "index.html"
LOG: Final = "pytest.log"
# Entries that a report may have beside its file of results: the page, the tests' evidence, pytest's output.
BESIDE: Final = (PAGE, "evidence", LOG)
# Facts of one phase; the result's state and message are made from those of all phases. What the oracle found in a test
# makes results of its own (invariants.py).
_OF_A_PHASE: Final = frozenset({"state", "message", "oracle"})
# Classes whose name adds nothing to the message, which begins with what failed and what was expected.
_PLAIN_CLASS: Final = re.compile(r"(?:harness\.[\w.]+|_pytest\.outcomes\.\w+|AssertionError|Failed): ")
GATING: Final = frozenset({"failed", "error", "xpassed", "blocked", "not_reached", "flaky"})
STATES: Final = (
    "passed", "failed", "error", "xfailed", "xpassed", "differs", "unsupported", "blocked", "not_reached", "flaky",
    "skipped",
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
    """One of STATES; empty until a phase has decided it."""
    seconds: float = 0.0
    scenarios: list[str] = field(default_factory=list)
    requirements: list[str] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    message: str = ""
    artifacts: str = ""
    blame: Blame | None = None
    """What its reruns showed (`--blame`); None if it did not fail, or was not to be run again."""
    baseline: str = ""
    """The state before the baseline made it `xfailed`; empty if the baseline does not list it."""

    @property
    def blamed(self) -> tuple[str, ...] | None:
        """The programs to blame for its failure; None if reruns have not decided that."""
        return self.blame.settled if self.blame else None

    @property
    def is_inferred(self) -> bool:
        """Whether it was blamed like the other tests of its cause, without reruns of its own."""
        return self.blame is not None and self.blame.inferred

    @property
    def pair(self) -> str:
        """`A~B`; `A` for one implementation, empty for none."""
        return "~".join(side["impl"] for side in (self.a, self.b) if side)


@dataclass(slots=True, kw_only=True)
class Invocation:
    """The options of a run that another run of one of its tests needs. All paths are absolute."""

    root: str = ""
    """pytest's root directory, which the ids of tests are relative to."""
    config_file: str = ""
    """pytest's configuration file; empty without one."""
    results: str = ""
    """The path of the file of results."""
    programs: dict[str, str] = field(default_factory=dict)
    """Name of the implementation -> program of `--impl NAME=PROGRAM`."""
    manifests: dict[str, str] = field(default_factory=dict)
    """Name of the implementation -> file of `--impl-manifest`."""
    kernels: dict[str, str] = field(default_factory=dict)
    """Release of a guest's kernel -> value of `--kernel`."""
    kernel_modules: tuple[str, ...] = ()
    """Files of `--kernel-module`."""
    timeout_scale: float = 1.0
    nightly: bool = False
    keep: str = "failed"


class Results:
    """Collects pytest's reports into results, and writes them."""

    def __init__(self, seed: int, invocation: Invocation | None = None) -> None:
        self.seed = seed
        self.invocation = invocation or Invocation()
        self.comparison: Comparison | None = None
        self.complaint = ""
        self.bench: Bench | None = None
        self.by_id: dict[tuple[str, str, str], Result] = {}
        """Every result by node id, lane and kernel, in the order in which the tests began."""

    def add(self, report: pytest.TestReport) -> Result:
        """Add one phase (setup, call or teardown) of a test; returns the result so far."""
        # A phase may lack a fact that an earlier one had, and must not erase it.
        facts = facts_of(report)
        identity = (report.nodeid, str(facts.get("lane", "core")), str(facts.get("kernel", "")))
        result = self.by_id.setdefault(identity, Result(id=report.nodeid))
        for name in facts.keys() - _OF_A_PHASE:
            setattr(result, name, facts[name])
        result.seconds = round(result.seconds + report.duration, 4)
        state = state_of(report)
        if state is not None and result.state not in GATING:
            result.state = state
            # A passed test has a message if it has lost a known failure (--like).
            result.message = str(facts.get("message", "")) if state == "passed" else message_of(report)
        return result

    @property
    def any(self) -> bool:
        """Return whether a test has a state yet."""
        return any(result.state for result in self.by_id.values())

    def document(self, files: Sequence[str] = ()) -> dict[str, object]:
        """Build the document that `write` writes. files: the names in BESIDE that this report has."""
        return {
            "schema": SCHEMA,
            "seed": self.seed,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": {
                "kernel": platform.release(),
                "machine": platform.machine(),
                "python": platform.python_version(),
                "cpus": os.cpu_count(),
                "root": os.geteuid() == 0,
            },
            "run": asdict(self.invocation),
            "files": list(files),
            "complaint": self.complaint,
            "baseline": asdict(self.comparison) if self.comparison else None,
            "bench": asdict(self.bench) if self.bench else None,
            "results": [asdict(result) for result in self.by_id.values() if result.state],
            "causes": [
                {
                    "programs": list(cause.programs),
                    "message": cause.typical.message,
                    "tests": [witness.id for witness in cause.witnesses],
                    "requirements": cause.requirements,
                    "bugs": cause.bugs,
                }
                for cause in self.causes()
            ],
        }

    def causes(self) -> list[Cause[Result]]:
        """Group the failures of this run by cause, the cause with the most witnesses first."""
        return causes_of(self.by_id.values())

    def write(self, path: Path, files: Sequence[str] = ()) -> None:
        """Write the file atomically; makes its folder if that is missing. files: as for `document`."""
        write_in_one_step(path, json.dumps(self.document(files), indent=1) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResults:
    """The contents of a file that Results.write has written."""

    seed: int
    host: Mapping[str, object]
    results: list[Result]
    invocation: Invocation
    date: str = ""
    """When the file was written, in UTC: `2026-11-30T21:04:05+00:00`; empty in a file of an older version."""
    comparison: Comparison | None = None
    """The result beside the baseline of `--baseline`; None without it."""
    complaint: str = ""
    """Why the run failed, if not by its tests."""
    bench: Bench | None = None
    """What bench/run has measured; None if the report has none of that."""


def causes_of(results: Iterable[Result]) -> list[Cause[Result]]:
    """Group the failures among these results by cause, the cause with the most witnesses first."""
    every = list(results)
    failed = [result for result in every if result.state in GATING]
    return find_causes(failed, [result for result in every if result.state == "passed"])


def read_results(path: Path) -> RunResults:
    """Read a file of results; raises UsageError if it is malformed or has another schema."""
    document = read_json(path, str(path))
    schema = document.take("schema")
    if schema != SCHEMA:
        raise document.wrong(f"schema {schema!r} is not supported, only {SCHEMA}")
    return RunResults(
        seed=document.number("seed"),
        host=document.table("host").take_rest(),
        results=[_read_result(entry) for entry in document.tables("results", "result")],
        invocation=_read_invocation(document.table("run")),
        date=document.text("date", ""),
        comparison=read_comparison(document.table("baseline")),
        complaint=document.text("complaint", ""),
        bench=read_bench(document.table("bench")),
    )


def _read_invocation(entry: Table) -> Invocation:
    return Invocation(
        root=entry.text("root", ""),
        config_file=entry.text("config_file", ""),
        results=entry.text("results", ""),
        programs=entry.strings("programs", {}),
        manifests=entry.strings("manifests", {}),
        kernels=entry.strings("kernels", {}),
        kernel_modules=entry.words("kernel_modules", ()),
        timeout_scale=entry.decimal("timeout_scale", 1.0),
        nightly=entry.flag("nightly", default=False),
        keep=entry.text("keep", "failed"),
    )


def _read_result(entry: Table) -> Result:
    return Result(
        id=entry.text("id"),
        a=_read_side(entry.table("a")),
        b=_read_side(entry.table("b")),
        lane=entry.text("lane", "core"),
        kernel=entry.text("kernel", ""),
        state=entry.text("state", ""),
        seconds=entry.decimal("seconds", 0.0),
        scenarios=[*entry.words("scenarios", ())],
        requirements=[*entry.words("requirements", ())],
        bugs=[*entry.words("bugs", ())],
        message=entry.text("message", ""),
        artifacts=entry.text("artifacts", ""),
        blame=read_blame(entry.table("blame")),
        baseline=entry.text("baseline", ""),
    )


def _read_side(side: Table) -> dict[str, str] | None:
    if not side.rest():
        return None
    read = {"impl": side.text("impl"), "version": side.text("version", "unknown")}
    return read | {"like": like} if (like := side.text("like", "")) else read


def write_in_one_step(path: Path, text: str) -> None:
    """Write a file atomically, so that a reader never sees half of it; makes its folder if that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="replace")
    part.replace(path)


def facts_of(report: pytest.TestReport) -> dict[str, object]:
    """Return the plugin's facts about this phase of a test, wherever it ran; empty for a test that is not ours."""
    facts = getattr(report, _FACTS, None)
    return facts if isinstance(facts, dict) else {}


def artifacts_in(data: Mapping[str, object]) -> str:
    """Return the path of the evidence that a report in JSON names, below the directory of the results; else nothing."""
    facts = data.get(_FACTS)
    return str(facts.get("artifacts") or "") if isinstance(facts, dict) else ""


def set_facts(report: pytest.TestReport, facts: Mapping[str, object]) -> None:
    """Add facts to the report; their values must be valid in JSON."""
    setattr(report, _FACTS, dict(facts))


def set_properties(report: pytest.TestReport, result: Result, seed: int) -> None:
    """Add the result to the report as user properties, which pytest writes into JUnit files (docs/results.md)."""
    values = {
        "impl.a": (result.a or {}).get("impl", ""),
        "impl.a.version": (result.a or {}).get("version", ""),
        "impl.b": (result.b or {}).get("impl", ""),
        "impl.b.version": (result.b or {}).get("version", ""),
        "lane": result.lane,
        "kernel": result.kernel,
        "seed": str(seed),
        "state": result.state,
        "scenarios": " ".join(result.scenarios),
        "requirements": " ".join(result.requirements),
        "bugs": " ".join(result.bugs),
        "artifacts": result.artifacts,
    }
    # A guest's report already has those of the guest.
    others = [entry for entry in report.user_properties if not entry[0].startswith(_PREFIX)]
    report.user_properties = others + [(_PREFIX + name, value) for name, value in values.items() if value]


def state_of(report: pytest.TestReport) -> str | None:
    """Return the state that this phase of a test decides; None if it decides nothing.

    States that are not outcomes of pytest come as a fact from `harness.plugin.verdicts`: `differs`, `blocked`,
    `not_reached`, `unsupported`, and `xpassed` of a strict expectation. All others follow from pytest's outcome and
    the phase.
    """
    if state := facts_of(report).get("state"):
        return str(state)
    if report.skipped:
        return "xfailed" if hasattr(report, "wasxfail") else "skipped"
    if report.failed:
        return "failed" if report.when == "call" else "error"
    if report.when == "call":
        return "xpassed" if hasattr(report, "wasxfail") else "passed"
    return None


def in_words(state: str) -> str:
    """Return the name of a state as people write it: `not reached`."""
    return state.replace("_", " ")


def message_of(report: pytest.TestReport) -> str:
    """Return why a test did not pass: the plugin's note, the exception's message, or the reason of a skip."""
    if message := facts_of(report).get("message"):
        return str(message)
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return without_class(str(crash.message))
    if reason := getattr(report, "wasxfail", ""):
        return str(reason)
    # Not an exception, but for example a missing fixture: pytest begins the lines of the error with E.
    marked = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E  ")]
    return "\n".join(marked) or report.longreprtext


def without_class(message: str) -> str:
    """Remove an exception's class from its message if it is the harness's or AssertionError: the clue comes first."""
    match = _PLAIN_CLASS.match(message)
    return message[match.end() :] if match else message
