"""The pytest plugin: options, markers, fixtures, the sandbox around a run, and what becomes of the results.

It is loaded into every pytest run of an environment that has it, so until one of its fixtures or options is used it
imports next to nothing, and says nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from harness import sandbox
from harness.errors import HarnessError
from harness.lanes import GUESTS, HERE, LANE, SHARE
from harness.session import (
    REPORTER,
    asked,
    guest_lanes,
    guests_have_more,
    implementations,
    is_worker,
    lane_of,
    only_guests,
    pairs,
    state_of_run,
    uses,
    waits,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from harness.guests import Guests
    from harness.results import Result, Results
    from harness.session import State

pytest_plugins = ["harness.fixtures", "harness.verdicts"]

MARKERS: Final = (
    'scenario("N15", ...): the scenarios of netns-scenarios.toml that this test covers',
    'requirement("HS-07", ...): the requirements, at most three, that this test checks',
    'bug("IB-05"): the defect of a real program that this test would find',
    'capability("roaming", ...): what an implementation must declare to be tested by this',
    "waiting: minutes of protocol time have to pass in this test, so it runs in lane warp only",
)
MAX_REQUIREMENTS: Final = 3
# Where each finished result is written as a line of JSON, for `wg-interop run`: the descriptor of a pipe. In a guest it
# is `stdout`, every report is written whole, and each line begins with a record separator (RFC 7464).
EVENTS: Final = "WG_INTEROP_EVENTS"
# By what name a worker tells of a mistake.
USAGE: Final = "wg_usage"


# Options and start


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("wg-interop", "WireGuard interop lab")
    group.addoption(
        "--impl", action="append", default=[], metavar="NAME[=PROGRAM]", dest="wg_impl",
        help="Test this implementation, or this program as it; may be repeated. Default: all that are known.",
    )  # fmt: skip
    group.addoption(
        "--impl-manifest", action="append", default=[], metavar="FILE", type=Path, dest="wg_manifest",
        help="Test the implementation that this manifest describes: with itself, unless --impl or --pair names others.",
    )  # fmt: skip
    group.addoption(
        "--pair", action="append", default=[], metavar="A~B", dest="wg_pair",
        help="Test A in ns1 against B in ns2, more than once for several. Default: all ordered pairs.",
    )  # fmt: skip
    group.addoption(
        "--lane", action="append", default=[], choices=(*HERE, *GUESTS), dest="wg_lane",
        help="Run this lane only, may be repeated: core needs no namespaces, netns runs on this kernel, vm in a guest "
        "with a kernel of your choice, warp there with a clock that skips idle time.",
    )  # fmt: skip
    group.addoption(
        "--kernel", action="append", default=[], metavar="VERSION|PATH", dest="wg_kernel",
        help="The kernel of lanes vm and warp: a name of ci/kernels.toml, a Debian version, a bzImage or a build tree.",
    )  # fmt: skip
    group.addoption(
        "--results", metavar="FILE", type=Path, dest="wg_results",
        help="Where the results go; index.html and evidence/ go beside them. Default: report/results.json below the "
        "root directory.",
    )  # fmt: skip
    group.addoption(
        "--keep", choices=("failed", "all", "none"), default="failed", dest="wg_keep",
        help="Of which tests the evidence stays in report/evidence/. Default: failed.",
    )  # fmt: skip
    group.addoption(
        "--timeout-scale", metavar="F", type=float, default=1.0, dest="wg_timeout_scale",
        help="Multiply every deadline by this factor, for slow machines.",
    )  # fmt: skip
    group.addoption(
        "--seed", metavar="N", type=int, dest="wg_seed",
        help="The seed of all random choices, as an earlier run printed it.",
    )  # fmt: skip
    parser.addini("wg_sandbox", "When to enter the sandbox: auto (a test uses the lab) or always.", default="auto")


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
    if guest_lanes(config) and not (config.option.collectonly or sandbox.inside()):
        # Kernels come from the network, which no sandbox has.
        _guests(config).prepare(config.option.wg_kernel)
    if guests_have_more(config):
        # Workers would have to collect what they must not run, for them to tell of it. As many guests run all the same.
        undistributed: dict[str, object] = {"numprocesses": None, "tx": [], "dist": "no"}
        for name, value in undistributed.items():
            setattr(config.option, name, value)
    if only_guests(config):
        return
    sandbox.enter_if_needed(config, asked(config))


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
    from harness.guests import Guests

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
        session.items = [item for item in collected if _runs_here(item)]
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
    if tx and sandbox.inside() and not is_worker(config):
        config.option.tx = [sandbox.worker_spec(spec) for spec in tx]
    if config.option.wg_timeout_scale != 1.0:
        from harness.wait import set_timeout_scale

        set_timeout_scale(config.option.wg_timeout_scale)


# Collection


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if uses(metafunc.definition, "pair"):
        metafunc.parametrize("pair", pairs(metafunc.config), ids=str, indirect=True)
    if uses(metafunc.definition, "implementation"):
        chosen = implementations(metafunc.config)
        metafunc.parametrize("implementation", chosen, ids=[manifest.name for manifest in chosen], indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    for item in items:
        marks = [argument for marker in item.iter_markers("requirement") for argument in marker.args]
        if len(marks) > MAX_REQUIREMENTS:
            said = f"{item.nodeid}: a test cites at most {MAX_REQUIREMENTS} requirements, not {marks}"
            if is_worker(config):
                config.workeroutput[USAGE] = said  # type: ignore[attr-defined]
            raise pytest.UsageError(said)
    _choose(config, items, [item for item in items if _is_chosen(item)])
    yield
    # When all others have chosen, so that the shares are equal.
    if SHARE in os.environ:
        number, count = map(int, os.environ[SHARE].split("/"))
        _choose(config, items, items[number::count])


def _choose(config: pytest.Config, items: list[pytest.Item], chosen: list[pytest.Item]) -> None:
    kept = set(chosen)
    if others := [item for item in items if item not in kept]:
        config.hook.pytest_deselected(items=others)
        items[:] = chosen


def _is_chosen(item: pytest.Item) -> bool:
    """Whether the item runs in one of the lanes asked for; what runs in guests is collected here too."""
    lanes = item.config.option.wg_lane
    if waits(item) and os.environ.get(LANE) != "warp":
        return "warp" in lanes
    return not lanes or lane_of(item) in {"netns" if lane == "vm" else lane for lane in lanes}


def _runs_here(item: pytest.Item) -> bool:
    """Whether a chosen item runs on this kernel, be it a guest's."""
    lanes = item.config.option.wg_lane
    return LANE in os.environ or not lanes or (lane_of(item) in lanes and not waits(item))


