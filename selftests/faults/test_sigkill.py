"""Kill processes of a run at any moment: nothing is left, and the machine is unchanged."""

from __future__ import annotations

import os
import signal
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from harness.wait import let_pass
from selftests.support import host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Started = tuple[host.Run, Path]

PAIR = "wireguard-go-debian~wireguard-go-debian"
# Seconds after the start: while the interpreter starts, while the sandbox is made, and while tunnels carry traffic.
MOMENTS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.1, 1.3, 1.6, 2.0)
# Seconds after the start of the first worker: during its imports, the collection and its tests.
WORKER_MOMENTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.1, 1.4)
WHOLE_RUN = 60.0


@pytest.fixture(params=["root", "ordinary user"])
def home(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A home directory for the user of the run."""
    ordinary = request.param == "ordinary user"
    if not ordinary and os.geteuid() != 0:
        pytest.skip("only root can run it as root")
    with host.home(ordinary=ordinary) as path:
        if ordinary and os.geteuid() == 0:
            os.mknod(path / "tun", stat.S_IFCHR | 0o666, os.makedev(10, 200))
            (path / "tun").chmod(0o666)
        yield path


def start(home: Path, *arguments: str) -> host.Run:
    """Start the handshake tests as the owner of the home directory."""
    wanted = (
        "selftests/netns/test_ping_and_counters.py",
        "--pair",
        PAIR,
        "--results",
        str(home / "report/results.json"),
    )
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home)}
    if (home / "tun").exists():
        command = host.pytest_command(*wanted, *arguments, python="/mnt/.venv/bin/python")
        return host.Run(host.as_ordinary_user(command, home / "tun"), env=env, output=home / "output")
    return host.Run(host.pytest_command(*wanted, *arguments), env=env, output=home / "output")


@pytest.fixture
def untouched() -> Iterator[None]:
    """The machine's network state and mounts are the same before and after."""
    before = host.network_state()
    yield
    assert host.network_state() == before


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def check_nothing_left(run: host.Run, namespaces: set[str]) -> None:
    left = run.wait_until_gone(namespaces)
    assert not left, f"still there: {left}"


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", ["launcher", "init", "controller"])
def test_killed_run_leaves_nothing(home: Path, victim: str, moment: float) -> None:
    run = start(home)
    try:
        let_pass(moment, "the moment of the kill is the parameter of this test")
        namespaces = host.namespaces_of(run.pids())
        chain = run.chain()
        kill(chain[min(["launcher", "init", "controller"].index(victim), len(chain) - 1)])
        check_nothing_left(run, namespaces)
    finally:
        run.close()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("moment", WORKER_MOMENTS)
def test_killed_worker_leaves_nothing_and_run_finishes(home: Path, moment: float) -> None:
    run = start(home, "-n", "2")
    try:
        worker = run.first_worker()
        let_pass(moment, "the moment of the kill is the parameter of this test")
        namespaces = host.namespaces_of(run.pids())
        kill(worker)
        run.process.wait(WHOLE_RUN)
        check_nothing_left(run, namespaces)
    finally:
        run.close()


@pytest.mark.usefixtures("untouched")
def test_whole_run_leaves_nothing(home: Path) -> None:
    run = start(home, "-n", "2")
    try:
        assert run.process.wait(WHOLE_RUN) == 0, run.output.read_text()
        check_nothing_left(run, set())
    finally:
        run.close()
