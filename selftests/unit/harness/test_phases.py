"""Check time limits of set-up, call and tear-down: an overdue test fails, the run goes on."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, Final

import pytest

from harness import wait  # noqa: F401 - before any inner pytest, which forgets what it has imported
from harness.lanes import LANE
from harness.sandbox.launcher import INSIDE, REFUSED

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

# `hang` waits for a datagram that is never sent; the next test passes.
TESTS: Final = """
import socket
import threading
import pytest
from harness import Datagram, wait_for

def hang(seconds=30):
    with socket.socket(type=socket.SOCK_DGRAM) as receiver:
        wait_for(Datagram(receiver), seconds, "a datagram")

@pytest.fixture
def undone():
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="elsewhere")
    thread.start()
    yield
    release.set()
    thread.join()
    print("undone")

{tests}

def test_next():
    print("next")
"""
CALL: Final = "{mark}\ndef test(undone):\n    hang()"
SETUP: Final = "@pytest.fixture\ndef slow(undone):\n    hang()\n\ndef test(slow): pass"
TEARDOWN: Final = "@pytest.fixture\ndef slow(undone):\n    yield\n    hang()\n\ndef test(slow): pass"
SHORT: Final = ("-o", "wg_setup_timeout=0.2", "-o", "wg_call_timeout=0.2", "-o", "wg_teardown_timeout=0.2")
WAITED: Final = r"waiting for: wait for a datagram   # not finished after 0\.\d+ s; seen: no datagram"


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an inner pytest without the settings of this run, and with our plugin alone."""
    monkeypatch.delenv(INSIDE, raising=False)
    monkeypatch.setenv(REFUSED, "a unit test wants none")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(pytester: pytest.Pytester, tests: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(TESTS.replace("{tests}", tests.replace("{mark}", "")))
    return pytester.runpytest_inprocess("-s", *options)


@pytest.mark.parametrize(
    ("tests", "phase", "setting", "outcomes"),
    [
        (SETUP, "set-up", "wg_setup_timeout", {"errors": 1, "passed": 1}),
        (CALL, "call", "wg_call_timeout", {"failed": 1, "passed": 1}),
        (TEARDOWN, "tear-down", "wg_teardown_timeout", {"errors": 1, "passed": 2}),
    ],
)
def test_overdue_phase_fails_with_its_name_budget_and_wait(
    pytester: pytest.Pytester, tests: str, phase: str, setting: str, outcomes: dict[str, int]
) -> None:
    inner = run(pytester, tests, *SHORT)
    inner.assert_outcomes(**outcomes)
    inner.stdout.re_match_lines([rf"E +Overdue: {phase} took longer than its 0\.2 s \({setting}\), {WAITED}"])
    inner.stdout.re_match_lines([r"-+ Captured stacks of other threads, \S+ -+", "elsewhere:", r".* in wait"])
    text = str(inner.stdout)
    assert text.index("undone") < text.index("next")


@pytest.mark.parametrize(
    ("mark", "options", "told"),
    [
        ("@pytest.mark.timeout(0.3)", [], r"0\.3 s \(mark `timeout`\)"),
        ("@pytest.mark.timeout(timeout=0.3)", SHORT[2:4], r"0\.3 s \(mark `timeout`\)"),
        ("@pytest.mark.timeout(0.1)", ["--timeout-scale", "3"], r"0\.3 s \(mark `timeout`\)"),
        ("", ["-o", "wg_call_timeout=0.1", "--timeout-scale", "3"], r"0\.3 s \(wg_call_timeout\)"),
    ],
)
def test_budget_of_call_comes_from_mark_or_option(
    pytester: pytest.Pytester, mark: str, options: list[str], told: str
) -> None:
    inner = run(pytester, CALL.replace("{mark}", mark), "-o", "wg_setup_timeout=60", *options)
    inner.assert_outcomes(failed=1, passed=1)
    inner.stdout.re_match_lines([rf"E +Overdue: call took longer than its {told}, waiting .*"])


def test_mark_does_not_limit_setup(pytester: pytest.Pytester) -> None:
    tests = SETUP.replace("hang()", "pytest.raises(Exception, hang, 0.3)").replace(
        "def test(", "@pytest.mark.timeout(0.1)\ndef test("
    )
    run(pytester, tests, "-o", "wg_setup_timeout=60").assert_outcomes(passed=2)


@pytest.mark.parametrize("options", [["-o", "wg_call_timeout=0"], ["--timeout", "0", *SHORT, "-p", "pytest_timeout"]])
def test_zero_is_no_limit(pytester: pytest.Pytester, options: list[str]) -> None:
    run(pytester, CALL.replace("hang()", "pytest.raises(Exception, hang, 0.4)"), *options).assert_outcomes(passed=2)


def test_phases_have_no_limit_in_lane_warp(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LANE, "warp")
    run(pytester, CALL.replace("hang()", "pytest.raises(Exception, hang, 0.4)"), *SHORT).assert_outcomes(passed=2)


@pytest.mark.parametrize("options", [["--timeout", "0.3"], ["-o", "timeout=0.3"]])
def test_limit_of_pytest_timeout_is_budget_of_call(pytester: pytest.Pytester, options: list[str]) -> None:
    inner = run(pytester, CALL, "-p", "pytest_timeout", "-o", "wg_setup_timeout=60", *options)
    inner.assert_outcomes(failed=1, passed=1)
    inner.stdout.re_match_lines([r"E +Overdue: call took longer than its 0\.3 s \(--timeout\), waiting .*"])


def test_tests_without_lab_are_left_to_pytest_timeout(pytester: pytest.Pytester) -> None:
    inner = run(pytester, CALL, "-p", "pytest_timeout", "--timeout", "0.3")
    inner.assert_outcomes(failed=1, passed=1)
    inner.stdout.re_match_lines([r"E +Failed: Timeout \(>0\.3s\) from pytest-timeout\."])


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("wg_setup_timeout=soon", "ERROR: wg_setup_timeout = soon: want seconds, or 0 for no limit"),
    ],
)
def test_malformed_budget_is_reported(pytester: pytest.Pytester, option: str, told: str) -> None:
    inner = run(pytester, CALL, "-o", option)
    assert inner.ret == pytest.ExitCode.USAGE_ERROR
    inner.stderr.fnmatch_lines([told])