def pytest_collection_finish(session: pytest.Session) -> None:
    state = state_of_run(session.config)
    uses_lab = any(lane_of(item) == "netns" for item in session.items)
    if hasattr(session.config, sandbox.PEEKING):
        os._exit(sandbox.PEEK_YES if uses_lab else sandbox.PEEK_NO)
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
    if sandbox.inside():
        if not state.used:
            state.used = True
            _clear_evidence(state)
        node.workerinput["wg_run_directory"] = str(state.scratch())


# What an event tells of a result.
_TOLD: Final = ("id", "pair", "state", "seconds", "message", "lane", "kernel")


class Reporter:
    """On the controller, or in a run without xdist: takes the reports and tells who listens."""

    def __init__(self, config: pytest.Config, state: State) -> None:
        self._config = config
        self._state = state
        self._expected = 0
        # Not for the programs that tests start, pytest among them.
        target = os.environ.pop(EVENTS, None)
        self._whole = target == "stdout"
        self._events = os.dup(1) if self._whole else int(target) if target else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self._state.used:
            return
        result = self._state.results.add(report)
        if self._whole:
            data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
            # Under xdist the report knows its worker, which means nothing elsewhere.
            data.pop("node", None)
            self._tell({"event": "report", "data": data})
        # What is said of a guest as a whole (harness.guests) has no teardown.
        elif report.when == "teardown" or result.id.partition("::")[0] in GUESTS:
            facts = {name: getattr(result, name) for name in _TOLD}
            self._tell({"event": "result", **facts})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not only_guests(self._config):
            self.expect(sum(map(_runs_here, session.items)))

    def expect(self, count: int) -> None:
        """So many tests more are to come."""
        self._expected += count
        self._tell({"event": "collected", "count": self._expected})

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        # Every worker collects the same.
        if not self._expected:
            self.expect(len(ids))

    def _tell(self, event: dict[str, Any]) -> None:
        if self._events is not None:
            mark = b"\x1e" if self._whole else b""
            with suppress(OSError):
                os.write(self._events, mark + json.dumps(event).encode() + b"\n")


