"""Check that what a test leaves behind in its worker fails it by name, and that what is kept on purpose does not."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("inner_pytest")

LEAKS = """
import gc, os, socket, subprocess, threading
from pathlib import Path

import pytest

from harness.sandbox.kept import keep_descriptor
from harness.sandbox.launcher import mount
from harness.sandbox.namespace import unmount

undo = []

class ClosesLate:
    def __init__(self):
        self.descriptor = os.open("kept", os.O_CREAT)

    def __del__(self):
        os.close(self.descriptor)

@pytest.fixture(scope="module", autouse=True)
def clean():
    yield
    for each in undo:
        each()

def test_it(lab, undo=undo):
    {body}
"""


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        (
            "node = lab.node('left'); lab._undo.pop_all(); undo.append(node.close)",
            ["network namespace left; made in left, the test itself: ip netns add left", "thread 'left_0'"],
        ),
        (
            "sock = lab.node('x').socket(socket.AF_INET, socket.SOCK_DGRAM); undo.append(sock.close)",
            ["descriptor *, socket:*: <socket.socket fd=*, family=2, type=2*"],
        ),
        ("file = open('kept', 'w'); undo.append(file.close)", ["descriptor *, */kept: <_io.FileIO name='kept'*"]),
        (
            "one = lab.node('x').spawn('tail -f /dev/null'.split(), log=Path('log')); undo += one.kill, one.close",
            ["process *: tail -f /dev/null; made in x, the test itself: tail -f /dev/null *"],
        ),
        (
            "one = subprocess.Popen('true'); undo.append(one.wait); os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)",
            ["process *: true, which has ended, but nobody has waited for it"],
        ),
        (
            "end = threading.Event(); threading.Thread(target=end.wait, name='mine').start(); undo.append(end.set)",
            ["thread 'mine'"],
        ),
        (
            "Path('at').mkdir(); mount('none', 'at', 'tmpfs', 0); undo.append(lambda: unmount(Path('at')))",
            ["mount at */at"],
        ),
        (
            "os.system('ip link add v8 type veth peer name v9'); undo.append(lambda: os.system('ip link del v8'))",
            ["network interface v8", "network interface v9"],
        ),
    ],
    ids=["node", "socket", "file", "process", "zombie", "thread", "mount", "interface"],
)
def test_leak_of_passed_test_is_error_that_names_it(pytester: pytest.Pytester, body: str, lines: list[str]) -> None:
    pytester.makepyfile(LEAKS.format(body=body))
    run = pytester.runpytest_inprocess()
    run.assert_outcomes(passed=1, errors=1)
    run.stdout.fnmatch_lines(["E *left behind by this test:", *(f"E *{line}" for line in lines)])


@pytest.mark.parametrize(
    "body",
    [
        "ends = threading.Timer(0.1, int); ends.start()",
        "gc.disable(); undo.append(gc.enable); cycle = [ClosesLate()]; cycle.append(cycle)",
        "fd = os.open('kept', os.O_CREAT); keep_descriptor(fd, 'a cache'); undo.append(lambda: os.close(fd))",
        "undo.append(open('kept', 'w').close); assert not 'wrong'",
    ],
    ids=["thread that ends", "cycle", "registered descriptor", "failed test"],
)
def test_ending_or_registered_thing_is_no_error(pytester: pytest.Pytester, body: str) -> None:
    pytester.makepyfile(LEAKS.format(body=body))
    outcomes = pytester.runpytest_inprocess().parseoutcomes()
    assert "errors" not in outcomes
    assert outcomes.get("failed", 0) == ("wrong" in body)


def test_fixture_that_uses_lab_may_end_after_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import socket, pytest

        @pytest.fixture
        def sock(lab):
            with lab.node("x").socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
                yield made

        def test_it(sock):
            assert sock.fileno() > 0
    """)
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
