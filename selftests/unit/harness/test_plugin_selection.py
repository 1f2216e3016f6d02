"""Check which tests a run selects, in which order, and that those marked `alone` run alone."""

from __future__ import annotations

import fcntl
import threading
from typing import TYPE_CHECKING, Final

import pytest

from harness import poll_until
from harness.lanes import LANE
from harness.plugin.alone import held
from harness.plugin.selection import runs_here
from harness.plugin.session import state_of_run
from harness.sandbox.launcher import REFUSED
from selftests.support.inner_pytest import DEBIAN, GO, IMPLEMENTATION, LAB, leave_outer_run, refuse_sandbox

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

outside = pytest.fixture(leave_outer_run, autouse=True)
refused = pytest.fixture(refuse_sandbox)


def collected(pytester: pytest.Pytester, *options: str) -> list[pytest.Item]:
    """The tests that a run with these options selects, in order."""
    session = pytester.inline_run("--collect-only", *options).getcall("pytest_collection_finish").session
    items: list[pytest.Item] = session.items
    return items


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        (["--impl", GO], [f"{GO}~{GO}"]),
        (["--impl", GO, "--impl", DEBIAN], [f"{GO}~{GO}", f"{GO}~{DEBIAN}", f"{DEBIAN}~{GO}", f"{DEBIAN}~{DEBIAN}"]),
        (["--impl", GO, "--impl", DEBIAN, "--pair", f"{DEBIAN}~{GO}"], [f"{DEBIAN}~{GO}"]),
        (["--pair", f"{GO}~{DEBIAN}", "--pair", "kernel~kernel"], [f"{GO}~{DEBIAN}", "kernel~kernel"]),
    ],
)
def test_pair_comes_first_in_test_id(pytester: pytest.Pytester, options: list[str], pairs: list[str]) -> None:
    pytester.makepyfile(test_it=LAB)
    items, _ = pytester.inline_genitems("-q", *options)
    ids = [item.name for item in items if item.name != "test_core"]
    assert sorted(ids) == sorted(f"test_pair[{pair}-{family}]" for pair in pairs for family in ("v4", "v6"))


def test_every_implementation_meets_every_other_by_default(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=LAB)
    items, _ = pytester.inline_genitems("-q")
    names = {item.name for item in items}
    assert {f"test_pair[{a}~{b}-v4]" for a in (GO, DEBIAN, "kernel") for b in (GO, DEBIAN, "kernel")} <= names


@pytest.mark.parametrize(("options", "ids"), [(["--impl", GO], [GO]), (["--impl", DEBIAN, "--impl", GO], [DEBIAN, GO])])
def test_single_implementation_is_parameter_in_test_id(
    pytester: pytest.Pytester, options: list[str], ids: list[str]
) -> None:
    pytester.makepyfile(test_it=IMPLEMENTATION)
    items, _ = pytester.inline_genitems("-q", *options)
    assert [item.name for item in items] == [f"test[{name}]" for name in ids]


@pytest.mark.parametrize(
    ("lanes", "names"),
    [
        (["core"], ["test_core"]),
        (["netns"], [f"test_pair[{GO}~{GO}-v4]", f"test_pair[{GO}~{GO}-v6]"]),
        (["core", "netns"], ["test_core", f"test_pair[{GO}~{GO}-v4]", f"test_pair[{GO}~{GO}-v6]"]),
        (["core", "vm"], ["test_core", f"test_pair[{GO}~{GO}-v4]", f"test_pair[{GO}~{GO}-v6]"]),
        (["core", "warp"], ["test_core"]),
    ],
)
def test_lane_option_selects_tests_by_use_of_lab(pytester: pytest.Pytester, lanes: list[str], names: list[str]) -> None:
    pytester.makepyfile(test_it=LAB)
    run = pytester.runpytest_inprocess("--collect-only", "-q", "--impl", GO, *(f"--lane={lane}" for lane in lanes))
    assert [line for line in run.outlines if "::" in line] == [f"test_it.py::{name}" for name in names]


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(("lane", "programs"), [("vm", ["kernel"]), ("warp", ["kernel", "refwg"])])
def test_only_guest_of_lane_vm_leaves_out_programs_beside_kernel(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, lane: str, programs: list[str]
) -> None:
    monkeypatch.setenv(LANE, lane)
    pytester.makepyfile(test_it="def test_it(lab, implementation): pass")
    run = pytester.runpytest_inprocess("--lane", "netns", "--impl", "kernel", "--impl", "refwg", "--collect-only", "-q")
    assert [line for line in run.outlines if "::" in line] == [f"test_it.py::test_it[{name}]" for name in programs]


