"""Run the tests of lanes `vm` and `warp` in guests, as part of one pytest session.

The guest runs pytest on the same files. Each of its reports comes back and goes to this session's hooks, as if the test
had run here; xdist does so with its workers. A guest that crashes or hangs is a failed result of its own.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import pytest

from harness import suite
from harness.errors import HarnessError
from harness.lanes import EVENTS, LANE, SHARD
from harness.plugin.remote import EventParser, RemotePool, RemoteReporter, carry_programs
from harness.plugin.selection import files_left_to_guests
from harness.plugin.session import REPORTER, file_name, state_of_run
from harness.report.results import facts_of, set_facts
from harness.sandbox.launcher import INSIDE
from harness.vm import boot, kernels
from harness.vm.objects import leaks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from harness.plugin.options import RunPlan
    from harness.plugin.session import State
    from harness.vm.boot import VmResult

KERNEL: Final = "kernel"
# The inode that Linux gives to its first PID namespace (include/linux/proc_ns.h).
FIRST_PID_NAMESPACE: Final = str(0xEFFFFFFC)
# Plugins that no test in a guest uses, and whose import takes seconds under emulation.
UNUSED_PLUGINS: Final = ("cacheprovider", "hypothesispytest", "random_order")
# Factor of all deadlines in a guest, because emulation is slow.
TIMEOUT_SCALE: Final = 4.0
DEADLINES: Final = {"vm": 1800.0, "warp": 1800.0}


@dataclass(frozen=True, slots=True)
class Shard:
    """The work of one guest: every `count`-th test of a lane on a kernel, from `number` on."""

    lane: str
    kernel: str
    number: int = 0
    count: int = 1


class Guests:
    """The guests of one session; they run at the same time as the session's own tests."""

    def __init__(self, config: pytest.Config, state: State) -> None:
        self._config = config
        self._state = state
        self._plan = state.plan

    def prepare(self) -> None:
        """Fetch the kernels and build the guest's root; needs the network. Raises pytest.UsageError."""
        try:
            boot.require_in_guest(self._config.rootpath)
            for kernel in self.kernels:
                boot.find(kernel, self._plan.kernel_modules)
        except HarnessError as error:
            raise pytest.UsageError(str(error)) from error

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels of `--kernel`, or the default of harness/vm/kernels.toml."""
        return self._plan.kernels or (kernels.CATALOGUE.default,)

    @contextmanager
    def beside(self, session: pytest.Session) -> Iterator[RemotePool]:
        """Run the guests of the plan beside the session's own tests, at most `-n`, or the N of `--on`, at a time.

        They start when it is known which files hold tests for them. Guests that still run at the end are stopped.
        """
        counts = {lane: self._plan.guests_at_once(lane) for lane in self._plan.guest_lanes}
        at_once = max(counts.values(), default=1)
        shards = [
            (Shard(lane, kernel, number, count), leaks)
            for lane, count in counts.items()
            for kernel in self.kernels
            for leaks in [LeakCheck(count)]
            for number in range(count)
        ]

        def start(files: Iterable[str]) -> None:
            if words := selection(self._config, self._plan, files):
                for shard, leaks in shards:
                    self._start(shard, leaks, words, pool)

        pool = RemotePool(session, at_once, start, lambda: files_left_to_guests(self._state.scratch()))
        self._config.pluginmanager.register(pool)
        try:
            yield pool
        finally:
            pool.close()
            self._config.pluginmanager.unregister(pool)

    def _start(self, shard: Shard, leaks: LeakCheck, words: list[str], pool: RemotePool) -> None:
        reporter = GuestReporter(self._config, shard, self._state.report_directory / "evidence", leaks)
        parser = EventParser()

        def ended(result: VmResult) -> None:
            reporter.ended(result, parser.text)

        def show(data: bytes) -> None:
            pool.put(partial(reporter.take_all, parser.feed(data)))

        pool.start(lambda: self._boot(shard, words, show, pool.stop), ended, reporter.failed)

    def _boot(self, shard: Shard, words: list[str], show: Callable[[bytes], None], stop: int) -> VmResult:
        """Boot a guest, run its shard of the tests that `words` select, and wait for its end."""
        files, programs = self.programs()
        lane = lane_arguments(shard.lane, self._config.option.markexpr, self._plan)
        place = suite.pytest_options() if self._state.runs_suite else []
        arguments = [*words, *programs, *self.pairs(shard.lane), *lane, "--seed", str(self._state.seed)]
        return boot.boot(
            shard.kernel,
            ["python", "-m", "pytest", "--color=no", *(f"-pno:{name}" for name in UNUSED_PLUGINS), *place, *arguments],
            warp=shard.lane == "warp",
            cpus=1 if shard.lane == "warp" or shard.count > 1 else 2,
            deadline=DEADLINES[shard.lane],
            debug=True,
            files=files,
            collect=["report"],
            environment={
                EVENTS: "stdout",
                LANE: shard.lane,
                **({SHARD: f"{shard.number}/{shard.count}"} if shard.count > 1 else {}),
                # The guest is itself the sandbox.
                INSIDE: FIRST_PID_NAMESPACE,
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            folder=self._config.rootpath,
            replaced=self._plan.kernel_modules,
            show=show,
            stop=stop,
        )

    def pairs(self, lane: str) -> list[str]:
        """Return `--pair` options for a guest of this lane; empty if the plan's own pairs hold.

        If lane netns runs too, it tests the pairs of two programs, and a guest of lane vm only those with the kernel.
        """
        names = self._state.programs.named or self._state.programs.known
        if lane != "vm" or self._plan.pairs or "netns" not in self._plan.lanes or KERNEL not in names:
            return []
        return [f"--pair={a}~{b}" for a in names for b in names if KERNEL in {a, b}]

    def programs(self) -> tuple[list[tuple[Path, str]], list[str]]:
        """Return the files to copy into the guest, with their paths there, and the options that name them."""
        return carry_programs(self._state.programs.alone, installed=True)


@dataclass(slots=True)
class LeakCheck:
    """Whether the driver destroyed all it created, in all guests of a lane on one kernel (scenario N41).

    left: guests that have not ended. used: whether the driver was under test in any of them. wrong: what was found.
    """

    left: int
    used: bool = False
    wrong: list[str] = field(default_factory=list)

    def look(self, log: str, *, used: bool) -> None:
        """Take the kernel log of a guest that has ended; used: whether the driver was under test there."""
        self.used |= used
        self.wrong += leaks(log) if used else []


class GuestReporter(RemoteReporter):
    """Passes a guest's reports to this session's hooks."""

    def __init__(self, config: pytest.Config, shard: Shard, evidence: Path, leaks: LeakCheck) -> None:
        """evidence: the directory for evidence; a guest's goes to a subdirectory for its lane and kernel."""
        super().__init__(config)
        self._shard = shard
        self._place = file_name(f"{shard.lane}-{shard.kernel}")
        self._evidence = evidence / self._place
        self._leaks = leaks
        self._failed = 0
        self._any = False
        self._used_kernel = False

    def take_all(self, events: Iterator[dict[str, object]]) -> None:
        """Take several events, in order."""
        for event in events:
            self.take(event)

    def take(self, event: dict[str, object]) -> None:
        """Take an event: how many tests the guest has, or the report of a phase of a test."""
        if event.get("event") == "collected":
            self._config.pluginmanager.getplugin(REPORTER).expect(event["count"])
        if event.get("event") != "report":
            return
        report = self.take_report(event["data"])
        self._used_kernel |= used_driver(report)
        self._any = True
        self._failed += report.failed

    def adapt(self, report: pytest.TestReport) -> None:
        """Set the path of the evidence, and note the kernel."""
        self._rename_artifacts(report)
        self._note_kernel(report)

    def _rename_artifacts(self, report: pytest.TestReport) -> None:
        """Set the path of the evidence to its copy here, in a directory per lane and kernel."""
        facts = facts_of(report)
        if artifacts := facts.get("artifacts"):
            facts["artifacts"] = str(artifacts).replace("evidence/", f"evidence/{self._place}/", 1)

    def _note_kernel(self, report: pytest.TestReport) -> None:
        """Note the `--kernel` of the release that the guest has reported, for the command that repeats a test."""
        if release := facts_of(report).get("kernel"):
            path = Path(self._shard.kernel).expanduser()
            name = str(path.absolute()) if path.exists() else self._shard.kernel
            state_of_run(self._config).results.invocation.kernels[str(release)] = name

    def ended(self, result: VmResult, text: list[str]) -> None:
        """Copy the evidence of a guest that has ended, and report what went wrong; text: what pytest printed there."""
        self.tell_begun()
        found = result.results / "report" / "evidence"
        if found.is_dir():
            shutil.copytree(found, self._evidence, dirs_exist_ok=True)
        if result.ending is not boot.Ending.EXITED:
            self._failure(result.kernel, boot.explain(result))
        else:
            self._leaks.look((result.results / "kernel.log").read_text(errors="replace"), used=self._used_kernel)
            if result.status not in self._expected_statuses():
                said = "\n".join(text[-40:])
                self._failure(result.kernel, f"pytest in the guest ended with status {result.status}:\n{said}")
        self._leaks.left -= 1
        if not self._leaks.left and self._leaks.used:
            self._tell_own("objects", result.kernel, "; ".join(self._leaks.wrong), scenarios=["N41"])

    def failed(self, error: HarnessError) -> None:
        """Report that the guest could not be started, or not be watched to its end."""
        self.tell_begun()
        self._leaks.left -= 1
        self._failure(self._shard.kernel, str(error))

    def _expected_statuses(self) -> set[int]:
        """Return the exit statuses of pytest that agree with its reports."""
        if not self._any:
            return {pytest.ExitCode.NO_TESTS_COLLECTED}
        return {pytest.ExitCode.TESTS_FAILED if self._failed else pytest.ExitCode.OK}

    def _failure(self, kernel: str, text: str) -> None:
        """Report a failed result of the guest itself."""
        self._tell_own("guest", kernel, text)

    def _tell_own(self, name: str, kernel: str, wrong: str, **facts: object) -> None:
        self._config.pluginmanager.getplugin(REPORTER).expect(1)
        for when in ("call", "teardown"):
            report = self._report(name, kernel, wrong if when == "call" else "", when)
            set_facts(report, {"lane": self._shard.lane, "kernel": kernel, **facts})
            self._config.hook.pytest_runtest_logreport(report=report)

    def _report(self, name: str, kernel: str, wrong: str, when: Literal["call", "teardown"]) -> pytest.TestReport:
        lane = self._shard.lane
        return pytest.TestReport(
            nodeid=f"{lane}::{name}[{kernel}]",
            location=(lane, None, f"{name}[{kernel}]"),
            keywords={},
            outcome="failed" if wrong else "passed",
            longrepr=wrong or None,
            when=when,
        )


