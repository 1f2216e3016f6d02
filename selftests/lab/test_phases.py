"""Check that an overdue test is undone with its evidence, and does not affect the next."""

from __future__ import annotations

import re
from typing import Final

import pytest

from harness.net.netns import leftover_nodes

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("inner_pytest")

TESTS: Final = """
import socket
import pytest
from harness import Datagram, udp_receiver, wait_for

def hang(node):
    with udp_receiver(node, "127.0.0.1", 7) as receiver:
        wait_for(Datagram(receiver), 30, "a datagram")

def hang_outside():
    with socket.socket(type=socket.SOCK_DGRAM) as receiver:
        wait_for(Datagram(receiver), 30, "a datagram")

@pytest.fixture
def node(lab):
    node = lab.node("x")
    {setup}
    yield node
    {teardown}

def test(node, lab):
    {call}

def test_next(lab):
    lab.node("x").run(["true"])
"""
OPTIONS: Final = [f"-owg_{when}_timeout=1" for when in ("setup", "call", "teardown")]


def run(pytester: pytest.Pytester, **hangs: str) -> pytest.RunResult:
    lines = {"setup": "", "call": "", "teardown": ""} | hangs
    pytester.makepyfile(test_it=TESTS.format(**{when: line or "pass" for when, line in lines.items()}))
    return pytester.runpytest_inprocess(*OPTIONS)


@pytest.mark.parametrize(
    ("phase", "name", "outcomes"),
    [
        ("setup", "set-up", {"errors": 1, "passed": 1}),
        ("call", "call", {"failed": 1, "passed": 1}),
        ("teardown", "tear-down", {"errors": 1, "passed": 2}),
    ],
)
def test_overdue_test_is_undone_with_evidence_of_its_wait(
    pytester: pytest.Pytester, phase: str, name: str, outcomes: dict[str, int]
) -> None:
    # The test's fixture is undone after its lab.
    hang = "hang(node)" if phase != "teardown" else "wait_for(Never(), 30, 'a datagram')"
    never = (
        "class Never:\n    fileno = lambda self: 1\n    look = lambda self: None\n    seen = lambda self: 'nothing'\n"
    )
    inner = run(pytester, **{phase: hang if phase != "teardown" else f"exec({never!r}, globals()); {hang}"})
    inner.assert_outcomes(**outcomes)
    inner.stdout.re_match_lines(
        [rf"E +Overdue: {name} took longer than its 1 s .*, waiting for: wait for a datagram .*"]
    )
    assert leftover_nodes() == []
    (evidence,) = (pytester.path / "report" / "evidence").glob("*")
    assert "waiting for: wait for a datagram" in (evidence / "stacks.txt").read_text()
    assert f"Overdue: {name} took longer" in (evidence / "failure.txt").read_text()
    steps = (evidence / "commands.txt").read_text()
    assert phase == "teardown" or re.search(
        r"wait for a datagram   # failed after \d\.\d{3} s: Overdue|took longer", steps
    )


def test_command_that_runs_is_named_when_call_is_overdue(pytester: pytest.Pytester) -> None:
    inner = run(pytester, call="node.run(['tail', '-f', '/dev/null'], deadline=30)")
    inner.assert_outcomes(failed=1, passed=1)
    told = "waiting for: x: tail -f /dev/null   # not finished"
    inner.stdout.re_match_lines([rf"E +Overdue: call took longer than its 1 s \(wg_call_timeout\), {told} .*"])


def test_undo_that_hangs_is_interrupted_and_others_done(pytester: pytest.Pytester) -> None:
    inner = run(pytester, call="lab.undo(hang, node); 1 / 0")
    inner.assert_outcomes(failed=1, passed=1)
    inner.stdout.re_match_lines(
        [r"E +ZeroDivisionError: .*", r"E +and the undo: tear-down took longer than its 1 s .*"]
    )
    assert leftover_nodes() == []
