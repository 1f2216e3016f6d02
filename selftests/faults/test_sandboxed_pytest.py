"""Check that pytest in the sandbox behaves like pytest: exit status, -s, --pdb, Ctrl-C."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from harness.sandbox.launch import LAUNCHER
from harness.sandbox.launcher import COULD_NOT_TEST
from selftests.support import host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSES = "def test_it(lab): lab.node('n1')\n"
FAILS = "def test_it(lab): assert lab.node('n1') is None\n"
HANGS = """
import signal
def test_it(lab):
    try:
        print("started", flush=True)
        signal.pause()
    finally:
        print("undone", flush=True)
"""


def pytest_env() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("WG_INTEROP", "PYTEST", "COLUMNS"))}


def run_pytest(directory: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "test_it.py").write_text(source)
    command = host.pytest_command(*arguments)
    return subprocess.run(
        command, cwd=directory, env=pytest_env(), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("source", "arguments", "status"),
    [
        pytest.param(PASSES, ("-n", "1"), 0, id="passed-xdist"),
        pytest.param(FAILS, ("-n", "1"), 1, id="failed-xdist"),
        pytest.param(PASSES, (), 0, id="passed"),
        pytest.param(FAILS, (), 1, id="failed"),
        pytest.param(PASSES, ("--impl", "nonsense"), 4, id="usage"),
        pytest.param(PASSES, ("-k", "nothing"), 5, id="nothing-collected"),
        pytest.param("import nonsense\n", ("--lane", "netns"), 2, id="collection-error"),
    ],
)
def test_exit_status_is_that_of_pytest(tmp_path: Path, source: str, arguments: tuple[str, ...], status: int) -> None:
    completed = run_pytest(tmp_path, source, *arguments)
    assert completed.returncode == status, completed.stdout + completed.stderr


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_invalid_marker_is_reported_as_usage_error(tmp_path: Path, workers: tuple[str, ...]) -> None:
    marked = "import pytest\n@pytest.mark.requirement('A', 'B', 'C', 'D')\n"
    completed = run_pytest(tmp_path, marked + PASSES, *workers)
    error = "ERROR: test_it.py::test_it: a test cites at most 3 requirements, not A, B, C, D"
    assert (completed.returncode, error in completed.stderr) == (4, True), completed.stdout + completed.stderr
    assert "INTERNALERROR" not in completed.stdout


def test_run_reports_its_own_sandbox(tmp_path: Path) -> None:
    assert "wg-interop: sandbox of its own" in run_pytest(tmp_path, PASSES).stdout


@pytest.mark.parametrize("source", ["def test_it(): pass\n", "def test_it(tmp_path): pass\n"])
def test_run_without_lab_has_no_sandbox_and_no_report(tmp_path: Path, source: str) -> None:
    completed = run_pytest(tmp_path, source)
    assert completed.returncode == 0
    assert "wg-interop:" not in completed.stdout
    assert not (tmp_path / "report").exists()


def test_option_s_shows_output_of_test(tmp_path: Path) -> None:
    completed = run_pytest(tmp_path, "def test_it(lab): print('seen', 'plainly')\n", "-s")
    assert "seen plainly" in completed.stdout


def test_program_below_tmp_is_found_in_sandbox(tmp_path: Path) -> None:
    program = tmp_path / "build" / "wg"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nexec wireguard-go "$@"\n')
    program.chmod(0o755)
    source = "from harness import traffic\ndef test_it(loopback): assert loopback.a.wg('show').stdout\n"
    completed = run_pytest(tmp_path, source, "--impl", f"x={program}")
    assert completed.returncode == 0, completed.stdout


class Terminal:
    """Run pytest as the foreground process group of a new terminal."""

    def __init__(self, directory: Path, source: str, *arguments: str) -> None:
        (directory / "test_it.py").write_text(source)
        self.output = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(directory)
            command = host.pytest_command(*arguments)
            os.execve(sys.executable, command, pytest_env())  # noqa: S606 - the child of a pty

    def wait_for(self, text: str, deadline: float = 30.0) -> None:
        """Read until the text has been written."""
        end = time.monotonic() + deadline
        while text not in self.output:
            assert select.select([self._terminal], [], [], max(0, end - time.monotonic()))[0], self.output
            self.output += self._read()

    def _read(self) -> str:
        try:
            data = os.read(self._terminal, 4096)
        except OSError:
            data = b""
        assert data, f"the terminal was closed: {self.output}"
        return data.decode(errors="replace")

    def write(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def end(self) -> int:
        """Read to the end and return the exit status."""
        try:
            self.wait_for("\0never")
        except AssertionError:
            _, status = os.waitpid(self.pid, 0)
            return os.waitstatus_to_exitcode(status)
        raise AssertionError("it wrote a zero byte")

    def close(self) -> None:
        os.close(self._terminal)


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path, HANGS, "-s")
    terminal.wait_for("started")
    yield terminal
    terminal.close()


def test_ctrl_c_interrupts_run_with_cleanup(hanging: Terminal) -> None:
    hanging.write("\x03")
    assert hanging.end() == pytest.ExitCode.INTERRUPTED
    assert hanging.output.count("undone") == 1
    assert "KeyboardInterrupt" in hanging.output


def test_ctrl_c_twice_ends_run_with_failure(hanging: Terminal) -> None:
    hanging.write("\x03")
    hanging.write("\x03")
    assert hanging.end() != 0


def test_sigint_to_launcher_reaches_pytest_once(hanging: Terminal) -> None:
    os.kill(hanging.pid, signal.SIGINT)
    assert hanging.end() == pytest.ExitCode.INTERRUPTED
    assert hanging.output.count("undone") == 1


def test_sigterm_to_launcher_ends_run_by_same_signal(hanging: Terminal) -> None:
    os.kill(hanging.pid, signal.SIGTERM)
    assert hanging.end() == -signal.SIGTERM


def test_pdb_keeps_lab_up_and_reads_from_terminal(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, FAILS, "--pdb")
    terminal.wait_for("(Pdb)")
    terminal.write("import harness.net.netns; print('nodes', harness.net.netns.leftover_nodes())\n")
    terminal.wait_for("nodes ['n1']")
    terminal.write("q\n")
    assert terminal.end() == pytest.ExitCode.INTERRUPTED
    terminal.close()


@pytest.mark.parametrize(
    ("command", "status"),
    [
        pytest.param(["sh", "-c", "exit 7"], 7, id="status"),
        pytest.param(["sh", "-c", "kill -KILL $$"], -9, id="SIGKILL"),
        pytest.param(["sh", "-c", "kill -SEGV $$"], -11, id="SIGSEGV"),
        pytest.param(["no-such-program"], 127, id="no-such-program"),
    ],
)
def test_launcher_exits_with_status_of_its_command(command: list[str], status: int) -> None:
    launcher = [sys.executable, "-ISE", str(LAUNCHER), "--", *command]
    assert subprocess.run(launcher, check=False, capture_output=True).returncode == status


def test_launcher_reports_reason_when_sandbox_fails() -> None:
    # At the limit of a user namespace, not even root may make another network namespace.
    forbid = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    launcher = [sys.executable, "-ISE", str(LAUNCHER), "--", "true"]
    outer = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh", *launcher]
    completed = subprocess.run(outer, check=False, capture_output=True, text=True)
    assert completed.returncode == COULD_NOT_TEST
    assert "max_net_namespaces" in completed.stderr
