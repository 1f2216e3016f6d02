"""Run programs under a deadline: `run` waits for one, `Process` keeps one running.

Both start the program from a NamespaceThread, so it runs in that thread's namespaces, without `ip netns exec`.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import steps
from harness.errors import DeadlineExceeded, ProgramFailed, Unavailable
from harness.sandbox import forked, logs
from harness.wait import Exit, FileSays, poll_until, scaled, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from harness.sandbox.namespace import NamespaceThread

_TERMINATION: Final = 2.0
_KERNEL: Final = 10.0
_STOPS: Final = 2.0
_COMMAND_SHOWN: Final = 150  # characters of a command in a repr


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The result of a program: exit status (negative: the signal that killed it), stdout and stderr."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str

    def __repr__(self) -> str:
        """Leave out the output: an assertion about it prints it anyway."""
        return f"Completed({shlex.join(self.argv)[:_COMMAND_SHOWN]}: status {self.status})"


def program_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our environment with English messages, a PATH that includes `ip` and `nft`, and these changes."""
    # On Debian, sbin is not on the PATH of ordinary users, who are root in the sandbox.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return os.environ | {"LC_ALL": "C.UTF-8", "PATH": path} | dict(changes or {})


def run(
    thread: NamespaceThread,
    argv: Sequence[str],
    *,
    deadline: float = 10.0,
    stdin: str = "",
    check: bool = True,
    env: Mapping[str, str] | None = None,
) -> Completed:
    """Run a program in the thread's namespaces and wait for its end.

    deadline: seconds, scaled. Raises Unavailable if there is no such program, DeadlineExceeded if it misses the
    deadline and was killed, and with `check` ProgramFailed for a status other than 0.
    """
    with (
        steps.step(thread.name, lambda: _command(argv, env, stdin)) as running,
        _start(thread, argv, env=env, output=subprocess.PIPE) as child,
    ):
        try:
            stdout, stderr = child.communicate(stdin, scaled(deadline))
        except subprocess.TimeoutExpired as error:
            child.kill()
            stdout, stderr = child.communicate()
            raise DeadlineExceeded(
                f"{thread.name}: {shlex.join(argv)}: still ran after {scaled(deadline):g} s: {stderr}"
            ) from error
        except BaseException:
            child.kill()
            child.wait()
            raise
        if check and child.returncode != 0:
            output = stderr.strip() or stdout.strip()
            raise ProgramFailed(f"{thread.name}: {shlex.join(argv)}: status {child.returncode}: {output}")
        running.outcome = f"status {child.returncode}" if child.returncode else ""
    return Completed(argv=tuple(argv), status=child.returncode, stdout=stdout, stderr=stderr)


def _command(argv: Sequence[str], env: Mapping[str, str] | None = None, stdin: str = "") -> str:
    """Format a command for a shell: environment variables first, stdin as a here-document."""
    words = [f"{name}={shlex.quote(value)}" for name, value in (env or {}).items()]
    text = " ".join([*words, shlex.join(argv)])
    return f"{text} <<'EOF'\n{stdin.rstrip()}\nEOF" if stdin else text


