"""The pytest plugin: options, markers, fixtures, the sandbox around a run, and what becomes of the results.

It is loaded into every pytest run of an environment that has it, so until one of its fixtures or options is used it
imports next to nothing, and says nothing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from harness import sandbox
from harness.errors import HarnessError, UsageError

if TYPE_CHECKING:
    from collections.abc import Generator

    from harness.implementation import Manifest, Registry
    from harness.lab import Lab
    from harness.results import Result, Results
    from harness.rundir import RunDirectory
    from harness.topology import Topology
    from harness.tunnel import Tunnel

LANES: Final = ("core", "netns")
MARKERS: Final = (
    'scenario("N15", ...): the scenarios of netns-scenarios.toml that this test covers',
    'requirement("HS-07", ...): the requirements, at most three, that this test checks',
    'bug("IB-05"): the defect of a real program that this test would find',
    'capability("roaming", ...): what an implementation must declare to be tested by this',
    "waiting: protocol time has to pass in this test",
)
MAX_REQUIREMENTS: Final = 3
# Descriptor of a pipe to which each finished result is written as a line of JSON, for `wg-interop run`.
EVENTS: Final = "WG_INTEROP_EVENTS"


class Pair(NamedTuple):
    """The implementations of A (in ns1) and B (in ns2)."""

    a: Manifest
    b: Manifest

    def __str__(self) -> str:
        return f"{self.a.name}~{self.b.name}"


class State:
    """What the plugin keeps for one pytest process."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seed: int = _from_controller(config, "wg_seed") or config.option.wg_seed or secrets.randbits(32)
        # Whether a test of the run uses the lab, or one of our options was given; until then all is silent.
        self.used = config.option.wg_results is not None or _asked(config)
        self.results_path: Path = (config.option.wg_results or config.rootpath / "report" / "results.json").absolute()
        self._run_directory: RunDirectory | None = None
        self._registry: Registry | None = None
        self._results: Results | None = None

    @property
    def report_directory(self) -> Path:
        """Where evidence goes: beside the results."""
        return self.results_path.parent

    @property
    def registry(self) -> Registry:
        if self._registry is None:
            self._registry = _read_registry(self.config)
        return self._registry

    @property
    def results(self) -> Results:
        if self._results is None:
            from harness.results import Results

            self._results = Results(self.seed)
        return self._results

    def scratch(self) -> Path:
        """The run directory, made when first needed; the controller makes it for its workers."""
        given = _from_controller(self.config, "wg_run_directory")
        if given is not None:
            return Path(given)
        if self._run_directory is None:
            from harness.rundir import RunDirectory

            self._run_directory = RunDirectory()
        return self._run_directory.path

    def close(self) -> None:
        if self._run_directory is not None:
            self._run_directory.close()
            self._run_directory = None


_STATE: Final = pytest.StashKey[State]()
_LAB: Final = pytest.StashKey["Lab"]()


def _from_controller(config: pytest.Config, name: str) -> Any:
    return getattr(config, "workerinput", {}).get(name)


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


