"""Check the health check: an unhealthy program fails its test, with the reason."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from harness import Registry, wait
from harness.net.netns import leftover_nodes

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("inner_pytest")

# Starts the real program, and runs code of the test at SIGUSR1 and at SIGTERM.
WRAPPER = """\
#!{python}
import os, signal, subprocess, sys, threading
from threading import Event
sys.path.insert(0, {root!r})
from harness.sandbox.launcher import die_with_parent

if "--version" in sys.argv:
    sys.exit("mine 1.0")

def on_demand(*_):
    {on_demand}
    print("done", flush=True)

def on_sigterm(*_):
    {on_sigterm}

signal.signal(signal.SIGUSR1, on_demand)
signal.signal(signal.SIGTERM, on_sigterm)
program = subprocess.Popen([{program!r}, *sys.argv[1:]], preexec_fn=lambda: die_with_parent(True))
try:
    while True:
        signal.pause()
finally:
    program.terminate()
    program.wait()
"""
TEST = """
import signal

def test(lab, implementation):
    iface = lab.interface("wg0", implementation, lab.node("here"))
    iface.process.signal(signal.SIGUSR1)
    iface.process.{awaited}
"""
SLOW = """\
name = "slow"
kind = "uapi"

[program]
path = "slow"

[watch]
stop_after = {stop_after}
"""
DONE = 'says("^done$")'
ENDED = "wait(5)"
EXITS = "sys.exit(0)"


@pytest.fixture
def real() -> str:
    """Path of the real program that the wrapper starts."""
    manifest = Registry().get("wireguard-go-debian")
    if reason := manifest.why_unavailable():
        pytest.skip(reason)
    return str(manifest.find_program())


def run_wrapped(pytester: pytest.Pytester, script: str, test: str, *options: str) -> pytest.RunResult:
    """Run the test with this script as the implementation."""
    program = pytester.path / "wrapper"
    program.write_text(script)
    program.chmod(0o755)
    pytester.makepyfile(test)
    return pytester.runpytest_inprocess("--impl", f"mine={program}", *options)


def wrapper(real: str, on_demand: str, on_sigterm: str = EXITS) -> str:
    root = str(Path(wait.__file__).parents[1])
    return WRAPPER.format(python=sys.executable, root=root, program=real, on_demand=on_demand, on_sigterm=on_sigterm)


@pytest.mark.parametrize(
    ("on_demand", "awaited", "complaint"),
    [
        ("print('panic: oops')", DONE, "wrote: panic: oops"),
        ("print(\"thread '<unnamed>' (7) panicked at x.rs:1:2:\\nno peer\")", DONE,
         "wrote: thread '<unnamed>' (7) panicked at x.rs:1:2: no peer"),
        ("global kept; kept = [open('/dev/null') for _ in range(40)]", DONE,
         "has * descriptors more than at its start (*); 16 are allowed"),
        ("[threading.Thread(target=signal.pause, daemon=True).start() for _ in range(40)]", DONE,
         "has * threads more than at its start (*); 32 are allowed"),
        ("print('giving up', flush=True); os._exit(3)", ENDED, "ended with status 3 during the test; it last wrote:"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", ENDED, "was killed by signal 11 during the test; it last wrote:"),
        ("os._exit(0)", ENDED, "ended with status 0 during the test; it last wrote:"),
    ],
)  # fmt: skip
def test_unhealthy_program_fails_its_test(
    pytester: pytest.Pytester, real: str, on_demand: str, awaited: str, complaint: str
) -> None:
    run = run_wrapped(pytester, wrapper(real, on_demand), TEST.format(awaited=awaited))
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(f"E *mine (pid *) {complaint}")
    assert leftover_nodes() == []
    # The evidence has the state of the node at that time.
    assert list((pytester.path / "report").rglob("here.txt"))


def test_program_that_ends_after_its_link_fails_its_test(pytester: pytest.Pytester, real: str) -> None:
    """SIGTERM in between would make it end as the lab wants."""
    ends_late = "program.terminate(); program.wait(); print('done', flush=True); Event().wait(0.3); os._exit(0)"
    run = run_wrapped(pytester, wrapper(real, ends_late), TEST.format(awaited=DONE))
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines("E *mine (pid *) ended with status 0 during the test; it last wrote:")


@pytest.mark.parametrize(
    ("on_sigterm", "complaint"),
    [
        ("pass", "still ran 2.5 s after SIGTERM"),
        ("os.abort()", "died of signal 6 after SIGTERM"),
        ("print('panic: at the end', flush=True); sys.exit(0)", "wrote: panic: at the end"),
    ],
)
def test_unclean_exit_of_program_fails_its_test(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, real: str, on_sigterm: str, complaint: str
) -> None:
    monkeypatch.setattr(wait, "_scale", 1.25)
    run = run_wrapped(pytester, wrapper(real, "pass", on_sigterm), TEST.format(awaited=DONE))
    run.assert_outcomes(errors=1)
    run.stdout.fnmatch_lines(f"mine failed its smoke test: Unhealthy: mine (pid *) {complaint}")
    assert leftover_nodes() == []


@pytest.mark.parametrize(("stop_after", "outcomes"), [(0.2, {"errors": 1}), (20, {"passed": 1})])
def test_stop_time_is_limited_as_manifest_says(
    pytester: pytest.Pytester, real: str, stop_after: float, outcomes: dict[str, int]
) -> None:
    program = pytester.path / "slow"
    program.write_text(
        wrapper(real, "pass", "from harness import let_pass; let_pass(0.5, 'it stops slowly'); sys.exit(0)")
    )
    program.chmod(0o755)
    (pytester.path / "slow.toml").write_text(SLOW.format(stop_after=stop_after))
    pytester.makepyfile(TEST.format(awaited=DONE))
    run = pytester.runpytest_inprocess("--impl-manifest", "slow.toml")
    run.assert_outcomes(**outcomes)
    if "errors" in outcomes:
        run.stdout.fnmatch_lines("*Unhealthy: slow (pid *) still ran 0.2 s after SIGTERM*")


def test_healthy_program_passes_health_check(pytester: pytest.Pytester, real: str) -> None:
    run = run_wrapped(pytester, wrapper(real, "print('all is well')"), TEST.format(awaited=DONE), "--keep", "all")
    run.assert_outcomes(passed=1)
    (log,) = (pytester.path / "report").rglob("here-wg0-mine.log")
    assert "all is well" in log.read_text()


@pytest.mark.parametrize(
    ("on_demand", "outcomes"), [("print('all is well')", {}), ("print('panic: oops')", {"failed": 1})]
)
def test_difference_does_not_hide_unhealthy_program(
    pytester: pytest.Pytester, real: str, on_demand: str, outcomes: dict[str, int]
) -> None:
    test = f"from harness.plugin.verdicts import differs\n{TEST.format(awaited=DONE)}\n    differs('it hums')"
    run = run_wrapped(pytester, wrapper(real, on_demand), test)
    run.assert_outcomes(**outcomes)
    assert ("DIFFERS test_difference" in run.stdout.str()) == (not outcomes)
    assert leftover_nodes() == []


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("#!/bin/sh\necho no tun; exit 1\n", ["mine failed *: mine: * -f wg0: ended at its start:", "no tun"]),
        ("#!/bin/sh\nkill -9 $$\n", ["mine failed *HarnessError: mine: * -f wg0: ended at its start:"]),
        ("#!/bin/sh\n[ $1 = --version ] || exec tail -f /dev/null\n",
         ["mine failed *: waited 1.5 s for mine to make /run/wireguard/wg0.sock; seen: nothing new; it *"]),
        ("#!/no/such/interpreter\n", ["mine failed *Unavailable: */wrapper: No such file or directory; *"]),
    ],
)  # fmt: skip
def test_program_start_failure_is_reported_with_reason(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, script: str, complaint: list[str]
) -> None:
    monkeypatch.setattr(wait, "_scale", 0.1)
    run = run_wrapped(pytester, script, TEST.format(awaited=DONE))
    run.assert_outcomes(errors=1)
    run.stdout.fnmatch_lines(complaint)
    assert leftover_nodes() == []


def test_health_complaint_is_appended_to_test_failure(pytester: pytest.Pytester, real: str) -> None:
    run = run_wrapped(pytester, wrapper(real, "print('panic: oops')"), f"{TEST.format(awaited=DONE)}\n    1 / 0")
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(
        ["E *ZeroDivisionError: division by zero", "E *and the undo: mine (pid *) wrote: panic: oops"]
    )


ENDS = """
import signal
from harness import Registry, not_reached, twin, wait_for

def test(lab):
    wg0 = lab.interface("wg0", Registry().get("refwg"), lab.node("here"))
    wg0.process.signal(signal.SIGKILL)
    wg0.process.wait(5.0)
    {how}
"""


@pytest.mark.parametrize("how", ["with twin('it answers'): assert not 'an answer'", "not_reached('no load')"])
def test_end_of_program_is_failure_and_not_blocked(pytester: pytest.Pytester, how: str) -> None:
    pytester.makepyfile(ENDS.format(how=how))
    pytester.runpytest_inprocess("--impl", "refwg")
    (result,) = json.loads((pytester.path / "report" / "results.json").read_text())["results"]
    assert result["state"] == "failed"
    assert re.match(r"refwg .*was killed by signal 9 during the test", result["message"])
    assert "and before: " in result["message"]
