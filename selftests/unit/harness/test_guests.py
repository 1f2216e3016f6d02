"""Check guests beside a session: their tests, their events, and how they are stopped."""

from __future__ import annotations

import json
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from harness.errors import HarnessError
from harness.lanes import EVENTS, SHARD
from harness.plugin.guests import (
    GuestReporter,
    Guests,
    LeakCheck,
    Shard,
    lane_arguments,
    selection,
    used_driver,
)
from harness.plugin.options import RunPlan
from harness.plugin.remote import RemotePool
from harness.plugin.reporter import Reporter
from harness.plugin.session import REPORTER, state_of_run
from harness.report.results import set_facts
from harness.sandbox.launcher import REFUSED
from harness.vm import boot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest_plugins = ["pytester"]

FILES = ("selftests/netns/test_a.py", "selftests/netns/test_b.py")
# Replaces QEMU: each guest is a process of this machine, and records the files that it was given.
NO_QEMU = """
import os, pathlib, subprocess, sys, tempfile, types
from harness.vm import boot

def guest(kernel, command, *, environment, folder, show, **rest):
    # In a guest `python` is this interpreter, here it may be another.
    command = [sys.executable, *command[1:]]
    completed = subprocess.run(command, env=os.environ | environment, cwd=folder, stdout=subprocess.PIPE)
    show(completed.stdout)
    with open(environment["WG_INTEROP_LANE"] + ".txt", "a") as note:
        print(*(word for word in command if word.endswith(".py")), file=note)
    results = pathlib.Path(tempfile.mkdtemp(dir=folder))
    (results / "kernel.log").touch()
    return types.SimpleNamespace(
        ending=boot.Ending.EXITED, status=completed.returncode, kernel=kernel, results=results
    )

boot.boot = guest
boot.find = boot.require_in_guest = lambda *_: None
"""
CREATED = "wireguard: wg0: Interface created\n"
DESTROYED = "wireguard: wg0: Interface destroyed\n"


@pytest.fixture
def session() -> Any:
    """The attributes of a session that RemotePool uses."""
    return SimpleNamespace(
        shouldfail=False, shouldstop=False, Failed=pytest.Session.Failed, Interrupted=pytest.Session.Interrupted
    )


@pytest.fixture
def running(session: Any) -> Iterator[RemotePool]:
    pool = RemotePool(session, 2, lambda _: None)
    yield pool
    pool.close()


def test_guest_events_run_in_session_thread_and_in_order(running: RemotePool) -> None:
    events: list[tuple[str, int]] = []

    def handle(word: str) -> None:
        events.append((word, threading.get_ident()))

    def work() -> str:
        running.put(lambda: handle("first"))
        running.put(lambda: handle("second"))
        return "the end"

    running.start(work, handle, lambda error: handle(str(error)))
    running.finish()
    assert events == [(word, threading.get_ident()) for word in ("first", "second", "the end")]


def test_failed_guest_and_finished_guest_are_both_reported(running: RemotePool) -> None:
    events: list[str] = []

    def work() -> str:
        raise HarnessError("no such kernel")

    running.start(work, events.append, lambda error: events.append(f"failed: {error}"))
    running.start(lambda: "fine", events.append, lambda error: events.append(str(error)))
    running.finish()
    assert sorted(events) == ["failed: no such kernel", "fine"]


def test_guest_event_waits_until_local_test_has_ended(running: RemotePool) -> None:
    events: list[str] = []
    running.put(lambda: events.append("a guest's test"))
    assert not events
    running.pytest_runtest_logfinish()
    assert events == ["a guest's test"]


@pytest.mark.parametrize(("attribute", "error"), [("shouldfail", "Failed"), ("shouldstop", "Interrupted")])
def test_session_that_should_end_does_not_wait_for_guests(
    running: RemotePool, session: Any, attribute: str, error: str
) -> None:
    def work() -> None:
        running.put(lambda: setattr(session, attribute, "stopping after 1 failures"))
        os.read(running.stop, 1)

    running.start(work, lambda _: None, lambda _: None)
    with pytest.raises(getattr(pytest.Session, error), match="stopping after 1 failures"):
        running.finish()


def test_guests_are_started_once(session: Any) -> None:
    started: list[list[str]] = []
    running = RemotePool(session, 1, lambda files: started.append(list(files)))
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
    config = SimpleNamespace(args=args, rootpath=tmp_path, option=SimpleNamespace(keyword="k"))
    more = ["-k", "k", "--pair=a~b"] if expected else []
    assert selection(cast("pytest.Config", config), RunPlan(pairs=("a~b",)), (*FILES, FILES[0])) == expected + more


@pytest.mark.parametrize("keep", ["failed", "all", "none"])
def test_guest_receives_keep_option_of_session(keep: str) -> None:
    arguments = lane_arguments("vm", "", RunPlan(keep=keep))
    assert arguments[arguments.index("--keep") + 1] == keep


