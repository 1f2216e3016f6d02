"""Hook into pytest's run: markers, the sandbox around it, guests beside it, the header.

The plugin is loaded into every pytest run of an environment that has it. Until one of its fixtures or options is used
it imports next to nothing and prints nothing.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import pytest

from harness.lanes import NIGHTLY
from harness.plugin import sandboxed
from harness.plugin.oracle import report_invariants
from harness.plugin.past import pass_durations_on
from harness.plugin.reporter import Reporter, executes_tests
from harness.plugin.selection import USAGE, file_of, lane_of, runs_here, waits
from harness.plugin.session import INTERACTIVE, REPORTER, is_worker, state_of_run
from harness.sandbox import launch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from harness.plugin.guests import Guests
    from harness.plugin.hosts import Hosts
    from harness.plugin.options import RunPlan
    from harness.plugin.remote import RemotePool
    from harness.plugin.session import State


MARKERS: Final = (
    'scenario("N15", ...): the scenarios of netns-scenarios.toml that this test covers',
    'requirement("HS-07", ...): the requirements, at most three, that this test checks',
    'bug("IB-05"): the defect of a real program that this test would find',
    'capability("roaming", ...): the capabilities that an implementation must declare for this test',
    "waiting: minutes of protocol time have to pass in this test, so it runs in lane warp only",
    "alone: no other test of the run may run beside this one, so it comes last",
    "core: one of the short tunnel scenarios that `./ci/interop` runs",
    "nightly: takes minutes or a whole machine, so it runs only with --nightly",
    "long_in_guest: takes minutes on an emulated processor, so `./ci/test` runs it in guests only with --nightly",
)


class WorkerController(Protocol):
    """The fields of xdist.workermanage.WorkerController that are used here."""

    config: pytest.Config
    workerinput: dict[str, object]


# Options and start


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if is_worker(config):
        return
    state = state_of_run(config)
    plan = state.plan
    if plan.concerns_lab:
        # Mistakes in the options are reported before anything is started.
        _ = state.programs, state.gate
    if state.used and executes_tests(config) and not plan.lane_of_guest:
        state.check_report_place()
    if plan.is_watched and executes_tests(config):
        from harness.plugin.interactive import check_options

        check_options(config, plan)
    if (plan.kernels or plan.kernel_modules) and not plan.guest_lanes:
        option = "--kernel" if plan.kernels else "--kernel-module"
        raise pytest.UsageError(f"{option} is for the lanes vm and warp: add --lane vm")
    _prepare_elsewhere(config, plan)
    if plan.only_guests:
        return
    sandboxed.enter_if_needed(config, plan)


def _prepare_elsewhere(config: pytest.Config, plan: RunPlan) -> None:
    """Make ready what guests and hosts need."""
    if plan.guest_lanes and not (sandboxed.only_looks(config) or launch.inside()):
        # Kernels are downloaded, and a sandbox has no network.
        _guests(config).prepare()
    if plan.places.hosts and not sandboxed.only_looks(config):
        _hosts(config).check()
    if plan.guests_have_more or plan.places.hosts:
        # Turn xdist off: its workers would collect tests that only guests or hosts run. `-n` still counts the guests,
        # and the workers on each host.
        undistributed: dict[str, object] = {"numprocesses": None, "tx": [], "dist": "no"}
        for name, value in undistributed.items():
            setattr(config.option, name, value)


def _guests(config: pytest.Config) -> Guests:
    from harness.plugin.guests import Guests

    return Guests(config, state_of_run(config))


def _hosts(config: pytest.Config) -> Hosts:
    from harness.plugin.hosts import Hosts

    return Hosts(config, state_of_run(config))


@contextmanager
def _elsewhere(session: pytest.Session) -> Iterator[tuple[RemotePool, Hosts | None]]:
    """Run guests and hosts beside the session's own tests."""
    with _guests(session.config).beside(session) as pool:
        if state_of_run(session.config).plan.places.hosts:
            with _hosts(session.config).beside(session, pool) as hosts:
                yield pool, hosts
        else:
            yield pool, None


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    state = state_of_run(session.config)
    plan = state.plan
    if sandboxed.only_looks(session.config) or is_worker(session.config):
        return (yield)
    if not (plan.guest_lanes or plan.places.hosts):
        try:
            return (yield)
        finally:
            report_invariants(session)
    collected = session.items
    with _elsewhere(session) as (pool, hosts):
        # Under xdist the workers collect, and the pool gets the files from them.
        if collected and plan.guest_lanes:
            for_guests = (
                item for item in collected if lane_of(item) == "netns" and (waits(item) or "vm" in plan.lanes)
            )
            pool.begin(file_of(item) for item in for_guests)
        session.items = [item for item in collected if runs_here(item, plan)]
        if hosts:
            session.items = hosts.deal(session.items)
        answer = yield
        session.items = collected
        pool.finish()
        if hosts:
            hosts.run_rest_here()
    report_invariants(session)
    return answer


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if not is_worker(config):
        state_of_run(config).take_report_directory()
        config.pluginmanager.register(Reporter(config, state_of_run(config)), REPORTER)
    tx = getattr(config.option, "tx", None)
    if tx and launch.inside() and not is_worker(config):
        config.option.tx = [sandboxed.worker_spec(spec) for spec in tx]
    if state_of_run(config).plan.nightly and NIGHTLY not in os.environ:
        # Read by harness.lab.trafficset.effort. A pytest inside a test must not change that of the test.
        os.environ[NIGHTLY] = "1"
        config.add_cleanup(partial(os.environ.__delitem__, NIGHTLY))
    scale = state_of_run(config).plan.timeout_scale * _watch(config)
    if scale != 1.0:
        from harness.wait import scaled, set_timeout_scale

        # A pytest that runs inside a test of another one must not change the deadlines of that one.
        config.add_cleanup(partial(set_timeout_scale, scaled(1.0)))
        set_timeout_scale(scale)


