"""Hold the state of one pytest process: plan, programs, seed, results, scratch directory."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from harness import suite
from harness.errors import HarnessError, UsageError
from harness.lanes import REPORT
from harness.plugin.options import Pair, read_plan

if TYPE_CHECKING:
    from harness.implementations.manifest import Manifest
    from harness.lab.lab import Lab
    from harness.plugin.gating import Gate
    from harness.plugin.options import RunPlan
    from harness.plugin.publish import NewReport
    from harness.plugin.rundir import RunDirectory
    from harness.report.conformance import Conformance
    from harness.report.invariants import Invariants
    from harness.report.results import Invocation, Results

# The name of the plugin that takes the reports.
REPORTER: Final = "wg-interop-reporter"
# The name of the plugin of a run with one of the options of interactive.py.
INTERACTIVE: Final = "wg-interop-interactive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """The implementations of a run, as its plan names them.

    known: all names. named: those that were asked for. pairs: of A and B, every ordered pair of these or those, or the
    pairs asked for. alone: every implementation that a test of one implementation is run with. remarks: sentences for
    the header.
    """

    known: tuple[str, ...]
    named: tuple[str, ...]
    pairs: tuple[Pair, ...]
    alone: tuple[Manifest, ...]
    remarks: tuple[str, ...] = ()


def read_programs(plan: RunPlan) -> Programs:
    """Find the manifests of the programs that the plan names; raises pytest.UsageError for a mistake in it."""
    from harness.implementations.registry import Registry
    from harness.report.expectations import load_expectations

    try:
        registry = Registry.of_options(plan.programs, plan.manifests, plan.likes)
        chosen = [registry.get(name) for name in registry.asked or registry.known]
        pairs = [Pair(a, b) for a in chosen for b in chosen]
        if plan.pairs:
            pairs = [Pair(*map(registry.get, _names(text))) for text in plan.pairs]
            chosen = list(dict.fromkeys(manifest for pair in pairs for manifest in pair))
        for name in plan.must_include:
            registry.get(name)
        for manifest in chosen:
            if manifest.expectations is not None:
                # A mistake is reported now, not after the first failure.
                load_expectations(manifest.expectations, shipped=False)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    # Alone, a program does the same in lane vm as in lane netns; only the kernel differs there.
    kernels = [manifest for manifest in chosen if manifest.kind == "kernel"] if plan.lane_of_guest == "vm" else []
    return Programs(
        known=tuple(registry.known),
        named=tuple(registry.asked),
        pairs=tuple(pairs),
        alone=tuple(kernels or chosen),
        remarks=tuple(registry.remarks()),
    )


def _names(text: str) -> list[str]:
    names = text.split("~")
    if len(names) != len(Pair._fields):
        raise pytest.UsageError(f"--pair {text}: want A~B, two implementations with a tilde between")
    return names


class State:
    """The plugin's state in one pytest process."""

    def __init__(self, config: pytest.Config) -> None:
        try:
            self.plan = read_plan(config)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None
        # Found once: a test may set the environment variable for programs that it starts.
        self.suite = _find_suite()
        given = (_from_controller(config, "wg_seed"), self.plan.seed)
        self.seed = next((int(seed) for seed in given if seed is not None), secrets.randbits(32))
        # True once a test of the run uses the lab or one of our options is given; until then the plugin prints nothing.
        given_results = self.plan.results is not None and "results" not in self.plan.settings
        self.used = given_results or self.plan.concerns_lab
        self._config = config
        self.results_path: Path = (self.plan.results or self._workplace() / "report" / "results.json").absolute()
        # For each implementation the reason why its smoke test failed; empty if it passed.
        self.smoke: dict[str, str] = {}
        # The invariants whose violation has been seen in this process, each with the name of the program.
        self.seen_by_oracle: set[tuple[str, str]] = set()
        self._given_directory = _from_controller(config, "wg_run_directory")
        self._run_directory: RunDirectory | None = None
        self._given_report = _from_controller(config, "wg_report_directory")
        self._report: NewReport | None = None

    @cached_property
    def conformance(self) -> Conformance:
        """The catalogues of the suite, read once: that takes 30 ms, and in a guest ten times as long."""
        from harness.report.conformance import read_conformance

        return read_conformance(self.suite)

    @property
    def report_directory(self) -> Path:
        """The directory where the run writes evidence, results and page; `publish` moves them at the end."""
        if self.plan.lane_of_guest:
            # A guest has no older report, and its files are copied to the host even if it is killed.
            return self.results_path.parent
        if self._given_report is not None:
            return Path(self._given_report)
        return self.begin_report()

    def take_report_directory(self) -> None:
        """Write into the directory that `wg-interop run` has made; programs that tests start must not."""
        if given := os.environ.pop(REPORT, None):
            self._given_report = given

    def check_report_place(self) -> None:
        """Raise pytest.UsageError if the report cannot be written to its place, before anything is started."""
        from harness.plugin.publish import check_place

        try:
            check_place(self.results_path)
        except HarnessError as error:
            raise pytest.UsageError(str(error)) from None

    def begin_report(self) -> Path:
        """Make the directory in which this run writes its report; raises pytest.UsageError if it cannot."""
        from harness.plugin.publish import NewReport

        # The run directory notes the place of the report: the next run finds there what a killed run left.
        self.scratch()
        if self._given_report is not None:
            return Path(self._given_report)
        if self._report is None:
            try:
                self._report = NewReport(self.results_path)
            except HarnessError as error:
                raise pytest.UsageError(str(error)) from None
        return self._report.directory

    @cached_property
    def programs(self) -> Programs:
        return read_programs(self.plan)

    @cached_property
    def gate(self) -> Gate | None:
        """The baseline of the run; raises pytest.UsageError for a mistake in it. Only the controller has one."""
        from harness.plugin.gating import open_gate

        return open_gate(self.plan.baseline, update=self.plan.update_baseline)

    @cached_property
    def results(self) -> Results:
        from harness.report.results import Results

        return Results(self.seed, self._invocation())

    @cached_property
    def invariants(self) -> Invariants:
        from harness.report.invariants import Invariants

        return Invariants()

    @property
    def runs_suite(self) -> bool:
        """Whether the tests of this run are those of the suite, and not of another project."""
        return self._config.rootpath == self.suite

    def _workplace(self) -> Path:
        return suite.workplace() if self.runs_suite else self._config.rootpath

    def _invocation(self) -> Invocation:
        """Return the options that repeat one test of this run; a guest's kernel is added when the guest reports."""
        from harness.implementations.manifest import load_manifest
        from harness.report.results import Invocation

        pairs = (text.partition("=") for text in self.plan.programs)
        config_file = self._config.inipath
        return Invocation(
            root=str(self._config.rootpath),
            config_file=str(config_file) if config_file else "",
            results=str(self.results_path),
            programs={name: str(Path(path).expanduser().absolute()) for name, equals, path in pairs if equals},
            manifests={load_manifest(path).name: str(path.absolute()) for path in self.plan.manifests},
            kernel_modules=tuple(str(path.absolute()) for path in self.plan.kernel_modules),
            timeout_scale=self.plan.timeout_scale,
            nightly=self.plan.nightly,
            keep=self.plan.keep,
        )

    def scratch(self) -> Path:
        """Return the run directory, made when first needed; the controller makes it for its workers."""
        if self._given_directory is not None:
            return Path(self._given_directory)
        if self._run_directory is None:
            from harness.plugin.rundir import RunDirectory

            self._run_directory = RunDirectory()
            self._run_directory.note_report(self.results_path.parent)
        return self._run_directory.path

    def close(self) -> None:
        if self._report is not None:
            self._report.close()
            self._report = None
        if self._run_directory is not None:
            self._run_directory.close()
            self._run_directory = None


LAB: Final[pytest.StashKey[Lab]] = pytest.StashKey()
# Whether the test did not fail, and its lab was undone.
UNDONE: Final[pytest.StashKey[bool]] = pytest.StashKey()
_STATE: Final = pytest.StashKey[State]()


def state_of_run(config: pytest.Config) -> State:
    """Return the State of this process."""
    if _STATE not in config.stash:
        config.stash[_STATE] = State(config)
    return config.stash[_STATE]


def _from_controller(config: pytest.Config, name: str) -> str | None:
    """Return a value that the xdist controller has passed to this worker; None elsewhere."""
    return getattr(config, "workerinput", {}).get(name)


def _find_suite() -> Path:
    try:
        return suite.root()
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def file_name(nodeid: str) -> str:
    """Return a node id as the name of a file or directory."""
    return re.sub(r"[^\w.~+@-]+", "_", nodeid)
