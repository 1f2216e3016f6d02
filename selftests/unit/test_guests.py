"""Guests beside a session: which tests they get, who hears what they tell, how they are stopped."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from harness.errors import HarnessError
from harness.guests import Objects, Running, lane_arguments, selection, used_driver
from harness.lanes import SHARE
from harness.launcher import REFUSED
from harness.results import PROPERTY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest_plugins = ["pytester"]

FILES = ("selftests/netns/test_a.py", "selftests/netns/test_b.py")
CREATED = "wireguard: wg0: Interface created\n"
DESTROYED = "wireguard: wg0: Interface destroyed\n"


@pytest.fixture
def session() -> Any:
    """What a session has that Running asks for."""
    return SimpleNamespace(
        shouldfail=False, shouldstop=False, Failed=pytest.Session.Failed, Interrupted=pytest.Session.Interrupted
    )


@pytest.fixture
def running(session: Any) -> Iterator[Running]:
    made = Running(session, 2, lambda _: None)
    yield made
    made.close()


def test_session_hears_in_its_own_thread_and_in_order(running: Running) -> None:
    heard: list[tuple[str, int]] = []

    def hear(word: str) -> None:
        heard.append((word, threading.get_ident()))

    def work() -> str:
        running.tell(lambda: hear("first"))
        running.tell(lambda: hear("second"))
        return "the end"

    running.start(work, hear, lambda error: hear(str(error)))
    running.finish()
    assert heard == [(word, threading.get_ident()) for word in ("first", "second", "the end")]


def test_guest_that_could_not_run_is_told_after_all_others_are_heard(running: Running) -> None:
    heard: list[str] = []

    def work() -> str:
        raise HarnessError("no such kernel")

    running.start(work, heard.append, lambda error: heard.append(f"failed: {error}"))
    running.start(lambda: "fine", heard.append, lambda error: heard.append(str(error)))
    running.finish()
    assert sorted(heard) == ["failed: no such kernel", "fine"]


def test_nothing_is_heard_before_a_test_here_has_ended(running: Running) -> None:
    heard: list[str] = []
    running.tell(lambda: heard.append("a guest's test"))
    assert not heard
    running.pytest_runtest_logfinish()
    assert heard == ["a guest's test"]


@pytest.mark.parametrize(("attribute", "error"), [("shouldfail", "Failed"), ("shouldstop", "Interrupted")])
def test_session_that_should_end_does_not_wait_for_guests(
    running: Running, session: Any, attribute: str, error: str
) -> None:
    def work() -> None:
        running.tell(lambda: setattr(session, attribute, "stopping after 1 failures"))
        os.read(running.stop, 1)

    running.start(work, lambda _: None, lambda _: None)
    with pytest.raises(getattr(pytest.Session, error), match="stopping after 1 failures"):
        running.finish()


def test_guests_are_started_once(session: Any) -> None:
    started: list[list[str]] = []
    running = Running(session, 1, lambda files: started.append(list(files)))
    running.pytest_xdist_node_collection_finished(["a.py::test_one[x]", "b.py::test_two"])
    running.pytest_xdist_node_collection_finished(["a.py::test_one[x]", "b.py::test_two"])
    running.close()
    assert started == [["a.py", "b.py"]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["selftests"], list(FILES)),
        (["/work/selftests/netns"], list(FILES)),
        (["selftests/netns/test_b.py"], [FILES[1]]),
        (["selftests/netns/test_a.py::test_one[x~y]"], ["selftests/netns/test_a.py::test_one[x~y]"]),
        (["selftests/unit"], []),
    ],
)
def test_guest_collects_only_files_with_tests_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: list[str], expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [word.replace("/work", str(tmp_path)) for word in given]
    config = SimpleNamespace(args=args, rootpath=tmp_path, option=SimpleNamespace(keyword="k", wg_pair=["a~b"]))
    more = ["-k", "k", "--pair=a~b"] if expected else []
    assert selection(cast("pytest.Config", config), (*FILES, FILES[0])) == expected + more


@pytest.mark.parametrize("keep", ["failed", "all", "none"])
def test_guest_keeps_the_evidence_that_is_asked_for(pytestconfig: pytest.Config, keep: str) -> None:
    option = SimpleNamespace(**{**vars(pytestconfig.option), "wg_keep": keep})
    arguments = lane_arguments("vm", cast("pytest.Config", SimpleNamespace(option=option)))
    assert arguments[arguments.index("--keep") + 1] == keep


def test_objects_of_one_kernel_are_balanced_over_all_its_guests() -> None:
    objects = Objects(2)
    objects.look(CREATED + DESTROYED, used=True)
    objects.look(CREATED, used=True)
    objects.look("", used=False)
    assert (objects.used, objects.wrong) == (True, ["1 of Interface created, 0 destroyed"])


def test_guest_that_never_used_the_driver_says_nothing_of_objects() -> None:
    objects = Objects(1)
    objects.look("", used=False)
    assert (objects.used, objects.wrong) == (False, [])


@pytest.mark.parametrize(
    ("when", "outcome", "a", "b", "used"),
    [
        ("call", "passed", "refwg", "kernel", True),
        ("call", "passed", "kernel", None, True),
        ("call", "passed", "refwg", "refwg", False),
        ("call", "passed", None, None, False),
        ("call", "skipped", "kernel", "refwg", False),
        ("setup", "passed", "kernel", "refwg", False),
    ],
)
def test_driver_was_used_where_a_test_of_it_has_passed(
    when: Any, outcome: Any, a: str | None, b: str | None, used: bool
) -> None:
    facts = {side: name and {"impl": name, "version": "1"} for side, name in (("a", a), ("b", b))}
    name = "test_of_a_kernel"
    report = pytest.TestReport(name, ("", 0, name), {}, outcome, None, when, user_properties=[(PROPERTY, facts)])
    assert used_driver(report) is used


@pytest.mark.parametrize(("share", "chosen"), [("0/2", "02"), ("1/2", "1"), ("0/1", "012")])
def test_share_is_taken_of_what_the_other_options_leave(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, share: str, chosen: str
) -> None:
    monkeypatch.setenv(SHARE, share)
    monkeypatch.setenv(REFUSED, "a unit test wants none")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(3))
        def test_wanted(number): pass

        def test_other(): pass
        """
    )
    run = pytester.runpytest_inprocess("-v", "-k", "wanted")
    passed = [line for line in run.outlines if "PASSED" in line]
    assert [line.partition("[")[2][0] for line in passed] == list(chosen)