def used_driver(report: pytest.TestReport) -> bool:
    """Whether this report is of a passed test of the driver: then the driver has created objects."""
    facts = facts_of(report)
    names = [side.get("impl") for side in (facts.get("a"), facts.get("b")) if isinstance(side, dict)]
    return report.when == "call" and report.passed and KERNEL in names


def lane_arguments(lane: str, markers: str, plan: RunPlan) -> list[str]:
    """Return the options of pytest in a guest of this lane, from those of the command line."""
    # Tests marked `waiting` run only in lane warp, where idle time is skipped.
    waiting = "waiting" if lane == "warp" else "not waiting"
    expression = f"({markers}) and {waiting}" if markers else waiting
    scale = TIMEOUT_SCALE * plan.timeout_scale
    words = ["--lane", "netns", "-m", expression, "--timeout-scale", f"{scale:g}", "--keep", plan.keep]
    return [*words, "--nightly"] if plan.nightly else words


def selection(config: pytest.Config, plan: RunPlan, files: Iterable[str]) -> list[str]:
    """Return the words that select tests in a guest: those of the command line, with directories as files.

    files: the files with tests for guests, relative to the root. A guest would need minutes to collect all others.
    """
    given = [_relative(word, config.rootpath) for word in config.args]
    folders = [Path(word) for word in given if "::" not in word]
    below = (name for name in dict.fromkeys(files) if any(Path(name).is_relative_to(folder) for folder in folders))
    words = [*(word for word in given if "::" in word), *below]
    if words and config.option.keyword:
        words += ["-k", config.option.keyword]
    more = [*(f"--pair={pair}" for pair in plan.pairs), *(f"--suite={suite}" for suite in sorted(plan.suites))]
    return words + more if words else []


def _relative(word: str, root: Path) -> str:
    path, separator, rest = word.partition("::")
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links out of the project
    return (str(absolute.relative_to(root)) if absolute.is_relative_to(root) else path) + separator + rest