def pytest_report_header(config: pytest.Config) -> list[str]:
    if guest_lanes(config):
        return [f"wg-interop: lanes {', '.join(config.option.wg_lane)}, seed {state_of_run(config).seed}"]
    if not (sandbox.inside() or sandbox.refused()):
        return []
    reason = sandbox.refused()
    where = f"no sandbox: {reason}" if reason else "sandbox of its own"
    return [f"wg-interop: {where}, seed {state_of_run(config).seed}"]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, sandbox.PEEKING):
        os._exit(sandbox.PEEK_NO)
    state = state_of_run(session.config)
    if is_worker(session.config) or session.config.option.collectonly:
        return
    if state.used:
        state.results.write(state.results_path)
        # A guest's results are judged and drawn where they are brought to.
        if LANE not in os.environ:
            if exitstatus == pytest.ExitCode.OK and (shortcoming := _shortcoming(session.config, state.results)):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
                session.config.stash[_SHORTCOMING] = shortcoming
            session.config.stash[_REPORT] = _draw(session.config, exitstatus)
    state.close()


_SHORTCOMING: Final = pytest.StashKey[str]()
_REPORT: Final = pytest.StashKey[str]()


def _draw(config: pytest.Config, exitstatus: int) -> str:
    """Draw the report beside the results; returns its path, or why there is none."""
    from harness.report import render

    state = state_of_run(config)
    ends: dict[int, str] = {
        pytest.ExitCode.INTERRUPTED: "interrupted",
        pytest.ExitCode.INTERNAL_ERROR: "pytest itself failed",
    }
    complaint = config.stash.get(_SHORTCOMING, ends.get(exitstatus, ""))
    try:
        return str(render([state.results_path], state.report_directory, root=config.rootpath, complaint=complaint))
    except (HarnessError, OSError) as error:
        return f"none: {error}"


def _shortcoming(config: pytest.Config, results: Results) -> str | None:
    """Why a run without a failed test is no success all the same."""
    every: list[Result] = list(results.by_id.values())
    if every and not any(result.state == "passed" for result in every):
        return "no test passed"
    ran = [result for result in every if result.state != "skipped"]
    for lane in config.option.wg_lane:
        if not any(result.lane == lane for result in ran):
            return f"lane {lane} was asked for and did not run"
    for name in state_of_run(config).registry.asked if asked(config) else ():
        if every and not any(name == (side or {}).get("impl") for result in ran for side in (result.a, result.b)):
            return f"{name} was asked for and all its tests were skipped"
    return None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    state = state_of_run(config)
    if not state.used or is_worker(config) or config.option.collectonly:
        return
    if _SHORTCOMING in config.stash:
        terminalreporter.write_line(f"wg-interop: {config.stash[_SHORTCOMING]}", red=True)
    terminalreporter.write_line(f"results: {state.results_path}")
    if _REPORT in config.stash:
        terminalreporter.write_line(f"report: {config.stash[_REPORT]}")