def test_driver_object_imbalance_in_one_guest_is_recorded() -> None:
    objects = LeakCheck(2)
    objects.look(CREATED + DESTROYED, used=True)
    objects.look(CREATED, used=True)
    objects.look("", used=False)
    assert (objects.used, objects.wrong) == (True, ["1 of Interface created, 0 destroyed"])


def test_driver_objects_are_not_checked_when_driver_was_not_used() -> None:
    objects = LeakCheck(1)
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
def test_driver_counts_as_used_only_after_passed_kernel_test(
    when: Any, outcome: Any, a: str | None, b: str | None, used: bool
) -> None:
    facts = {side: name and {"impl": name, "version": "1"} for side, name in (("a", a), ("b", b))}
    name = "test_of_a_kernel"
    report = pytest.TestReport(name, ("", 0, name), {}, outcome, None, when)
    set_facts(report, facts)
    assert used_driver(report) is used


def test_vm_lane_omits_pairs_without_kernel_and_warp_does_not(pytester: pytest.Pytester) -> None:
    words = ["--lane=netns", "--lane=vm", "--lane=warp", "--impl=kernel", "--impl=refwg"]
    config = pytester.parseconfig(*words)
    guests = Guests(config, state_of_run(config))
    assert guests.pairs("vm") == [f"--pair={pair}" for pair in ("kernel~kernel", "kernel~refwg", "refwg~kernel")]
    assert guests.pairs("warp") == []


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        (["--pair", "mine~wireguard-go"], ["mine", "wireguard-go"]),
        (["--pair", "mine~mine"], ["mine"]),
        ([], ["mine"]),
    ],
)
def test_guest_receives_programs_of_chosen_pairs(pytester: pytest.Pytester, words: list[str], taken: list[str]) -> None:
    program = pytester.makefile("", mine="#!/bin/sh\n")
    program.chmod(0o755)
    config = pytester.parseconfig("--impl", f"mine={program}", *words)
    files, options = Guests(config, state_of_run(config)).programs()
    assert (program, "/peers/mine/mine") in files
    assert [word.partition("=")[0] for word in options] == [each for name in taken for each in ("--impl", name)]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--like", "wireguard-go"], ["--like", "mine=wireguard-go"]),
        (["--like", "mine=theirs", "--impl-manifest", "theirs.toml", "--pair", "mine~refwg"],
         ["--impl-manifest", "{folder}/theirs.toml", "--like", "mine=theirs"]),
    ],
)  # fmt: skip
def test_guest_receives_what_program_is_like(pytester: pytest.Pytester, words: list[str], given: list[str]) -> None:
    program = pytester.makefile("", mine="#!/bin/sh\n")
    program.chmod(0o755)
    pytester.makefile(".toml", theirs='name = "theirs"\nkind = "uapi"\n')
    config = pytester.parseconfig("--impl", f"mine={program}", *words)
    files, options = Guests(config, state_of_run(config)).programs()
    after = options[options.index("mine=/peers/mine/mine") - 1 :]
    expected = ["--impl", "mine=/peers/mine/mine", *(word.format(folder=pytester.path) for word in given)]
    assert after[: len(expected)] == expected
    manifests = [path.name for path, _ in files if path.suffix == ".toml"]
    assert manifests == (["theirs.toml"] if "--impl-manifest" in words else [])


def test_guest_receives_expectations_of_manifest(pytester: pytest.Pytester) -> None:
    known = pytester.makefile(".toml", known="")
    pytester.makefile(".toml", theirs='name = "theirs"\nkind = "uapi"\nexpectations = "known.toml"\n')
    config = pytester.parseconfig("--impl-manifest", "theirs.toml")
    files, _ = Guests(config, state_of_run(config)).programs()
    assert (known, str(known)) in files


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with a test for each lane, and guests that are processes."""
    monkeypatch.setenv(REFUSED, "unit tests need no sandbox")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin,pytest_timeout")
    pytester.makeconftest(NO_QEMU)
    pytester.makepyfile(
        test_core="def test_core(): pass",
        test_link="def test_link(lab): pass",
        test_minutes="import pytest\n@pytest.mark.waiting\ndef test_minutes(lab): pass",
    )
    return pytester


@pytest.mark.parametrize(
    ("options", "ran", "given"),
    [
        ("--lane=warp", "warp::test_minutes", {"warp": "test_minutes.py"}),
        ("--lane=netns --lane=vm -n 2", "netns::test_link vm::test_link", {"vm": "test_link.py"}),
        ("--lane=netns --on=vm:3", "netns::test_link vm::test_link", {"vm": "test_link.py"}),
        ("--lane=core --lane=vm", "core::test_core vm::test_link", {"vm": "test_link.py"}),
        ("--lane=core --lane=vm -n 2", "core::test_core vm::test_link", {"vm": "test_link.py"}),
        ("--lane=netns --lane=warp", "netns::test_link warp::test_minutes", {"warp": "test_minutes.py"}),
    ],
)
def test_every_test_runs_only_in_its_chosen_lanes(
    project: pytest.Pytester, options: str, ran: str, given: dict[str, str]
) -> None:
    run = project.runpytest_subprocess("--results=results.json", "--impl=kernel", *options.split())
    results = json.loads((project.path / "results.json").read_text())["results"]
    assert sorted(f"{each['lane']}::{each['id'].partition('::')[2]}" for each in results) == ran.split()
    # Several guests get the same files; each runs its shard of the tests.
    files = {path.stem: path.read_text().split() for path in project.path.glob("*.txt")}
    assert {lane: " ".join(dict.fromkeys(each)) for lane, each in files.items()} == given, run.stdout.str()


def reporting(pytester: pytest.Pytester) -> pytest.Config:
    """A configuration with the plugin's Reporter."""
    config = pytester.parseconfig("--results", "results.json")
    config.pluginmanager.register(Reporter(config, state_of_run(config)), REPORTER)
    return config


