"""Lanes `vm` and `warp`: the tests of lane `netns` in a guest with a kernel of one's choice, in one pytest session.

The guest runs pytest on the same files; each of its reports comes back and is told to this session's hooks as if the
test had run here, as xdist does with its workers. A guest without a good verdict is a failed test of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from harness.balance import imbalance
from harness.errors import HarnessError
from harness.results import PROPERTY
from harness.session import REPORTER, file_name, state_of_run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.implementation import Manifest, Registry

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
DEADLINES: Final = {"vm": 1200.0, "warp": 900.0}


class Stream:
    """Takes a guest's output in pieces and gives back the events in it, whole."""

    def __init__(self) -> None:
        self._rest = b""
        self.text: list[str] = []

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
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


class Guests:
    """Runs the guest lanes of one session."""

    def __init__(
        self, config: pytest.Config, registry: Registry, seed: int, evidence: Path, selection: list[str]
    ) -> None:
        """Selection: what the command line says of which tests to run, for the guest's command line."""
        self._config = config
        self._registry = registry
        self._seed = seed
        self._evidence = evidence
        self._selection = selection
        self._vm = load_vm(config)

    def prepare(self, kernels: list[str]) -> None:
        """Fetch kernels and build the guest's root, while there is a network. Raises pytest.UsageError, pytest.Exit."""
        for kernel in kernels or [self.default_kernel]:
            self._vm.find(kernel)

    @property
    def default_kernel(self) -> str:
        return str(self._vm.vm_kernel.CATALOGUE["default"])

    def run(self, lane: str, kernel: str) -> None:
        """Run the selected tests in a guest and tell this session's hooks what became of them."""
        place = file_name(f"{lane}-{kernel}")
        stream, told = Stream(), _Told(self._config, place)
        files, implementations = self._implementations()
        arguments = [
            *self._selection,
            *implementations,
            *_lane_arguments(lane, self._config),
            "--seed",
            str(self._seed),
        ]
        try:
            result = self._vm.boot(
                kernel,
                ["python", "-m", "pytest", "--color=no", *(f"-pno:{name}" for name in UNUSED_PLUGINS), *arguments],
                warp=lane == "warp",
                cpus=1 if lane == "warp" else 2,
                deadline=DEADLINES[lane],
                debug=True,
                files=files,
                collect=["report"],
                environment={
                    "WG_INTEROP_EVENTS": "stdout",
                    "WG_INTEROP_LANE": lane,
                    # The whole guest is a sandbox.
                    "WG_INTEROP_SANDBOX": FIRST_PID_NAMESPACE,
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                folder=self._config.rootpath,
                show=lambda data: told.take_all(stream.feed(data)),
            )
        except HarnessError as error:
            told.failure(lane, kernel, str(error))
            return
        self._bring_evidence(result.results, place)
        if result.verdict is not self._vm.Verdict.EXITED:
            told.failure(lane, result.kernel, self._vm.explain(result))
        else:
            told.objects(lane, result.kernel, (result.results / "kernel.log").read_text(errors="replace"))
        if result.verdict is self._vm.Verdict.EXITED and result.status not in told.expected_statuses():
            text = "\n".join(stream.text[-40:])
            told.failure(lane, result.kernel, f"pytest in the guest ended with status {result.status}:\n{text}")

    def _pairs(self) -> list[str]:
        """Where lane netns runs too, it has the pairs of programs, and the guest runs those with the kernel."""
        names = self._registry.asked or list(self._registry.known)
        option = self._config.option
        if option.wg_pair or "netns" not in option.wg_lane or KERNEL not in names:
            return []
        return [f"--pair={a}~{b}" for a in names for b in names if KERNEL in {a, b}]

    def _implementations(self) -> tuple[list[tuple[Path, str]], list[str]]:
        """The programs to take along, and the options that name them there."""
        files: list[tuple[Path, str]] = []
        options: list[str] = []
        for name in self._registry.asked or self._registry.known:
            manifest = self._registry.get(name)
            options += ["--impl", name + self._take(manifest, files)]
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

    def _bring_evidence(self, results: Path, place: str) -> None:
        found = results / "report" / "evidence"
        if found.is_dir():
            shutil.copytree(found, self._evidence / place, dirs_exist_ok=True)


class _Told:
    """Tells this session's hooks what a guest reports."""

    def __init__(self, config: pytest.Config, place: str) -> None:
        """Place: the directory in report/evidence/ for what this guest brings back."""
        self._config = config
        self._place = place
        self._failed = 0
        self._any = False
        self._used_kernel = False

    def take_all(self, events: Iterator[dict[str, Any]]) -> None:
        for event in events:
            self.take(event)

    def take(self, event: dict[str, Any]) -> None:
        if event.get("event") == "collected":
            self._config.pluginmanager.getplugin(REPORTER).expect(event["count"])
        if event.get("event") != "report":
            return
        report = revive(self._config, event["data"])
        self._rename_artifacts(report)
        self._used_kernel |= report.passed and KERNEL in report.nodeid
        self._any = True
        self._failed += report.failed
        self._config.hook.pytest_runtest_logreport(report=report)

    def _rename_artifacts(self, report: pytest.TestReport) -> None:
        """Let the evidence be found where it is brought to, apart from that of the same test elsewhere."""
        facts = dict(report.user_properties).get(PROPERTY)
        if isinstance(facts, dict) and facts.get("artifacts"):
            facts["artifacts"] = facts["artifacts"].replace("evidence/", f"evidence/{self._place}/", 1)

    def expected_statuses(self) -> set[int]:
        """The exit statuses of pytest that the reports explain."""
        if not self._any:
            return {pytest.ExitCode.NO_TESTS_COLLECTED}
        return {pytest.ExitCode.TESTS_FAILED} if self._failed else {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}

    def objects(self, lane: str, kernel: str, log: str) -> None:
        """The result of scenario N41: all that the driver created in this guest, it has destroyed."""
        if self._used_kernel:
            wrong = imbalance(log)
            self._tell(f"{lane}::objects[{kernel}]", lane, kernel, "; ".join(wrong), scenarios=["N41"])

    def failure(self, lane: str, kernel: str, text: str) -> None:
        """A failed result that belongs to the guest, not to one of its tests."""
        self._tell(f"{lane}::guest[{kernel}]", lane, kernel, text)

    def _tell(self, nodeid: str, lane: str, kernel: str, wrong: str, **facts: object) -> None:
        report = pytest.TestReport(
            nodeid=nodeid,
            location=(lane, None, nodeid.partition("::")[2]),
            keywords={},
            outcome="failed" if wrong else "passed",
            longrepr=wrong or None,
            when="call",
        )
        report.user_properties.append((PROPERTY, {"lane": lane, "kernel": kernel, **facts}))
        self._config.hook.pytest_runtest_logreport(report=report)


def revive(config: pytest.Config, data: dict[str, Any]) -> pytest.TestReport:
    """The report that a guest has sent as JSON."""
    report: Any = config.hook.pytest_report_from_serializable(config=config, data=data)
    if isinstance(report.longrepr, list):
        # JSON knows no tuples, which is what the reason of a skip is.
        report.longrepr = tuple(report.longrepr)
    revived: pytest.TestReport = report
    return revived


def _lane_arguments(lane: str, config: pytest.Config) -> list[str]:
    chosen = config.option.markexpr
    # Tests that wait for protocol time run where time is skipped, and nowhere else.
    waiting = "waiting" if lane == "warp" else "not waiting"
    expression = f"({chosen}) and {waiting}" if chosen else waiting
    scale = TIMEOUT_SCALE * config.option.wg_timeout_scale
    arguments = ["--lane", "netns", "-m", expression, "--timeout-scale", f"{scale:g}"]
    # Where time jumps, a limit on a test's time means nothing; the guest has a deadline of its own.
    if lane == "warp":
        return [*arguments, "--timeout", "0"]
    workers = state_of_run(config).guest_workers
    return [*arguments, "-n", str(workers)] if workers else arguments


def load_vm(config: pytest.Config) -> Any:
    """The module ci/vm.py of the checkout."""
    if not (config.rootpath / "ci" / "vm.py").exists():
        raise pytest.UsageError(f"lanes vm and warp need a checkout of wg-interop; {config.rootpath} has no ci/vm.py")
    return importlib.import_module("ci.vm")


def selection(config: pytest.Config) -> list[str]:
    """The words of the command line that choose tests, fit for a guest whose project lies elsewhere."""
    words = [_relative(word, config.rootpath) for word in config.args]
    if config.option.keyword:
        words += ["-k", config.option.keyword]
    for pair in config.option.wg_pair:
        words += ["--pair", pair]
    return words


def _relative(word: str, root: Path) -> str:
    path, separator, rest = word.partition("::")
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links out of the project
    return (str(absolute.relative_to(root)) if absolute.is_relative_to(root) else path) + separator + rest
