"""Start Python programs by a fork server, which has imported their modules already.

Starting Python and importing takes most of the CPU time of a short test. `start` returns a process with the methods of
subprocess.Popen that this package uses. fork_server.py describes the messages.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from harness.errors import DeadlineExceeded, HarnessError
from harness.sandbox.fork_server import LARGEST, READY
from harness.sandbox.kept import keep_descriptor, keep_process
from harness.wait import readable, scaled

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from harness.sandbox.namespace import NamespaceThread

_PROGRAM: Final = Path(__file__).with_name("fork_server.py")
# Seconds: the imports of a server's start, on a machine with ten times more work than it can do; its end.
_ANSWER: Final = 15.0
_END: Final = 2.0


class ForkedProcess:
    """A process that a fork server has started. returncode: None until it has ended and was waited for."""

    def __init__(self, server: ForkServer, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server
        self._pidfd = pidfd

    def poll(self) -> int | None:
        """Return its exit status, negative for a signal; None while it runs."""
        if self.returncode is None and (self._pidfd < 0 or readable(self._pidfd)):
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Wait for its end, without a deadline, and return the exit status."""
        if self.returncode is None:
            if self._pidfd >= 0:
                readable(self._pidfd, None)
                os.close(self._pidfd)
                self._pidfd = -1
            # It raises if the server has ended; then nobody knows the status.
            self.returncode = self._server.reap(self.pid)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A process that has imported some modules, and forks itself for each start of a program that uses them."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        """Start it, and wait until it has imported the modules; HarnessError if it cannot."""
        self._name = f"fork server of {', '.join(modules)}"
        self._lock = threading.Lock()
        self._number = READY
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=env,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        try:
            with self._complaints():
                self._receive()
        except BaseException:
            self.close()
            raise
        keep_descriptor(self._socket.fileno(), self._name)
        keep_process(self._child.pid, self._name)

    @property
    def running(self) -> bool:
        """Whether it can start programs."""
        return self._child.poll() is None

    def start(
        self, thread: NamespaceThread, words: Sequence[str], *, env: Mapping[str, str], cwd: Path, output: int
    ) -> ForkedProcess:
        """Start `python -m WORDS` in the namespaces of a thread; output: descriptor of its stdout and stderr."""
        namespaces = thread.call(_open_namespaces)
        try:
            request: dict[str, object] = {"start": list(words), "env": dict(env), "cwd": str(cwd)}
            answer, descriptors = self._ask(request, [output, *namespaces])
        finally:
            for descriptor in namespaces:
                os.close(descriptor)
        return ForkedProcess(self, answer["pid"], descriptors[0])

    def reap(self, pid: int) -> int:
        """Return the exit status of a process that has ended."""
        answer, _ = self._ask({"reap": pid}, [])
        return int(answer["status"])

    def _ask(self, request: dict[str, object], descriptors: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        with self._lock, self._complaints():
            self._number += 1
            message = json.dumps(request | {"number": self._number}).encode()
            socket.send_fds(self._socket, [message], descriptors)
            return self._receive()

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        while True:
            data, received, _, _ = socket.recv_fds(self._socket, LARGEST, 1)
            answer = json.loads(data) if data else {"number": self._number, "error": "it has ended"}
            if answer["number"] != self._number:
                # The answer to a request that a time limit interrupted.
                for descriptor in received:
                    os.close(descriptor)
            elif "error" in answer:
                raise HarnessError(f"{self._name}: {answer['error']}")
            else:
                return answer, received

    @contextmanager
    def _complaints(self) -> Iterator[None]:
        """Set the time limit of one exchange, and let its errors name the server."""
        self._socket.settimeout(scaled(_ANSWER))
        try:
            yield
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self._name}: no answer in {scaled(_ANSWER):g} s") from error
        except ConnectionError as error:
            raise HarnessError(f"{self._name}: it has ended: {error.strerror}") from error

    def close(self) -> None:
        """End it. The processes that it has started run on."""
        self._socket.close()
        try:
            self._child.wait(_END)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


_servers: dict[object, ForkServer] = {}


def can_start(argv: Sequence[str], modules: Sequence[str]) -> bool:
    """Return whether a fork server with these modules can start the command: `python -m MODULE`, by our own Python."""
    return bool(modules) and list(argv[:2]) == [sys.executable, "-m"]


def start(
    thread: NamespaceThread,
    argv: Sequence[str],
    modules: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    output: int,
) -> ForkedProcess:
    """Start a command for which `can_start` is true, as subprocess.Popen would in the thread's namespaces.

    The server is started when it is first needed. Raises HarnessError if a module cannot be imported.
    """
    # Python reads these variables when it starts, so a server is good for one set of them.
    key = (tuple(modules), tuple(sorted(item for item in env.items() if item[0].startswith("PYTHON"))))
    server = _servers.get(key)
    if server is None or not server.running:
        server = _servers[key] = ForkServer(modules, env)
        atexit.register(server.close)
    return server.start(thread, argv[2:], env=env, cwd=cwd, output=output)


def _open_namespaces() -> list[int]:
    """Open the network and the mount namespace of the calling thread."""
    return [os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("net", "mnt")]