def test_malformed_mark_is_reported(pytester: pytest.Pytester) -> None:
    inner = run(pytester, CALL.replace("{mark}", "@pytest.mark.timeout('soon')"), *SHORT)
    inner.assert_outcomes(failed=1, passed=1)
    inner.stdout.fnmatch_lines(["*::test: mark timeout: want seconds: timeout(60)"])


def test_broad_except_does_not_swallow_overdue_call(pytester: pytest.Pytester) -> None:
    tests = "def test():\n    try:\n        hang()\n    except Exception:\n        print('swallowed')"
    inner = run(pytester, tests, *SHORT)
    inner.assert_outcomes(failed=1, passed=1)
    inner.stdout.no_fnmatch_line("*swallowed*")


def test_clean_up_that_hangs_is_interrupted_as_well(pytester: pytest.Pytester) -> None:
    tests = "def test():\n    try:\n        hang()\n    finally:\n        hang()"
    inner = run(pytester, tests, *SHORT)
    inner.assert_outcomes(failed=1, passed=1)
    assert len(re.findall(r"E +Overdue: call took longer", str(inner.stdout))) == 2


def test_debugger_ends_limit_of_phase(pytester: pytest.Pytester) -> None:
    lines = (
        "request.config.hook.pytest_enter_pdb(config=request.config, pdb=None)\n    pytest.raises(Exception, hang, 0.4)"
    )
    run(pytester, f"def test(request):\n    {lines}", *SHORT).assert_outcomes(passed=2)


def test_limit_of_outer_run_goes_on_after_inner_run(pytester: pytest.Pytester) -> None:
    handler, (before, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    run(pytester, CALL, *SHORT).assert_outcomes(failed=1, passed=1)
    after, _ = signal.getitimer(signal.ITIMER_REAL)
    assert 0 < after < before
    assert signal.getsignal(signal.SIGALRM) is handler
