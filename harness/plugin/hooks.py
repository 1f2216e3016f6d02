"""The pytest plugin: options, markers, fixtures, the sandbox around a run, and what becomes of the results.

It is loaded into every pytest run of an environment that has it, so until one of its fixtures or options is used it
imports next to nothing, and says nothing.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any, Final

import pytest

from harness.plugin import sandboxed
from harness.plugin.options import (
    asked,
    guest_lanes,
    guests_have_more,
    only_guests,
)
from harness.plugin.reporter import Reporter
from harness.plugin.selection import (
    USAGE,
    lane_of,
    runs_here,
    waits,
)
from harness.plugin.session import (
    REPORTER,
    is_worker,
    pairs,
    state_of_run,
)
from harness.sandbox import launch

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from harness.plugin.guests import Guests
    from harness.plugin.session import State


MARKERS: Final = (
    'scenario("N15", ...): the scenarios of netns-scenarios.toml that this test covers',
    'requirement("HS-07", ...): the requirements, at most three, that this test checks',
    'bug("IB-05"): the defect of a real program that this test would find',
    'capability("roaming", ...): what an implementation must declare to be tested by this',
    "waiting: minutes of protocol time have to pass in this test, so it runs in lane warp only",
    "core: one of the scenarios that make a tunnel and that one waits for (`./ci/interop`)",
    "long_in_guest: takes minutes where the processor is emulated, so a guest runs it by night only (`./ci/test`)",
)


# Options and start


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if is_worker(config):
        return
    if asked(config):
        # Mistakes in the options are told before anything is started.
        pairs(config)
    state = state_of_run(config)
    if state.used and not config.option.collectonly:
        _check_place(state.results_path)
    if config.option.wg_kernel and not guest_lanes(config):
        raise pytest.UsageError("--kernel is for the lanes vm and warp: add --lane vm")
    if guest_lanes(config) and not (config.option.collectonly or launch.inside()):
        # Kernels come from the network, which no sandbox has.
        _guests(config).prepare(config.option.wg_kernel)
    if guests_have_more(config):
        # Workers would have to collect what they must not run, for them to tell of it. As many guests run all the same.
        undistributed: dict[str, object] = {"numprocesses": None, "tx": [], "dist": "no"}
        for name, value in undistributed.items():
            setattr(config.option, name, value)
    if only_guests(config):
        return
    sandboxed.enter_if_needed(config, asked(config))


def _check_place(path: Path) -> None:
    """Refuse what the results cannot be written to: told at the end of the run, that would lose them."""
    # Path.is_dir() would raise where this user may not look.
    there = next(place for place in (path, *path.parents) if os.access(place, os.F_OK))
    if there == path and path.is_dir():
        raise pytest.UsageError(f"--results {path}: is a directory; name a file: --results {path / 'results.json'}")
    folder = path.parent if there == path else there
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise pytest.UsageError(f"results {path}: cannot write to {folder}; choose a place: --results FILE")


def _guests(config: pytest.Config) -> Guests:
    from harness.plugin.guests import Guests

    state = state_of_run(config)
    return Guests(config, state.registry, state.seed, state.report_directory / "evidence")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    lanes = guest_lanes(session.config)
    if not lanes or session.config.option.collectonly or is_worker(session.config):
        return (yield)
    collected = session.items
    with _guests(session.config).beside(session, lanes) as running:
        # Under xdist nothing is collected here, and the workers tell.
        if collected:
            theirs = (item for item in collected if lane_of(item) == "netns" and (waits(item) or "vm" in lanes))
            running.begin(item.nodeid.partition("::")[0] for item in theirs)
        session.items = [item for item in collected if runs_here(item)]
        answer = yield
        session.items = collected
        running.finish()
    return answer


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if not is_worker(config):
        config.pluginmanager.register(Reporter(config, state_of_run(config)), REPORTER)
    tx = getattr(config.option, "tx", None)
    if tx and launch.inside() and not is_worker(config):
        config.option.tx = [sandboxed.worker_spec(spec) for spec in tx]
    if config.option.wg_timeout_scale != 1.0:
        from harness.wait import set_timeout_scale

        set_timeout_scale(config.option.wg_timeout_scale)


# Collection


def pytest_collection_finish(session: pytest.Session) -> None:
    state = state_of_run(session.config)
    uses_lab = any(lane_of(item) == "netns" for item in session.items)
    if hasattr(session.config, sandboxed.PEEKING):
        os._exit(sandboxed.PEEK_YES if uses_lab else sandboxed.PEEK_NO)
    state.used = state.used or uses_lab
    if uses_lab and not is_worker(session.config) and not session.config.option.collectonly:
        _clear_evidence(state)


def _clear_evidence(state: State) -> None:
    # Without results of an earlier run beside it, a directory of this name is somebody else's.
    if state.results_path.exists():
        shutil.rmtree(state.report_directory / "evidence", ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Tell what an xdist worker did not like; all that xdist says of it is that the worker has gone."""
    if said := getattr(node, "workeroutput", {}).get(USAGE):
        raise pytest.UsageError(said)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell an xdist worker what the controller has decided."""
    state = state_of_run(node.config)
    node.workerinput["wg_seed"] = state.seed
    if launch.inside():
        if not state.used:
            state.used = True
            _clear_evidence(state)
        node.workerinput["wg_run_directory"] = str(state.scratch())


def pytest_report_header(config: pytest.Config) -> list[str]:
    if guest_lanes(config):
        return [f"wg-interop: lanes {', '.join(config.option.wg_lane)}, seed {state_of_run(config).seed}"]
    if not (launch.inside() or launch.refused()):
        return []
    reason = launch.refused()
    where = f"no sandbox: {reason}" if reason else "sandbox of its own"
    return [f"wg-interop: {where}, seed {state_of_run(config).seed}"]