def test_guest_failure_sends_count_and_result_events(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    monkeypatch.setenv(EVENTS, str(writing))
    GuestReporter(reporting(pytester), Shard("vm", "6.12"), pytester.path, LeakCheck(1)).failed(
        HarnessError("no such kernel")
    )
    events = [json.loads(line) for line in os.read(reading, 1 << 16).splitlines()]
    assert [event.get("count") or event["id"] for event in events] == [1, "vm::guest[6.12]"]
    os.close(writing)
    os.close(reading)


@pytest.mark.parametrize(
    ("outcome", "status", "complaints"),
    [
        (None, pytest.ExitCode.NO_TESTS_COLLECTED, 0),
        (None, pytest.ExitCode.OK, 1),
        ("passed", pytest.ExitCode.OK, 0),
        ("skipped", pytest.ExitCode.OK, 0),
        ("failed", pytest.ExitCode.TESTS_FAILED, 0),
        ("passed", pytest.ExitCode.TESTS_FAILED, 1),
        ("skipped", pytest.ExitCode.TESTS_FAILED, 1),
        ("failed", pytest.ExitCode.OK, 1),
    ],
)
def test_guest_fails_when_reports_do_not_explain_its_exit_status(
    pytester: pytest.Pytester, outcome: Any, status: int, complaints: int
) -> None:
    config = reporting(pytester)
    reporter = GuestReporter(config, Shard("vm", "6.12"), pytester.path, LeakCheck(1))
    if outcome:
        report = pytest.TestReport("test_it.py::test_it", ("test_it.py", 0, "test_it"), {}, outcome, None, "call")
        data = config.hook.pytest_report_to_serializable(config=config, report=report)
        reporter.take({"event": "report", "data": data})
    (pytester.path / "results").mkdir()
    (pytester.path / "results" / "kernel.log").touch()
    result = boot.VmResult(
        ending=boot.Ending.EXITED, status=status, message="", kernel="6.12", accelerator="tcg",
        directory=pytester.path, durations={},
    )  # fmt: skip
    reporter.ended(result, [])
    ids = [result.id for result in state_of_run(config).results.by_id.values() if result.lane == "vm"]
    assert ids == complaints * ["vm::guest[6.12]"]


@pytest.mark.parametrize("tree", [True, False], ids=["build tree", "version"])
def test_results_note_which_option_names_guest_kernel(pytester: pytest.Pytester, *, tree: bool) -> None:
    if tree:
        pytester.mkdir("6.12")
    config = reporting(pytester)
    report = pytest.TestReport("test_it.py::test_it", ("test_it.py", 0, "test_it"), {}, "passed", None, "call")
    set_facts(report, {"lane": "vm", "kernel": "6.12.48-amd64"})
    data = config.hook.pytest_report_to_serializable(config=config, report=report)
    GuestReporter(config, Shard("vm", "6.12"), pytester.path, LeakCheck(1)).take({"event": "report", "data": data})
    expected = str(pytester.path / "6.12") if tree else "6.12"
    assert state_of_run(config).results.invocation.kernels == {"6.12.48-amd64": expected}


def test_unknown_kernel_is_usage_error(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "require_in_guest", lambda _: None)
    config = pytester.parseconfig("--lane=vm", "--kernel=./none")
    with pytest.raises(pytest.UsageError, match=r"kernel ./none: no such file"):
        Guests(config, state_of_run(config)).prepare()


@pytest.mark.parametrize(("shard", "chosen"), [("0/2", "02"), ("1/2", "1"), ("0/1", "012")])
def test_share_is_taken_from_tests_that_keyword_option_selects(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, shard: str, chosen: str
) -> None:
    monkeypatch.setenv(SHARD, shard)
    monkeypatch.setenv(REFUSED, "unit tests need no sandbox")
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
