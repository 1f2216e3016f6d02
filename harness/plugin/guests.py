"""Run the tests of lanes `vm` and `warp` in guests, as part of one pytest session.

The guest runs pytest on the same files; each of its reports comes back and is told to this session's hooks as if the
test had run here, as xdist does with its workers. A guest without a good verdict is a failed test of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import pytest

from harness.errors import HarnessError
from harness.implementations.manifest import load_manifest
from harness.install.installer import MANIFESTS
from harness.lanes import EVENTS, LANE, SHARD
from harness.plugin.selection import files_left_to_guests
from harness.plugin.session import REPORTER, file_name, state_of_run
from harness.report.results import facts_of, set_facts
from harness.sandbox.launcher import INSIDE
from harness.vm import boot, kernels
from harness.vm.objects import leaks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

    from harness.implementations.manifest import (
        Manifest,
    )
    from harness.plugin.options import RunPlan
    from harness.plugin.session import State
    from harness.vm.boot import VmResult

T = TypeVar("T")

KERNEL: Final = "kernel"
# Where the guest has the programs under test, one directory each.
PEERS: Final = "/peers"
# Marks the lines of the guest's output that are events; the rest is what pytest prints there.
RECORD: Final = b"\x1e"
# The inode that Linux gives to its first PID namespace (include/linux/proc_ns.h).
FIRST_PID_NAMESPACE: Final = str(0xEFFFFFFC)
# Plugins whose import costs seconds under emulation, and that no test of a guest uses.
UNUSED_PLUGINS: Final = ("cacheprovider", "hypothesispytest", "random_order")
# Emulation is slow: deadlines of the guest's tests are longer.
TIMEOUT_SCALE: Final = 4.0
DEADLINES: Final = {"vm": 1800.0, "warp": 1800.0}


class EventParser:
    """Takes a guest's output in pieces and gives back the events in it, whole."""

    def __init__(self) -> None:
        self._rest = b""
        self.text: list[str] = []

    def feed(self, data: bytes) -> Iterator[dict[str, object]]:
        """Take a piece; yields the events that it completes, keeps other lines in `text`."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            before, mark, event = line.partition(RECORD)
            if not mark:
                self.text.append(line.decode(errors="replace").rstrip("\r"))
                continue
            try:
                yield json.loads(event)
            except ValueError:
                self.text.append(f"unreadable event: {event[:200]!r} after {before!r}")


@dataclass(frozen=True, slots=True)
class Shard:
    """What one guest has to do: the tests of a lane on a kernel, or each of them whose turn is `number` of `count`."""

    lane: str
    kernel: str
    number: int = 0
    count: int = 1


class Guests:
    """The guests of one session, which run while the session has its own tests."""

    def __init__(self, config: pytest.Config, state: State) -> None:
        self._config = config
        self._state = state
        self._plan = state.plan

    def prepare(self) -> None:
        """Fetch kernels and build the guest's root, while there is a network. Raises pytest.UsageError."""
        try:
            boot.require_in_guest(self._config.rootpath)
            for kernel in self.kernels:
                boot.find(kernel)
        except HarnessError as error:
            raise pytest.UsageError(str(error)) from error

    @property
    def kernels(self) -> tuple[str, ...]:
        return self._plan.kernels or (kernels.CATALOGUE.default,)

    @contextmanager
    def beside(self, session: pytest.Session) -> Iterator[GuestPool]:
        """Run the guests of the plan, as many at once as `-n` says, while the session has tests of its own.

        They start when it is known which files hold tests for them, and those that run at the end are stopped.
        """
        at_once = _at_once(self._plan.workers)
        shards = [
            (Shard(lane, kernel, number, at_once), leaks)
            for lane in self._plan.guest_lanes
            for kernel in self.kernels
            for leaks in [LeakCheck(at_once)]
            for number in range(at_once)
        ]

        def start(files: Iterable[str]) -> None:
            if words := selection(self._config, self._plan, files):
                for shard, leaks in shards:
                    self._start(shard, leaks, words, pool)

        pool = GuestPool(session, at_once, start, lambda: files_left_to_guests(self._state.scratch()))
        self._config.pluginmanager.register(pool)
        try:
            yield pool
        finally:
            pool.close()
            self._config.pluginmanager.unregister(pool)

    def _start(self, shard: Shard, leaks: LeakCheck, words: list[str], pool: GuestPool) -> None:
        reporter = GuestReporter(self._config, shard, self._state.report_directory / "evidence", leaks)
        parser = EventParser()

        def ended(result: VmResult) -> None:
            reporter.ended(result, parser.text)

        def show(data: bytes) -> None:
            pool.put(partial(reporter.take_all, parser.feed(data)))

        pool.start(lambda: self._boot(shard, words, show, pool.stop), ended, reporter.failed)

    def _boot(self, shard: Shard, words: list[str], show: Callable[[bytes], None], stop: int) -> VmResult:
        """Boot a guest that runs its shard of the tests that `words` select, and wait for its end."""
        files, programs = self.programs()
        lane = lane_arguments(shard.lane, self._config.option.markexpr, self._plan)
        arguments = [*words, *programs, *self.pairs(shard.lane), *lane, "--seed", str(self._state.seed)]
        return boot.boot(
            shard.kernel,
            ["python", "-m", "pytest", "--color=no", *(f"-pno:{name}" for name in UNUSED_PLUGINS), *arguments],
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
                # The whole guest is a sandbox.
                INSIDE: FIRST_PID_NAMESPACE,
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            folder=self._config.rootpath,
            show=show,
            stop=stop,
        )

    def pairs(self, lane: str) -> list[str]:
        """Where lane netns runs too, it has the pairs of programs, and a guest of vm runs those with the kernel."""
        names = self._state.programs.named or self._state.programs.known
        if lane != "vm" or self._plan.pairs or "netns" not in self._plan.lanes or KERNEL not in names:
            return []
        return [f"--pair={a}~{b}" for a in names for b in names if KERNEL in {a, b}]

    def programs(self) -> tuple[list[tuple[Path, str]], list[str]]:
        """The programs to take along, and the options that name them there."""
        files: list[tuple[Path, str]] = []
        options: list[str] = []
        for manifest in self._state.programs.alone:
            options += _take_manifest(manifest, files)
            options += ["--impl", manifest.name + self._take(manifest, files)]
            if like := manifest.like:
                if like not in self._state.programs.alone:
                    options += _take_manifest(like, files)
                options += ["--like", f"{manifest.name}={like.name}"]
        return files, options

    @staticmethod
    def _take(manifest: Manifest, files: list[tuple[Path, str]]) -> str:
        if manifest.kind == "kernel" or not manifest.needs_program:
            return ""
        try:
            program = manifest.find_program()
        except HarnessError:
            return ""
        there = f"{PEERS}/{manifest.name}/{program.name}"
        files.append((program, there))
        return f"={there}"