def _watch(config: pytest.Config) -> float:
    """Register the plugin of the options that debug tests (interactive.py); returns the factor for deadlines."""
    plan = state_of_run(config).plan
    if not plan.is_watched or sandboxed.only_looks(config):
        return 1.0
    from harness.plugin.interactive import Interactive, timeout_factor

    watching = Interactive(config, plan)
    if launch.inside():
        watching.take_terminal()
        config.pluginmanager.register(watching, INTERACTIVE)
    return timeout_factor(plan)


# Collection


def pytest_collection_finish(session: pytest.Session) -> None:
    state = state_of_run(session.config)
    uses_lab = any(lane_of(item) == "netns" for item in session.items)
    if hasattr(session.config, sandboxed.PEEKING):
        os._exit(sandboxed.PEEK_YES if uses_lab else sandboxed.PEEK_NO)
    state.used = state.used or uses_lab
    if state.used and session.items and executes_tests(session.config):
        # A place that cannot be written is reported before the tests run.
        _ = state.report_directory


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    """Report a worker's usage error; xdist itself reports only that the worker is gone."""
    if message := getattr(node, "workeroutput", {}).get(USAGE):
        raise pytest.UsageError(*message.splitlines())


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    """Pass the controller's seed and directories to an xdist worker."""
    state = state_of_run(node.config)
    node.workerinput["wg_seed"] = str(state.seed)
    state.used = state.used or launch.inside()
    if state.used:
        node.workerinput["wg_report_directory"] = str(state.report_directory)
    if launch.inside() or launch.refused():
        node.workerinput["wg_run_directory"] = str(state.scratch())
        pass_durations_on(node.config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    state = state_of_run(config)
    about = state.programs.remarks if state.plan.concerns_lab else ()
    remarks = [f"wg-interop: {text}" for text in (*state.plan.settings_lines, *about)]
    if state.plan.guest_lanes:
        return [*remarks, f"wg-interop: lanes {', '.join(state.plan.lanes)}, seed {state.seed}"]
    if not (launch.inside() or launch.refused()):
        return []
    reason = launch.refused()
    where = f"no sandbox: {reason}" if reason else "sandbox of its own"
    return [*_left_out(state), *remarks, f"wg-interop: {where}, seed {state.seed}"]


def _left_out(state: State) -> list[str]:
    """Return what a run without options leaves out, and the option or command that adds it."""
    if state.plan.concerns_lab or state.plan.names_programs or state.plan.lanes or state.plan.lane_of_guest:
        return []
    parts = ["lanes vm and warp (--lane vm --lane warp)"]
    if launch.inside() and any(m.kind == "kernel" and m.why_unavailable() for m in state.programs.alone):
        parts.append("kernel WireGuard, which this kernel lacks (--lane vm)")
    manifests = [manifest for manifest in state.programs.alone if manifest.kind != "kernel" and manifest.install]
    if lacking := [manifest.name for manifest in manifests if manifest.why_unavailable()]:
        names = " ".join(lacking)
        parts.append(f"{names.replace(' ', ', ')}, not installed (wg-interop install {names})")
    return [f"wg-interop: left out: {'; '.join(parts)}"]
