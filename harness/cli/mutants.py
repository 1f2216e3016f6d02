"""Run the killers of refwg's mutants: each must fail with its mutant, and pass without it.

The tables of mutants are in refwg/mutants/. docs/mutants.md explains their keys.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from harness import suite
from harness.cli.terminal import COULD_NOT, FAILED, OK
from harness.errors import Unavailable, UsageError
from harness.lanes import GUESTS
from harness.report.invariants import PREFIX
from harness.report.results import read_results
from harness.sandbox.launch import pytest_command
from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from harness.report.results import Result
    from harness.tables import Table

FOLDER: Final = Path("refwg", "mutants")
BASE: Final = "refwg"
# The other end of each pair: a program without the mutant, and none of ours.
PEER: Final = "wireguard-go"
ROLES: Final = ("a", "b", "both", "alone")
ENGINES: Final = ("simple", "batch")
_AT_ONCE: Final = 2
# Seconds for one killer; a guest boots first.
_DEADLINE: Final = 300.0
_LONG_DEADLINE: Final = 1200.0
# States of a test that does not fail; a deviation that the scenario allows may be the other end's.
_GOOD: Final = frozenset({"passed", "differs"})
_TAIL: Final = 3  # last lines of pytest's output that explain why there are no results


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A row of a table, without what changes the code.

    area: the name of the table. nightly: the mark of its killer. engine: the one that the mutant needs, or that the
    user chose; empty: any. needs_engine: whether the mutant chooses it by itself.
    """

    name: str
    area: str
    requirements: tuple[str, ...]
    killer: str
    role: str
    lane: str
    nightly: bool = False
    engine: str = ""
    needs_engine: bool = False

    @property
    def implementation(self) -> str:
        """The name of the variant: `refwg+NAME`, or `refwg+NAME+ENGINE` if the user chose an engine."""
        chosen = self.engine and not self.needs_engine
        return f"{BASE}+{self.name}+{self.engine}" if chosen else f"{BASE}+{self.name}"

    @property
    def base(self) -> str:
        """The name of refwg as it is: `refwg`, or `refwg+ENGINE` if the mutant needs an engine."""
        return f"{BASE}+{self.engine}" if self.engine else BASE

    def options(self) -> list[str]:
        """Return pytest's options that run the killer with the mutant, and with refwg as it is."""
        words = [f"--lane={self.lane}", *(["--nightly"] if self.nightly else [])]
        for name in (self.implementation, self.base):
            a, b = (PEER if self.role == "b" else name), (PEER if self.role == "a" else name)
            words.append(f"--impl={name}" if self.role == "alone" else f"--pair={a}~{b}")
        return words


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Whether the tests detect a mutant.

    by: ids of the tests that failed with it, or differ. cited: those of the mutant's requirements that these tests
    cite. reason: why the mutant was not caught; empty if it was. tested: False if its killer could not run.
    """

    name: str
    area: str
    requirements: tuple[str, ...]
    caught: bool
    by: tuple[str, ...]
    cited: tuple[str, ...]
    seconds: float
    reason: str = ""
    tested: bool = True

    def lines(self) -> str:
        """Return the lines for the terminal."""
        state = "caught" if self.caught else "not caught" if self.tested else "not tested"
        head = f"{state:<10} {self.name:<32} {self.seconds:6.1f} s  {', '.join(self.requirements)}"
        if not self.caught:
            return f"{head}\n{'':10} {self.reason}"
        cites = f"cites {', '.join(self.cited)}" if self.cited else "cites none of them"
        more = f" and {len(self.by) - 1} more" if len(self.by) > 1 else ""
        return f"{head}\n{'':10} by {self.by[0]}{more}, which {cites}"

    def as_json(self) -> dict[str, object]:
        """Return the finding with the fixed names of the format; requirement: the first one."""
        return {"requirement": self.requirements[0], **asdict(self)}


def read_mutants(root: Path) -> list[Mutant]:
    """Read the tables of a checkout, in the order of the files; raises UsageError for a mistake in them."""
    mutants = []
    for path in sorted((root / FOLDER).glob("*.toml")):
        mutants += [_mutant(row, path.stem) for row in read_toml(path, f"mutants {path.name}").tables("mutant")]
    if not mutants:
        raise UsageError(f"{root / FOLDER} has no tables of mutants; go to a checkout of wg-interop")
    return mutants


def _mutant(row: Table, area: str) -> Mutant:
    mutant = Mutant(
        name=row.text("name"),
        area=area,
        requirements=row.words("requirements"),
        killer=row.text("killer"),
        role=row.text("role"),
        lane=row.text("lane", "netns"),
        nightly=row.flag("nightly", default=False),
        needs_engine="engine" in row,
        engine=row.text("engine", ""),
    )
    for key in ("module", "text", "replacement"):
        row.text(key)
    row.refuse_rest()
    if mutant.role not in ROLES:
        raise row.wrong(f"role must be one of {', '.join(ROLES)}, not {mutant.role!r}")
    if mutant.engine and mutant.engine not in ENGINES:
        raise row.wrong(f"engine must be one of {', '.join(ENGINES)}, not {mutant.engine!r}")
    if not mutant.requirements:
        raise row.wrong("requirements names no requirement")
    return mutant


def choose(mutants: Sequence[Mutant], names: Sequence[str], areas: Sequence[str], engine: str = "") -> list[Mutant]:
    """Return the mutants with these names and in these areas; without names and areas, all. Raises UsageError.

    engine: each is to run with it, without those that need the other; empty: as its row says.
    """
    known = {mutant.name for mutant in mutants}
    for name in names:
        if name not in known:
            raise UsageError(f"no mutant {name}; there are: {', '.join(sorted(known))}")
    for area in areas:
        if area not in {mutant.area for mutant in mutants}:
            raise UsageError(f"no area {area}; there are: {', '.join(sorted({m.area for m in mutants}))}")
    chosen = [mutant for mutant in mutants if not (names or areas) or mutant.name in names or mutant.area in areas]
    if not engine:
        return chosen
    chosen = [replace(mutant, engine=engine) for mutant in chosen if mutant.engine in {"", engine}]
    if not chosen:
        raise UsageError(f"none of these mutants runs with engine {engine}")
    return chosen


def run_mutants(root: Path, mutants: Sequence[Mutant], out: TextIO, *, as_json: bool) -> int:
    """Run the killers of these mutants, two at a time, and print the findings; returns the exit status."""
    findings = []
    with tempfile.TemporaryDirectory(prefix="wg-interop-mutants-") as scratch:
        for finding in _findings(root, mutants, Path(scratch)):
            findings.append(finding)
            if not as_json:
                print(finding.lines(), file=out, flush=True)
    caught = sum(finding.caught for finding in findings)
    if as_json:
        order = [mutant.name for mutant in mutants]
        findings.sort(key=lambda finding: order.index(finding.name))
        print(json.dumps({"mutants": [finding.as_json() for finding in findings]}, indent=1), file=out)
    else:
        print(f"{caught} of {len(findings)} mutants caught", file=out)
    if any(finding.tested and not finding.caught for finding in findings):
        return FAILED
    return OK if caught == len(findings) else COULD_NOT


class _Killing:
    """The run of one killer in a process of its own."""

    def __init__(self, root: Path, mutant: Mutant, directory: Path) -> None:
        self.mutant = mutant
        self._results = directory / "results.json"
        self._output = directory / "output"
        self._started = time.monotonic()
        is_guest = mutant.lane in GUESTS
        self._deadline = self._started + (_LONG_DEADLINE if is_guest or mutant.nightly else _DEADLINE)
        directory.mkdir()
        command = [*pytest_command(guests=is_guest), "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += suite.pytest_options()
        # A run that is started by a test must not take that test's variables for its own.
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, f"--results={self._results}", "--keep=none", *mutant.options(), mutant.killer],
                cwd=root, env=clean, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.pidfd = os.pidfd_open(self._process.pid)

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self._deadline - time.monotonic())

    def finding(self) -> Finding:
        """Return the finding of a killer that has ended, or is late."""
        seconds = round(time.monotonic() - self._started, 1)
        late = self._process.poll() is None
        self.close()
        results = read_results(self._results).results if self._results.exists() and not late else []
        reason = f"{self.mutant.killer} did not end within {seconds:.0f} s" if late else self._last_lines()
        return judge(self.mutant, results, seconds, reason)

    def close(self) -> None:
        """End the process, if it still runs."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def _last_lines(self) -> str:
        lines = self._output.read_text(errors="replace").split("\n")
        return " / ".join([line.strip() for line in lines if line.strip()][-_TAIL:])