def _take_manifest(manifest: Manifest, files: list[tuple[Path, str]]) -> list[str]:
    """Take a user's manifest along, and the program that it names; both keep their paths, for it may name it by its."""
    if manifest.source is None or manifest.source.parent == MANIFESTS:
        return []
    source = manifest.source.absolute()
    program = load_manifest(source).program
    files += [(path, str(path)) for path in (source, program) if path is not None]
    return ["--impl-manifest", str(source)]


class GuestPool:
    """Runs guests in threads and queues their events for pytest's own thread.

    pytest's hooks belong to the session's thread, so an event waits until a test here has ended or `finish` is called.
    """

    def __init__(
        self,
        session: pytest.Session,
        at_once: int,
        start: Callable[[Iterable[str]], None],
        left_by_workers: Callable[[], Iterable[str]] = lambda: (),
    ) -> None:
        """Make a pool of `at_once` threads.

        start: starts the guests, given the files that hold tests for them. left_by_workers: those files whose tests
        the xdist workers have left to guests.
        """
        self._session = session
        self._start = start
        self._left_by_workers = left_by_workers
        self._begun = False
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="guest")
        self._left = 0
        self._events: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self.stop, self._stopper = os.pipe()

    def begin(self, files: Iterable[str]) -> None:
        """Start the guests, the first time this is called."""
        if not self._begun:
            self._begun = True
            self._start(files)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """The first worker has collected, and with it everyone."""
        self.begin([*(name.partition("::")[0] for name in ids), *self._left_by_workers()])

    def start(
        self, work: Callable[[], T], ended: Callable[[T], object], failed: Callable[[HarnessError], object]
    ) -> None:
        """Do the work in a thread; pytest's own thread then calls `ended` or `failed` with what it came to."""

        def take(future: Future[T]) -> None:
            self._left -= 1
            try:
                result = future.result()
            except HarnessError as error:
                failed(error)
            else:
                ended(result)

        self._left += 1
        self._pool.submit(work).add_done_callback(lambda future: self.put(partial(take, future)))

    def put(self, event: Callable[[], object]) -> None:
        """Queue a call for pytest's own thread, which makes them in the order in which they were queued."""
        self._events.put(event)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """Process the queued events, between two tests here."""
        while not self._events.empty():
            self._events.get()()

    def finish(self) -> None:
        """Process events until all guests have ended; end the session where -x asks for it, as pytest does."""
        while self._left:
            self._events.get()()
            if self._session.shouldfail:
                raise self._session.Failed(self._session.shouldfail)
            if self._session.shouldstop:
                raise self._session.Interrupted(self._session.shouldstop)

    def close(self) -> None:
        """Stop the guests that still run."""
        os.close(self._stopper)
        self._pool.shutdown(cancel_futures=True)
        os.close(self.stop)


@dataclass(slots=True)
class LeakCheck:
    """Whether the driver has destroyed what it created, in all guests of a lane on one kernel (scenario N41)."""

    left: int
    used: bool = False
    wrong: list[str] = field(default_factory=list)

    def look(self, log: str, *, used: bool) -> None:
        self.used |= used
        self.wrong += leaks(log) if used else []