def _start(
    thread: NamespaceThread,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None,
    output: int,
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    piped = output == subprocess.PIPE
    try:
        return thread.call(
            subprocess.Popen,
            list(argv),
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE if piped else subprocess.STDOUT,
            env=program_environment(env),
            cwd=cwd,
            text=True,
            # Without Ctrl-C from the terminal: pytest gets it, and ends the programs in order.
            process_group=0,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise Unavailable(f"{argv[0]}: {error.strerror}; wg-interop doctor reports what is missing") from error


def _ending(status: int) -> str:
    """Describe an exit status."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


class Process:
    """A program in the background; its output is appended to `log`. The lab ends it by `terminate`."""

    def __init__(
        self,
        thread: NamespaceThread,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        """Start the program. preload: modules; if it is a Python program, a fork server that has them starts it."""
        self.argv = tuple(argv)
        self.log = log
        self._place = thread.name
        with steps.step(thread.name, lambda: f"{_command(argv, env)} >> {log.name} 2>&1 &") as starting:
            with log.open("ab") as output:
                self._growth = logs.watch(log)
                self._child = self._start(thread, env, output.fileno(), cwd, preload)
            self.pid = self._child.pid
            starting.outcome = f"pid {self.pid}"
        self.exited = Exit(self.pid, self.tail)

    def _start(
        self,
        thread: NamespaceThread,
        env: Mapping[str, str] | None,
        output: int,
        cwd: Path | None,
        preload: Sequence[str],
    ) -> subprocess.Popen[str] | forked.ForkedProcess:
        if forked.can_start(self.argv, preload):
            everything = program_environment(env)
            return forked.start(thread, self.argv, preload, env=everything, cwd=cwd or Path.cwd(), output=output)
        return _start(thread, self.argv, env=env, output=output, cwd=cwd)

    def tail(self, lines: int = 12) -> str:
        """Return the last lines of its output."""
        return "\n".join(logs.last_lines(self.log, lines))

    def says(self, pattern: str, deadline: float = 5.0) -> None:
        """Wait until a line of its output matches a regular expression; deadline: seconds, scaled."""
        event = FileSays(self.log, pattern)
        try:
            wait_for(event, deadline, f"{self.argv[0]} to write {pattern!r}")
            # What the caller does now comes after this line, also by the stamps in the evidence.
            if self._growth is not None:
                self._growth.look()
        finally:
            event.close()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._child.poll() is None

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._child.poll()

    def cpu_seconds(self) -> float:
        """Return its CPU time so far, in user and kernel mode (proc(5), /proc/PID/stat)."""
        # The second field is the name in parentheses, which may contain blanks and parentheses.
        fields = Path("/proc", str(self.pid), "stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def wait(self, deadline: float) -> int:
        """Wait for its end and return the exit status; deadline: seconds, scaled."""
        if self._child.returncode is None:
            wait_for(self.exited, deadline, f"{self.argv[0]} (pid {self.pid}) to end")
        return self._child.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        steps.record(self._place, f"kill -{number.name.removeprefix('SIG')} {self.pid}")
        self._child.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL and reap it."""
        with steps.step(self._place, f"kill -KILL {self.pid}") as killing:
            self._child.kill()
            killing.outcome = _ending(self._child.wait())

    def terminate(self, deadline: float = _TERMINATION) -> int:
        """Send SIGTERM and wait for the exit status; after the deadline kill it and raise DeadlineExceeded.

        A program in uninterruptible sleep gets more time: the kernel has one lock for the interfaces of all namespaces
        (RTNL), and others may hold it. deadline: seconds, scaled.
        """
        with steps.step(self._place, f"kill -TERM {self.pid}") as ending:
            if self._child.poll() is None:
                self._child.terminate()
            status = self._wait_or_kill(deadline)
            ending.outcome = _ending(status)
        return status

    def _wait_or_kill(self, deadline: float) -> int:
        try:
            return self.wait(deadline)
        except DeadlineExceeded:
            if "D" in self.thread_states():
                with suppress(DeadlineExceeded):
                    return self.wait(_KERNEL)
            self.kill()
            raise

    def thread_states(self) -> str:
        """Return one letter per thread: R running, S sleeping, D uninterruptible (proc(5)); "" if it has ended."""
        return _thread_states(self.pid)

    def close(self) -> None:
        """Close the pidfd of the event `exited`."""
        self.exited.close()


@contextmanager
def stopped(pid: int | None) -> Iterator[None]:
    """Stop a process during the block, so that it finds all at once what comes in the meantime.

    The block begins when all its threads have stopped: a running one may otherwise go on for a moment after SIGSTOP.
    pid: None for the driver, which has no process.
    """
    if pid is None:
        yield
        return
    os.kill(pid, signal.SIGSTOP)
    try:
        poll_until(lambda: _thread_states(pid), lambda states: set(states) <= {"T"}, _STOPS)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _thread_states(pid: int) -> str:
    states = ""
    with suppress(FileNotFoundError):
        for task in Path("/proc", str(pid), "task").iterdir():
            # The file of a thread that ends now disappears, or cannot be read.
            with suppress(FileNotFoundError, ProcessLookupError):
                states += (task / "stat").read_text().rpartition(")")[2].split()[0]
    return states