# Options and start


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("wg-interop", "WireGuard interop lab")
    group.addoption(
        "--impl", action="append", default=[], metavar="NAME[=PROGRAM]", dest="wg_impl",
        help="Test this implementation, or this program as it; may be repeated. Default: all that are known.",
    )  # fmt: skip
    group.addoption(
        "--impl-manifest", action="append", default=[], metavar="FILE", type=Path, dest="wg_manifest",
        help="Test the implementation that this manifest describes, too.",
    )  # fmt: skip
    group.addoption(
        "--pair", action="append", default=[], metavar="A~B", dest="wg_pair",
        help="Test A in ns1 against B in ns2, more than once for several. Default: all ordered pairs.",
    )  # fmt: skip
    group.addoption(
        "--lane", action="append", default=[], choices=LANES, dest="wg_lane",
        help="Run the tests of this lane only: core needs no namespaces, netns runs on this kernel.",
    )  # fmt: skip
    group.addoption(
        "--results", metavar="FILE", type=Path, dest="wg_results",
        help="Where the results go; evidence goes beside them. Default: report/results.json below the root directory.",
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


def _asked(config: pytest.Config) -> bool:
    option = config.option
    return bool(option.wg_impl or option.wg_manifest or option.wg_pair or "netns" in option.wg_lane)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if not _is_worker(config):
        if _asked(config):
            # Mistakes in the options are told before anything is started.
            _state(config).registry  # noqa: B018
            _pairs(config)
        sandbox.enter_if_needed(config, _asked(config))


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if not _is_worker(config):
        config.pluginmanager.register(Reporter(_state(config)), "wg-interop-reporter")
    tx = getattr(config.option, "tx", None)
    if tx and sandbox.inside() and not _is_worker(config):
        config.option.tx = [sandbox.worker_spec(spec) for spec in tx]
    if config.option.wg_timeout_scale != 1.0:
        from harness.wait import set_timeout_scale

        set_timeout_scale(config.option.wg_timeout_scale)


def _state(config: pytest.Config) -> State:
    if _STATE not in config.stash:
        config.stash[_STATE] = State(config)
    return config.stash[_STATE]


def _read_registry(config: pytest.Config) -> Registry:
    from harness.implementation import Registry

    try:
        registry = Registry()
        for path in config.option.wg_manifest:
            registry.add(path)
        for text in config.option.wg_impl:
            registry.choose(text)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    return registry


def _pairs(config: pytest.Config) -> list[Pair]:
    registry = _state(config).registry
    if not config.option.wg_pair:
        names = registry.asked or list(registry.known)
        return [Pair(registry.get(a), registry.get(b)) for a in names for b in names]
    return [_pair(registry, text) for text in config.option.wg_pair]


def _pair(registry: Registry, text: str) -> Pair:
    names = text.split("~")
    if len(names) != len(Pair._fields):
        raise pytest.UsageError(f"--pair {text}: want A~B, two implementations with a tilde between")
    try:
        return Pair(registry.get(names[0]), registry.get(names[1]))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


# Collection


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if _uses(metafunc.definition, "pair"):
        metafunc.parametrize("pair", _pairs(metafunc.config), ids=str, indirect=True)
    if _uses(metafunc.definition, "implementation"):
        registry = _state(metafunc.config).registry
        chosen = [registry.get(name) for name in registry.asked or registry.known]
        metafunc.parametrize("implementation", chosen, ids=[manifest.name for manifest in chosen], indirect=True)


def _uses(item: pytest.Item, fixture: str) -> bool:
    """Whether a test uses our fixture of this name; other projects may well have a `lab` or a `pair` of their own."""
    info = getattr(item, "_fixtureinfo", None)
    for definition in reversed(info.name2fixturedefs.get(fixture, ()) if info else ()):
        if getattr(definition.func, "__module__", None) == __name__:
            return True
        # Theirs may be built upon ours.
        if fixture not in definition.argnames:
            break
    return False


def _lane(item: pytest.Item) -> str:
    return "netns" if _uses(item, "lab") else "core"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        marks = [argument for marker in item.iter_markers("requirement") for argument in marker.args]
        if len(marks) > MAX_REQUIREMENTS:
            raise pytest.UsageError(f"{item.nodeid}: a test cites at most {MAX_REQUIREMENTS} requirements, not {marks}")
    lanes = config.option.wg_lane
    if lanes:
        config.hook.pytest_deselected(items=[item for item in items if _lane(item) not in lanes])
        items[:] = [item for item in items if _lane(item) in lanes]


def pytest_collection_finish(session: pytest.Session) -> None:
    state = _state(session.config)
    uses_lab = any(_lane(item) == "netns" for item in session.items)
    if hasattr(session.config, sandbox.PEEKING):
        os._exit(sandbox.PEEK_YES if uses_lab else sandbox.PEEK_NO)
    state.used = state.used or uses_lab
    if uses_lab and not _is_worker(session.config) and not session.config.option.collectonly:
        _clear_evidence(state)


def _clear_evidence(state: State) -> None:
    shutil.rmtree(state.report_directory / "evidence", ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell an xdist worker what the controller has decided."""
    state = _state(node.config)
    node.workerinput["wg_seed"] = state.seed
    if sandbox.inside():
        if not state.used:
            state.used = True
            _clear_evidence(state)
        node.workerinput["wg_run_directory"] = str(state.scratch())


# Fixtures


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Generator[Lab]:
    """The lab of this test: makes nodes, links and interfaces, and undoes them afterwards."""
    from harness.lab import Lab
    from harness.namespace import require_sandbox

    try:
        require_sandbox()
    except HarnessError as error:
        pytest.skip(str(error))
    state = _state(request.config)
    made = Lab(state.scratch() / _file_name(request.node.nodeid), state.seed)
    request.node.stash[_LAB] = made
    yield made
    made.close()
    shutil.rmtree(made.directory, ignore_errors=True)


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    """The two implementations under test, in each order (`--impl`, `--pair`)."""
    chosen: Pair = request.param
    for manifest in dict.fromkeys(chosen):
        _require(request, manifest)
    return chosen


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Manifest:
    """The one implementation under test (`--impl`)."""
    manifest: Manifest = request.param
    _require(request, manifest)
    return manifest


def _require(request: pytest.FixtureRequest, manifest: Manifest) -> None:
    reason = sandbox.refused() if manifest.kind == "kernel" else None
    reason = reason or manifest.why_unavailable()
    if reason:
        pytest.skip(reason)
    for marker in request.node.iter_markers("capability"):
        for name in marker.args:
            if name not in manifest.capabilities:
                pytest.skip(f"unsupported: {manifest.name} does not declare the capability {name}")


def _tunnel(lab: Lab, topology: Topology, pair: Pair) -> Tunnel:
    from harness.tunnel import Tunnel

    return Tunnel(lab, topology, pair.a, pair.b)


@pytest.fixture
def loopback(lab: Lab, pair: Pair) -> Tunnel:
    """A and B in ns1 and ns2, their sockets in ns0 (topology `loopback`)."""
    from harness.topology import LOOPBACK

    return _tunnel(lab, LOOPBACK, pair)


@pytest.fixture
def nat(lab: Lab, pair: Pair) -> Tunnel:
    """A behind a NAT in ns0, B in front of it (topology `nat`)."""
    from harness.topology import NAT

    return _tunnel(lab, NAT, pair)


@pytest.fixture
def direct(lab: Lab, pair: Pair) -> Tunnel:
    """A and B connected by one veth pair without addresses (topology `direct`)."""
    from harness.topology import DIRECT

    return _tunnel(lab, DIRECT, pair)


# Verdicts


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Around each test: the watchman's look, and the undoing of the lab, both part of the test's verdict."""
    made = item.stash.get(_LAB, None)
    if made is None:
        return (yield)
    try:
        answer = yield
        made.watch()
    except BaseException as error:
        made.snapshot()
        # With --pdb the lab stays up for the one who looks; the fixture undoes it afterwards.
        if not item.config.option.usepdb:
            _close_after(made, error)
        raise
    made.close()
    return answer


def _close_after(made: Lab, error: BaseException) -> None:
    try:
        made.close()
    except Exception as late:  # noqa: BLE001 - whatever the undo says, the first error stays the verdict
        error.add_note(f"and the undo: {late}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if _lane(item) == "netns" or _state(item.config).used:
        facts = _facts(item)
        if report.when == "call" or (report.when == "setup" and report.failed):
            facts["artifacts"] = _keep_evidence(item, report)
        _describe(report, facts)
    return report


def _describe(report: pytest.TestReport, facts: dict[str, Any]) -> None:
    from harness.results import PROPERTY

    report.user_properties = [entry for entry in report.user_properties if entry[0] != PROPERTY]
    report.user_properties.append((PROPERTY, facts))


def _facts(item: pytest.Item) -> dict[str, Any]:
    params = getattr(getattr(item, "callspec", None), "params", {})
    sides = [params["implementation"], None] if "implementation" in params else list(params.get("pair", (None, None)))
    facts: dict[str, Any] = {
        "a": _side(sides[0]),
        "b": _side(sides[1]),
        "lane": _lane(item),
        "kernel": platform.release(),
        "scenarios": [name for marker in item.iter_markers("scenario") for name in marker.args],
        "requirements": [name for marker in item.iter_markers("requirement") for name in marker.args],
    }
    return facts


def _side(manifest: Manifest | None) -> dict[str, str] | None:
    if manifest is None:
        return None
    try:
        return {"impl": manifest.name, "version": manifest.version()}
    except HarnessError:
        return {"impl": manifest.name, "version": "unknown"}


def _keep_evidence(item: pytest.Item, report: pytest.TestReport) -> str:
    made = item.stash.get(_LAB, None)
    keep = item.config.option.wg_keep
    if made is None or keep == "none" or (keep == "failed" and not report.failed):
        return ""
    target = _state(item.config).report_directory / "evidence" / _file_name(item.nodeid)
    if report.longreprtext:
        made.note("failure.txt", report.longreprtext + "\n")
    with suppress(FileNotFoundError):
        shutil.rmtree(target)
    shutil.copytree(made.directory, target)
    return str(target.relative_to(target.parent.parent))


def _file_name(nodeid: str) -> str:
    return re.sub(r"[^\w.~+-]+", "_", nodeid)


class Reporter:
    """On the controller, or in a run without xdist: takes the reports and tells who listens."""

    def __init__(self, state: State) -> None:
        self._state = state
        events = os.environ.get(EVENTS)
        self._events = int(events) if events else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self._state.used:
            return
        result = self._state.results.add(report)
        if report.when == "teardown":
            facts = {name: getattr(result, name) for name in ("id", "pair", "state", "seconds", "message")}
            self._tell({"event": "result", **facts})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._tell({"event": "collected", "count": len(session.items)})

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._tell({"event": "collected", "count": len(ids)})

    def _tell(self, event: dict[str, Any]) -> None:
        if self._events is not None:
            with suppress(OSError):
                os.write(self._events, json.dumps(event).encode() + b"\n")


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not (sandbox.inside() or sandbox.refused()):
        return []
    reason = sandbox.refused()
    where = f"no sandbox: {reason}" if reason else "sandbox of its own"
    return [f"wg-interop: {where}, seed {_state(config).seed}"]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, sandbox.PEEKING):
        os._exit(sandbox.PEEK_NO)
    state = _state(session.config)
    if _is_worker(session.config) or session.config.option.collectonly:
        return
    if state.used:
        state.results.write(state.results_path)
        if exitstatus == pytest.ExitCode.OK and (shortcoming := _shortcoming(session.config, state.results)):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            session.config.stash[_SHORTCOMING] = shortcoming
    state.close()


_SHORTCOMING: Final = pytest.StashKey[str]()


def _shortcoming(config: pytest.Config, results: Results) -> str | None:
    """Why a run without a failed test is no success all the same."""
    every: list[Result] = list(results.by_id.values())
    if every and not any(result.state == "passed" for result in every):
        return "no test passed"
    ran = [result for result in every if result.state != "skipped"]
    for lane in config.option.wg_lane:
        if not any(result.lane == lane for result in ran):
            return f"lane {lane} was asked for and did not run"
    for name in _state(config).registry.asked if _asked(config) else ():
        if every and not any(name in (side or {}).get("impl", "") for result in ran for side in (result.a, result.b)):
            return f"{name} was asked for and all its tests were skipped"
    return None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    state = _state(config)
    if not state.used or _is_worker(config) or config.option.collectonly:
        return
    if _SHORTCOMING in config.stash:
        terminalreporter.write_line(f"wg-interop: {config.stash[_SHORTCOMING]}", red=True)
    terminalreporter.write_line(f"results: {state.results_path}")