class GuestReporter:
    """Tells this session's hooks what a guest reports."""

    def __init__(self, config: pytest.Config, shard: Shard, evidence: Path, leaks: LeakCheck) -> None:
        """Evidence: the directory below which it goes to a place of the lane and the kernel."""
        self._config = config
        self._shard = shard
        self._place = file_name(f"{shard.lane}-{shard.kernel}")
        self._evidence = evidence / self._place
        self._leaks = leaks
        self._begun: list[pytest.TestReport] = []
        self._failed = 0
        self._any = False
        self._used_kernel = False

    def take_all(self, events: Iterator[dict[str, object]]) -> None:
        for event in events:
            self.take(event)

    def take(self, event: dict[str, object]) -> None:
        if event.get("event") == "collected":
            self._config.pluginmanager.getplugin(REPORTER).expect(event["count"])
        if event.get("event") != "report":
            return
        report = revive(self._config, event["data"])
        self._rename_artifacts(report)
        self._note_kernel(report)
        self._used_kernel |= used_driver(report)
        self._any = True
        self._failed += report.failed
        self._begun.append(report)
        # A test is told as a whole: the same test may run here at the same time.
        if report.when == "teardown":
            self._tell_begun()

    def _tell_begun(self) -> None:
        begun, self._begun = self._begun, []
        for report in begun:
            self._config.hook.pytest_runtest_logreport(report=report)

    def _rename_artifacts(self, report: pytest.TestReport) -> None:
        """Let the evidence be found where it is brought to, apart from that of the same test elsewhere."""
        facts = facts_of(report)
        if artifacts := facts.get("artifacts"):
            facts["artifacts"] = str(artifacts).replace("evidence/", f"evidence/{self._place}/", 1)

    def _note_kernel(self, report: pytest.TestReport) -> None:
        """Note which `--kernel` stands for the release that the guest has reported, for whoever runs the test again."""
        if release := facts_of(report).get("kernel"):
            path = Path(self._shard.kernel).expanduser()
            name = str(path.absolute()) if path.exists() else self._shard.kernel
            state_of_run(self._config).results.invocation.kernels[str(release)] = name

    def ended(self, result: VmResult, text: list[str]) -> None:
        """The guest has ended: bring its evidence and judge it. `text`: what pytest printed there."""
        self._tell_begun()
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
            self._tell("objects", result.kernel, "; ".join(self._leaks.wrong), scenarios=["N41"])

    def failed(self, error: HarnessError) -> None:
        """There was no guest, or it could not be watched to its end."""
        self._tell_begun()
        self._leaks.left -= 1
        self._failure(self._shard.kernel, str(error))

    def _expected_statuses(self) -> set[int]:
        """The exit statuses of pytest that the reports explain."""
        if not self._any:
            return {pytest.ExitCode.NO_TESTS_COLLECTED}
        return {pytest.ExitCode.TESTS_FAILED if self._failed else pytest.ExitCode.OK}

    def _failure(self, kernel: str, text: str) -> None:
        """A failed result that belongs to the guest, not to one of its tests."""
        self._tell("guest", kernel, text)

    def _tell(self, name: str, kernel: str, wrong: str, **facts: object) -> None:
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
    """Whether the driver was under test, and the test passed: then it has made objects."""
    facts = facts_of(report)
    names = [side.get("impl") for side in (facts.get("a"), facts.get("b")) if isinstance(side, dict)]
    return report.when == "call" and report.passed and KERNEL in names


def revive(config: pytest.Config, data: object) -> pytest.TestReport:
    """The report that a guest has sent as JSON."""
    report: pytest.TestReport = config.hook.pytest_report_from_serializable(config=config, data=data)
    match report.longrepr:
        case [str(path), int(line), str(reason)]:
            # JSON has no tuples, which is what the reason of a skip is.
            report.longrepr = (path, line, reason)
    return report


def lane_arguments(lane: str, markers: str, plan: RunPlan) -> list[str]:
    """The options of pytest in a guest of this lane, made from those of the command line."""
    # Tests that wait for protocol time run where time is skipped, and nowhere else.
    waiting = "waiting" if lane == "warp" else "not waiting"
    expression = f"({markers}) and {waiting}" if markers else waiting
    scale = TIMEOUT_SCALE * plan.timeout_scale
    return ["--lane", "netns", "-m", expression, "--timeout-scale", f"{scale:g}", "--keep", plan.keep]


def _at_once(workers: int | str | None) -> int:
    """How many guests run at once for `-n WORKERS`."""
    if isinstance(workers, str):
        # `auto` and its like, which xdist resolves only where it is to have workers.
        return len(os.sched_getaffinity(0))
    return workers or 1


def selection(config: pytest.Config, plan: RunPlan, files: Iterable[str]) -> list[str]:
    """The words that choose tests in a guest: what the command line says, its directories as the `files` in them.

    files: those that hold tests for guests, relative to the root; a guest that collects others as well takes minutes.
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
