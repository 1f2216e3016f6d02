"""Check that a lab is undone last in, first out, and that a failing undo fails the test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import Lab
from harness.net.netns import leftover_nodes

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("inner_pytest")

FAILING_UNDO = """
def test(lab):
    lab.node("here")
    lab.undo(lambda: 1 / 0)
    {last}
"""


def fail(word: str) -> None:
    raise OSError(word)


def test_undo_steps_run_in_reverse_order(tmp_path: Path) -> None:
    lab, done = Lab(tmp_path), list[str]()
    for word in ("first", "second"):
        lab.undo(done.append, word)
    lab.node("here")
    lab.undo(lambda: done.append(",".join(leftover_nodes())))
    lab.close()
    assert done == ["here", "second", "first"]
    assert leftover_nodes() == []


def test_failed_undo_is_raised_after_all_were_tried(tmp_path: Path) -> None:
    lab, done = Lab(tmp_path), list[str]()
    lab.undo(done.append, "first")
    lab.undo(fail, "no way")
    lab.undo(done.append, "last")
    with pytest.raises(OSError, match="no way"):
        lab.close()
    assert done == ["last", "first"]


@pytest.mark.parametrize(
    ("last", "lines"),
    [
        ("pass", ["E *ZeroDivisionError: division by zero"]),
        ("assert not 'wrong'", ["E *assert not 'wrong'", "E *and the undo: division by zero"]),
    ],
)
def test_failed_undo_fails_its_test(pytester: pytest.Pytester, last: str, lines: list[str]) -> None:
    pytester.makepyfile(FAILING_UNDO.format(last=last))
    run = pytester.runpytest_inprocess()
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(lines)
    assert leftover_nodes() == []


def test_nodes_of_failed_test_do_not_block_next_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one(lab): lab.node('x'); 1 / 0\ndef test_two(lab): lab.node('x')")
    pytester.runpytest_inprocess().assert_outcomes(failed=1, passed=1)


@pytest.mark.parametrize(("keep", "kept"), [("failed", ["bad"]), ("all", ["bad", "good"]), ("none", [])])
def test_evidence_is_kept_according_to_keep_option(pytester: pytest.Pytester, keep: str, kept: list[str]) -> None:
    pytester.makepyfile(test_it="def good(lab): lab.node('x').run(['true'])\ndef bad(lab): good(lab); 1 / 0")
    pytester.makeini("[pytest]\npython_functions = good bad")
    run = pytester.runpytest_inprocess("--keep", keep)
    run.stdout.fnmatch_lines("to look into the lab of a failed test: --pause-on-error, --shell NODE")
    evidence = pytester.path / "report" / "evidence"
    assert [path.name.rpartition("_")[2] for path in sorted(evidence.glob("*"))] == kept
    assert all("x  true" in (path / "commands.txt").read_text() for path in evidence.glob("*"))


FAILING_SETUP = """
import pytest

@pytest.fixture
def half(lab):
    lab.capture(lab.node("x"), "lo")
    {last}
    1 / 0

def test(half):
    pass
"""


@pytest.mark.parametrize(
    ("last", "kept"), [("pass", {"x.txt", "x-lo.pcapng"}), ("lab.wires.append(None)", {"x.txt", "snapshot.txt"})]
)
def test_failed_setup_leaves_node_state_as_evidence(pytester: pytest.Pytester, last: str, kept: set[str]) -> None:
    pytester.makepyfile(FAILING_SETUP.format(last=last))
    run = pytester.runpytest_inprocess()
    run.assert_outcomes(errors=1)
    run.stdout.fnmatch_lines("E *ZeroDivisionError: division by zero")
    (evidence,) = (pytester.path / "report" / "evidence").glob("*")
    assert kept | {"failure.txt"} <= {path.name for path in evidence.iterdir()}
