"""Run programs in nodes: output is captured, deadlines hold, and commands are logged."""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import DeadlineExceeded, ProgramFailed, Unavailable, poll_until, wait

if TYPE_CHECKING:
    from harness import Lab, NetNS

HANGS = ["sh", "-c", "echo busy >&2; echo $$ > pid; exec tail -f /dev/null"]

# posix_spawn(3) sleeps uninterruptibly until its child runs a program; this child waits for a writer of the pipe.
IN_THE_KERNEL = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("now", flush=True)
os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)])
signal.pause()
"""


@pytest.fixture
def node(lab: Lab) -> NetNS:
    return lab.node("here")


def test_program_runs_in_node_and_its_output_is_captured(node: NetNS) -> None:
    assert node.run(["readlink", "/proc/self/ns/net"]).stdout == f"net:[{node.handle.stat().st_ino}]\n"
    completed = node.run(["sh", "-c", "cat; echo wrong >&2; exit 3"], stdin="right", check=False)
    assert (completed.status, completed.stdout, completed.stderr) == (3, "right", "wrong\n")


def test_output_larger_than_pipe_buffer_is_captured(node: NetNS) -> None:
    completed = node.run(["sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x; head -c 300000 /dev/zero >&2"])
    assert (len(completed.stdout), len(completed.stderr)) == (300000, 300000)


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["false"], ProgramFailed, "here: false: status 1: "),
        (["sh", "-c", "echo no >&2; exit 2"], ProgramFailed, "here: sh -c 'echo no >&2; exit 2': status 2: no"),
        (["sh", "-c", "kill -9 $$"], ProgramFailed, "here: sh -c 'kill -9 $$': status -9: "),
        (["/no-such"], Unavailable, "/no-such: No such file or directory; wg-interop doctor reports what is missing"),
        (["/etc/passwd"], Unavailable, "/etc/passwd: Permission denied; wg-interop doctor reports what is missing"),
        (["tail", "-f", "/dev/null"], DeadlineExceeded, "here: tail -f /dev/null: still ran after "),
    ],
)
def test_program_failure_is_reported_with_command_and_reason(
    node: NetNS, argv: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as failure:
        node.run(argv, deadline=0.5)
    assert str(failure.value).startswith(message)


def test_program_is_killed_at_its_deadline(node: NetNS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wait, "_scale", 2.0)
    with pytest.raises(DeadlineExceeded, match=r"still ran after 0\.5 s: busy"):
        node.run(HANGS, deadline=0.25)
    assert not Path("/proc", Path("pid").read_text().strip()).exists()


def test_overdue_call_is_reported_with_its_deadline(node: NetNS, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    with monkeypatch.context() as short:
        short.setattr(wait, "_scale", 0.01)
        try:
            with pytest.raises(DeadlineExceeded, match=r"^here: Event\.wait still runs after 0\.2 s$"):
                node.thread.call(release.wait)
        finally:
            release.set()


def test_background_program_is_read_and_terminated(node: NetNS, tmp_path: Path) -> None:
    process = node.spawn(["sh", "-c", "echo ready; exec tail -f /dev/null"], log=tmp_path / "log")
    process.says("^ready$")
    assert process.running
    assert process.terminate() == -15
    assert process.status == -15
    process.close()


def test_program_ignoring_sigterm_is_killed_and_reported(node: NetNS, tmp_path: Path) -> None:
    process = node.spawn(["sh", "-c", "trap '' TERM; echo deaf; exec tail -f /dev/null"], log=tmp_path / "log")
    process.says("deaf")
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.\d+ s for sh \(pid \d+\) to end; seen: it still runs; deaf"):
        process.terminate(0.1)
    assert process.status == -9
    process.close()


def test_program_in_uninterruptible_sleep_gets_more_time(node: NetNS, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    process = node.spawn([sys.executable, "-c", IN_THE_KERNEL, str(pipe)], log=tmp_path / "log")
    # Before this line, it may sleep while its own code is read from disk.
    process.says("now")
    status = Path(f"/proc/{process.pid}/status")
    assert poll_until(lambda: "State:\tD" in status.read_text(), bool, 20), process.tail()
    release = threading.Timer(0.5, pipe.write_bytes, [b""])
    release.start()
    assert process.terminate(0.05) == 0
    release.join()
    process.close()


def test_thread_states_are_empty_when_program_ends_during_read(
    node: NetNS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = node.spawn(["tail", "-f", "/dev/null"], log=tmp_path / "log")

    def read_late(path: Path) -> str:
        with path.open() as file:
            process.kill()
            return file.read()

    with monkeypatch.context() as late:
        late.setattr(Path, "read_text", read_late)
        assert process.thread_states() == ""
    process.close()


def test_missing_line_is_reported_with_output_so_far(node: NetNS, tmp_path: Path) -> None:
    process = node.spawn(["sh", "-c", "echo starting; exec tail -f /dev/null"], log=tmp_path / "log")
    process.says("starting")
    with pytest.raises(DeadlineExceeded, match="for sh to write 'ready'; seen: starting"):
        process.says("ready", deadline=0.05)
    process.kill()
    process.close()


def test_every_command_is_logged_with_time_and_node(lab: Lab, node: NetNS, tmp_path: Path) -> None:
    node.run(["echo", "two words"])
    node.run(["false"], check=False)
    process = node.spawn(["true"], log=tmp_path / "log")
    process.wait(5)
    process.close()
    lab.save_steps()
    noted = (lab.directory / "commands.txt").read_text().splitlines()
    lines = [line for line in noted if re.search("  (echo|false|true)", line)]
    # On a busy machine a command takes long enough for its duration to be noted.
    assert [re.sub(r"\d+", "N", re.sub(r"(   #|,) \d+\.\d+ s$", "", line)) for line in lines] == [
        "N:N:N.N  +N.N  here  echo 'two words'",
        "N:N:N.N  +N.N  here  false   # status N",
        "N:N:N.N  +N.N  here  true >> log N>&N &   # pid N",
    ]


def test_program_runs_in_english_locale(node: NetNS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert "LC_ALL=C.UTF-8" in node.run(["env"]).stdout.splitlines()
    assert os.environ["LC_ALL"] == "de_DE.UTF-8"
