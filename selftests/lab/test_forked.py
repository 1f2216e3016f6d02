"""Start Python programs by a fork server: they cannot see the difference, and their end is reported."""

from __future__ import annotations

import os
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import DeadlineExceeded, HarnessError, Registry
from harness.plugin import smoke
from harness.sandbox import forked
from harness.sandbox.process import Process
from harness.wait import Exit, wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness import Interface, Lab, NetNS

FD_SETSIZE = 1024  # descriptors that select(2) takes
# What a program finds when it starts: all that differs between two programs that are started in the same way is left
# out. The first lines are the work of a module whose import is slow.
PROGRAM = """\
import os
imported_by = os.getpid()

def facts():
    import json, signal, sys
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    # The last one is that of the listing itself.
    *descriptors, _ = sorted(map(int, os.listdir("/proc/self/fd")))
    return {
        "descriptors": {number: os.readlink(f"/proc/self/fd/{number}") for number in descriptors},
        "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in sorted(os.listdir("/proc/self/ns"))},
        "signals": [status[name] for name in ("SigBlk", "SigIgn", "SigCgt")],
        "rights": [status[name] for name in ("Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "Umask")],
        "session": [os.getsid(0), os.getpgid(0) - os.getpid()],
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "arguments": [sys.argv, __name__, sys.executable],
        "encodings": [sys.stdout.encoding, sys.stderr.encoding, sys.stdout.line_buffering],
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
    }
"""
MAIN = """\
import json, os, signal, sys
from .work import facts, imported_by

def main():
    print(json.dumps(facts(), sort_keys=True), flush=True)
    if sys.argv[1:] == ["imported"]:
        print(imported_by - os.getpid(), flush=True)
    elif sys.argv[1:] == ["fail"]:
        raise LookupError("nothing there")
    elif sys.argv[1:] == ["exit"]:
        sys.exit(7)
    print("ready", flush=True)
    signal.pause()

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def node(lab: Lab) -> NetNS:
    return lab.node("here")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that can be run; its name differs in every test, so each has its own fork server."""
    folder = tmp_path / "packages" / "work_of_test"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "work.py").write_text(PROGRAM)
    (folder / "__main__.py").write_text(MAIN)
    monkeypatch.setenv("PYTHONPATH", f"{folder.parent}:{os.environ.get('PYTHONPATH', '')}")
    return folder.name


def start(node: NetNS, log: Path, package: str, *arguments: str, preload: Sequence[str] = ()) -> Process:
    argv = [sys.executable, "-m", package, *arguments]
    return Process(node.thread, argv, log=log, env={"COLOUR": "blue"}, cwd=log.parent, preload=preload)


def modules(package: str) -> list[str]:
    return [f"{package}.__main__"]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_forked_program_starts_with_same_state_as_executed_one(node: NetNS, tmp_path: Path, package: str) -> None:
    facts = []
    for preload in ((), modules(package)):
        (log := tmp_path / "log").unlink(missing_ok=True)
        process = start(node, log, package, "word", preload=preload)
        process.says("^ready$")
        assert (parent_of(process.pid) == os.getpid()) == (not preload)
        # Its last newline may be written a moment later.
        facts.append(log.read_text().splitlines())
        process.kill()
        process.close()
    assert facts[0] == facts[1]


def test_module_is_imported_once_for_all_starts(node: NetNS, tmp_path: Path, package: str) -> None:
    importers = set()
    for number in range(3):
        process = start(node, tmp_path / f"log{number}", package, "imported", preload=modules(package))
        process.says("^ready$")
        importers.add(process.pid + int(process.tail(2).splitlines()[0]))
        assert importers == {parent_of(process.pid)}
        process.kill()
        process.close()


@pytest.mark.parametrize(("how", "status"), [("exit", 7), ("fail", 1)])
def test_exit_status_of_forked_program_is_its_own(
    node: NetNS, tmp_path: Path, package: str, how: str, status: int
) -> None:
    process = start(node, tmp_path / "log", package, how, preload=modules(package))
    assert process.wait(10) == status
    assert (process.status, process.running) == (status, False)
    output = process.log.read_text()
    # The health check finds a crash by this line.
    assert ("\nTraceback (most recent call last):\n" in output) == (how == "fail")
    assert output.endswith("LookupError: nothing there\n") == (how == "fail")
    process.close()