@pytest.mark.usefixtures("refused")
def test_kernel_pairs_are_left_to_lane_vm_without_wireguard_here(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it="def test_pair(lab, pair): pass\ndef test_one(lab, implementation): pass")
    words = ("--impl=kernel", f"--impl={GO}", "--lane=netns")
    with_guest, without = (pytester.inline_genitems(*words, *more)[0] for more in (["--lane=vm"], []))
    plan = state_of_run(with_guest[0].config).plan
    here = [item.nodeid for item in with_guest if runs_here(item, plan)]
    assert here == [f"test_it.py::test_pair[{GO}~{GO}]", f"test_it.py::test_one[{GO}]"]
    assert all(runs_here(item, state_of_run(item.config).plan) for item in without)


SUITES_HERE: Final = """
def test_unit(): pass
def test_pair(lab, pair): pass
def test_one(lab, implementation): pass
"""


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ("--suite=pairs", {"test_it.py::test_pair"}),
        ("--suite=alone", {"test_it.py::test_one"}),
        ("--suite=lab", {"lab/test_node.py::test_node"}),
        ("--suite=lab --suite=alone", {"test_it.py::test_one", "lab/test_node.py::test_node"}),
        ("--suite=conformance", {"conformance/test_rule.py::test_pair", "conformance/test_rule.py::test_one"}),
    ],
)
def test_suite_option_selects_tests_by_what_they_are_about(
    pytester: pytest.Pytester, options: str, chosen: set[str]
) -> None:
    pytester.makepyfile(test_it=SUITES_HERE)
    pytester.mkdir("lab").joinpath("test_node.py").write_text("def test_node(lab): pass")
    pytester.mkdir("conformance").joinpath("test_rule.py").write_text(SUITES_HERE)
    items = collected(pytester, "--pair", f"{GO}~{DEBIAN}", *options.split())
    assert {item.nodeid.partition("[")[0] for item in items} == chosen


ALONE: Final = """
import fcntl, os, pathlib, pytest

@pytest.mark.alone
@pytest.mark.parametrize("n", range(2))
def test_alone(n):
    assert sorted(pathlib.Path("running").iterdir()) == []

@pytest.mark.parametrize("n", range(20))
def test_beside(n):
    mark = pathlib.Path("running", str(n))
    mark.touch()
    for _ in range(100): os.sched_yield()
    mark.unlink()
"""


def test_marker_alone_puts_test_last(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(ALONE)
    items = collected(pytester)
    assert [item.name.partition("[")[0] for item in items] == ["test_beside"] * 20 + ["test_alone"] * 2


def test_marker_alone_keeps_other_workers_waiting(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin")
    monkeypatch.setenv(REFUSED, "unit tests need no sandbox")
    pytester.mkdir("running")
    pytester.makepyfile(ALONE)
    run = pytester.runpytest_subprocess("-n", "2", "--dist", "worksteal", "-v")
    run.assert_outcomes(passed=22)


def await_locked(lock: Path) -> None:
    """Return when the lock of this file is held."""
    with lock.open() as file:

        def is_taken() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
            return False

        assert poll_until(is_taken, bool, 5), f"{lock} was not locked within 5 s"


def test_exclusive_lock_waits_for_shared_and_precedes_later_ones(tmp_path: Path) -> None:
    order: list[str] = []
    waits = threading.Event()

    def take(name: str, *, exclusive: bool) -> None:
        waits.set()
        with held(tmp_path, exclusive=exclusive):
            order.append(name)

    with held(tmp_path, exclusive=False):
        threads = [threading.Thread(target=take, args=("alone",), kwargs={"exclusive": True})]
        threads[0].start()
        # The exclusive one is queued as soon as it holds the lock of the queue.
        assert waits.wait(5)
        await_locked(tmp_path / "alone.queue")
        threads.append(threading.Thread(target=take, args=("later",), kwargs={"exclusive": False}))
        threads[1].start()
        assert order == []
    for thread in threads:
        thread.join(5)
    assert order == ["alone", "later"]