def _findings(root: Path, mutants: Sequence[Mutant], scratch: Path) -> Iterator[Finding]:
    """Run the killers and yield each finding when its killer has ended."""
    waiting = list(mutants)
    running: dict[int, _Killing] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _AT_ONCE:
                mutant = waiting.pop(0)
                killing = _Killing(root, mutant, scratch / mutant.name)
                running[killing.pidfd] = killing
            timeout = min(killing.seconds_left for killing in running.values())
            ended, _, _ = select.select(list(running), [], [], timeout)
            late = [pidfd for pidfd, killing in running.items() if not killing.seconds_left]
            for pidfd in {*ended, *late}:
                yield running.pop(pidfd).finding()
    finally:
        for killing in running.values():
            killing.close()


def judge(mutant: Mutant, results: Sequence[Result], seconds: float, reason: str = "") -> Finding:
    """Judge the results of a killer.

    A mutant is caught if a test fails with it, or reports a difference, and none does so with refwg as it is.

    reason: why there are no results, if there are none.
    """
    # The oracle may notice the mutant in any test; its killer has to notice it without that.
    of_killer = [result for result in results if not result.id.startswith(PREFIX)]
    ours = [result for result in of_killer if mutant.implementation in result.pair.split("~")]
    others = [result for result in of_killer if result not in ours]
    # A deviation from a should ends as `differs`; one that refwg shows as well is not the mutant's.
    detected = {"failed"} if any(result.state == "differs" for result in others) else {"failed", "differs"}
    failed = [result for result in ours if result.state in detected]
    tested = True
    if wrong := [result for result in others if result.state in {"failed", "error", "blocked"}]:
        reason = f"{wrong[0].id} is {wrong[0].state} with {mutant.base} as it is, too: {wrong[0].message}"
    elif not any(result.state in _GOOD for result in others) or not ours:
        tested = False
        reason = next((result.message for result in [*others, *ours] if result.message), reason)
    elif failed:
        reason = ""
    else:
        states = ", ".join(sorted({result.state for result in ours}))
        messages = [f": {result.message}" for result in ours if result.message]
        reason = f"{mutant.killer} is {states}{''.join(messages[:1])}"
    cited = {name for result in failed for name in (*result.requirements, *result.bugs)}
    return Finding(
        name=mutant.name,
        area=mutant.area,
        requirements=mutant.requirements,
        caught=tested and not reason,
        by=tuple(result.id for result in failed),
        cited=tuple(name for name in mutant.requirements if name in cited),
        seconds=seconds,
        reason=reason,
        tested=tested,
    )


def run_command(
    root: Path, names: Sequence[str], areas: Sequence[str], out: TextIO, *, engine: str, as_json: bool
) -> int:
    """Choose the mutants and run them: the command `wg-interop mutants`."""
    if not (root / FOLDER).is_dir():
        raise Unavailable(f"{root} has no {FOLDER}; go to a checkout of wg-interop")
    return run_mutants(root, choose(read_mutants(root), names, areas, engine), out, as_json=as_json)
