"""Check when a run enters the sandbox, and that one without the lab prints nothing."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

import pytest

from harness.lanes import EVENTS, LANE
from selftests.support.inner_pytest import GO, LAB, OK, leave_outer_run, refuse_sandbox

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

outside = pytest.fixture(leave_outer_run, autouse=True)
refused = pytest.fixture(refuse_sandbox)

# Another project, which defines fixtures with the names of the plugin's fixtures.
FOREIGN: Final = """
import pytest

@pytest.fixture
def lab(): return "laboratory"

@pytest.fixture
def pair(): return (1, 2)

@pytest.mark.parametrize("implementation", ["fast", "slow"])
def test(lab, pair, implementation): assert (lab, pair) == ("laboratory", (1, 2))
"""
LISTENING: Final = """
import os, sys

def pytest_sessionfinish():
    heavy = {"pyroute2", "cryptography", "harness.lab", "harness.report", "harness.implementations"}
    print(f"sandbox: {os.environ.get('WG_INTEROP_SANDBOX')}; imported: {sorted(heavy & sys.modules.keys())}")
"""


@pytest.mark.parametrize("module", ["def test(): pass", FOREIGN], ids=["plain", "own fixtures of our names"])
def test_unused_plugin_prints_and_imports_nothing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for name in ("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTEST_PLUGINS"):
        monkeypatch.delenv(name)
    pytester.makepyfile(module)
    pytester.makeconftest(LISTENING)
    run = pytester.runpytest_subprocess("-s")
    assert run.ret == OK
    run.stdout.fnmatch_lines("*sandbox: None; imported: []")
    run.stdout.no_fnmatch_line("*wg-interop: *")
    run.stdout.no_fnmatch_line("results: *")
    assert not (pytester.path / "report").exists()


@pytest.mark.usefixtures("refused")
def test_foreign_fixtures_of_same_name_are_not_implementations(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=FOREIGN)
    assert pytester.runpytest_inprocess("--results", "results.json").ret == OK
    results = json.loads((pytester.path / "results.json").read_text())["results"]
    assert [(entry["id"], entry["a"], entry["lane"]) for entry in results] == [
        (f"test_it.py::test[{name}]", None, "core") for name in ("fast", "slow")
    ]


def test_run_that_uses_lab_asks_for_sandbox(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test(lab): pass")
    run = pytester.runpytest_subprocess("-rs")
    run.stdout.fnmatch_lines("wg-interop: *sandbox*, seed *")
    run.stdout.no_fnmatch_line("*start pytest with this plugin*")


@pytest.mark.parametrize("options", [[], ["--impl", GO], ["--lane", "netns"]])
def test_collect_only_run_enters_no_sandbox(pytester: pytest.Pytester, options: list[str]) -> None:
    pytester.makepyfile(LAB)
    pytester.makeconftest(LISTENING)
    run = pytester.runpytest_subprocess("-s", "--collect-only", *options)
    assert run.ret == OK
    run.stdout.fnmatch_lines("*sandbox: None; *")
    assert not (pytester.path / "report").exists()


@pytest.mark.usefixtures("refused")
def test_skip_reason_is_reason_of_missing_sandbox(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it="def test(lab): pass")
    run = pytester.runpytest_inprocess("-rs")
    run.stdout.fnmatch_lines(
        ["wg-interop: no sandbox: unit tests need no sandbox, seed *", "SKIPPED*: unit tests need no sandbox"]
    )


@pytest.mark.usefixtures("refused")
def test_header_names_what_run_without_options_leaves_out(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pytester.makepyfile("def test(lab): pass")
    known = "wg-interop: left out: lanes vm and warp (*); *wireguard-go*, not installed (wg-interop install *)"
    pytester.runpytest_inprocess().stdout.fnmatch_lines([known])
    pytester.runpytest_inprocess("--lane", "netns").stdout.no_fnmatch_line("*left out*")


@pytest.mark.usefixtures("refused")
def test_run_in_guest_exits_with_0_when_all_tests_are_skipped(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LANE, "vm")
    pytester.makepyfile(test_it=LAB)
    assert pytester.runpytest_inprocess("--lane", "netns", "--impl", GO).ret == OK


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("name", ["guest", "objects"])
def test_report_about_whole_guest_is_sent_as_event(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytester.makeconftest(
        f"""
        import pytest

        def pytest_runtest_logfinish(nodeid):
            for when in ("call", "teardown"):
                report = pytest.TestReport("vm::{name}[6.12]", ("vm", None, ""), {{}}, "passed", None, when)
                hook.pytest_runtest_logreport(report=report)

        def pytest_configure(config):
            global hook
            hook = config.hook
        """
    )
    pytester.makepyfile(test_it="def test_core(): pass")
    reading, writing = os.pipe()
    monkeypatch.setenv(EVENTS, str(writing))
    assert pytester.runpytest_inprocess("--results", "results.json").ret == OK
    os.close(writing)
    events = [json.loads(line) for line in os.read(reading, 1 << 16).splitlines()]
    os.close(reading)
    assert [event["id"] for event in events if event["event"] == "result"] == [
        "test_it.py::test_core",
        f"vm::{name}[6.12]",
    ]