def test_forked_program_is_stopped_by_signals(node: NetNS, tmp_path: Path, package: str) -> None:
    ends = []
    for end in (Process.terminate, Process.kill):
        process = start(node, tmp_path / "log", package, preload=modules(package))
        process.says("^ready$")
        assert process.running
        end(process)
        # It ended, and nobody has to wait for it any more.
        assert not Path(f"/proc/{process.pid}").exists()
        ends.append(process.status)
        process.signal(signal.SIGTERM)
        process.close()
    assert ends == [-signal.SIGTERM, -signal.SIGKILL]


def test_forked_program_is_waited_for_by_high_descriptors(node: NetNS, tmp_path: Path, package: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    many = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(FD_SETSIZE)]
    try:
        process = start(node, tmp_path / "log", package, preload=modules(package))
        process.says("^ready$")
        assert process.running
        process.terminate()
        assert process.status == -signal.SIGTERM
        process.close()
    finally:
        for descriptor in many:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ended_forked_program_keeps_its_pid_until_waited_for(node: NetNS, tmp_path: Path, package: str) -> None:
    process = start(node, tmp_path / "log", package, "exit", preload=modules(package))
    wait_for(process.exited, 10, "the program to end")
    assert Path(f"/proc/{process.pid}").exists()
    assert process.status == 7
    assert not Path(f"/proc/{process.pid}").exists()
    process.close()


def test_late_answer_of_fork_server_is_not_taken_for_next_one(
    node: NetNS, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as hasty:
        hasty.setattr(forked, "_ANSWER", 1e-6)
        with pytest.raises(DeadlineExceeded, match=r"^fork server of work_of_test\.__main__: no answer in 1e-06 s$"):
            start(node, tmp_path / "late", package, "exit", preload=modules(package))
    process = start(node, tmp_path / "log", package, preload=modules(package))
    process.says("^ready$")
    assert process.terminate() == -signal.SIGTERM
    process.close()


def test_fork_server_serves_several_threads(node: NetNS, tmp_path: Path, package: str) -> None:
    def run(number: int) -> int:
        process = start(node, tmp_path / f"log{number}", package, "exit", preload=modules(package))
        try:
            return process.wait(20)
        finally:
            process.close()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(run, range(24))) == {7}


def test_fork_server_that_died_is_replaced(node: NetNS, tmp_path: Path, package: str) -> None:
    first = start(node, tmp_path / "first", package, "exit", preload=modules(package))
    assert first.wait(10) == 7
    orphan = start(node, tmp_path / "orphan", package, preload=modules(package))
    server = parent_of(orphan.pid)
    ended = Exit(server)
    os.kill(server, signal.SIGKILL)
    wait_for(ended, 10, "the fork server to end")
    ended.close()
    with pytest.raises(HarnessError, match=r"^fork server of work_of_test\.__main__: "):
        orphan.terminate()
    second = start(node, tmp_path / "second", package, "exit", preload=modules(package))
    assert second.wait(10) == 7
    for process in (first, orphan, second):
        process.close()


def test_module_that_cannot_be_imported_is_named(node: NetNS, tmp_path: Path, package: str) -> None:
    with pytest.raises(HarnessError) as failure:
        start(node, tmp_path / "log", package, preload=["no.such"])
    assert str(failure.value) == "fork server of no.such: ModuleNotFoundError: No module named 'no'"


def test_refwg_is_forked_except_in_smoke_test(lab: Lab) -> None:
    parents = []

    def note(made: Interface) -> None:
        assert made.pid is not None
        parents.append(parent_of(made.pid) == os.getpid())

    lab.started = note
    refwg = Registry().get("refwg")
    assert smoke._failure(lab, refwg) == ""  # noqa: SLF001 - what a run calls
    lab.interface("wg0", refwg, lab.node("here"))
    assert parents == [True, False]
