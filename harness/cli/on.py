"""Connect to the hosts of `wg-interop run --on ssh:HOST`, and install the lab there.

ssh is started here, outside the sandbox, which has no route to the outside. At the other end harness/cli/bootstrap.py
installs the wheel of this run, once for each version, and becomes harness/cli/hosted.py. pytest in the sandbox inherits
the connection and uses it (harness/plugin/hosts.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.cli.wheel import make_wheel
from harness.errors import Unavailable
from harness.lanes import HOSTS, SSH, read_places
from harness.plugin.remote import EventParser, received

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from harness.cli.wheel import Wheel

# Environment variable: the command to use instead of `ssh`, with its options.
COMMAND: Final = "WG_SSH"
# Nobody can answer a question of ssh, and a host that has lost its power must be noticed: after 15 s.
_OPTIONS: Final = (
    "-T", "-oBatchMode=yes", "-oConnectTimeout=15", "-oServerAliveInterval=5", "-oServerAliveCountMax=3",
)  # fmt: skip
# The lowest descriptor of a connection, as for events (harness/cli/run.py).
_DESCRIPTORS_FROM: Final = 220
_QUIET: Final = 3.0  # seconds before the preparation is shown
_PATIENCE: Final = 20.0  # seconds for hosts to stop their tests; hosted.py has 15
# Started by the host's shell, whatever that is: find a Python that is new enough, and run the bootstrap in it.
_START: Final = """
for python in python3 python3.14 python3.13 python3.12 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exec "$python" -c {code}
done
printf '\\036{{"event": "unfit", "reason": "Python 3.11 or newer is needed, and python3 there is %s"}}\\n' \
    "$(python3 -c 'import platform; print(platform.python_version())' 2>/dev/null || echo missing)"
"""


class Host:
    """A host: its ssh, and this end of the connection.

    name: `ssh:HOST`. step: what it does now, for the user. scratch: its directory there, when `prepare` has ended.
    """

    def __init__(self, host: str, log: Path) -> None:
        """Start ssh. log: the file for what it prints."""
        self.name = f"{SSH}:{host}"
        self.step = "connecting"
        self.scratch = ""
        self.log = log
        self._socket, far = socket.socketpair()
        code = Path(__file__).with_name("bootstrap.py").read_text()
        start = shlex.join(["sh", "-c", _START.format(code=shlex.quote(code))])
        command = [*shlex.split(os.environ.get(COMMAND, "ssh")), *_OPTIONS, "--", host, start]
        try:
            with far, log.open("wb") as output:
                # In its own session ssh gets no SIGINT at Ctrl-C: the host first stops its tests.
                self._ssh = subprocess.Popen(
                    command, stdin=far.fileno(), stdout=far.fileno(), stderr=output, start_new_session=True
                )
        except OSError as error:
            raise Unavailable(f"{self.name}: cannot start {command[0]}: {error.strerror}") from error

    def prepare(self, wheel: Wheel) -> None:
        """Install the wheel there unless it is, and start what runs tests; raises Unavailable, with the remedy."""
        order = {"hash": wheel.digest[:16], "sha256": wheel.digest, "name": wheel.path.name, "size": len(wheel.data)}
        self._send(json.dumps(order).encode() + b"\n")
        for event in self._events():
            match event.get("event"):
                case "send":
                    self.step = "copying the wheel"
                    self._send(wheel.data)
                case "doing":
                    self.step = str(event["text"])
                case "unfit":
                    raise Unavailable(f"{self.name}: {event['reason']}")
                case "ready":
                    self.scratch = str(event["scratch"])
                    self.step = f"ready, Python {event['python']}"
                    return

    def _send(self, data: bytes) -> None:
        with suppress(OSError):
            # If the connection has ended, `_events` reports it.
            self._socket.sendall(data)

    def _events(self) -> Iterator[dict[str, object]]:
        parser = EventParser()
        yield from received(self._socket, parser)
        raise Unavailable(self._why_ended(parser.text))

    def _why_ended(self, text: list[str]) -> str:
        """Explain that the connection ended while the host was being prepared."""
        status = self._ssh.wait()
        printed = [*text, *self.log.read_text(errors="replace").split("\n")]
        reason = " / ".join([line.strip() for line in printed if line.strip()][-3:]) or f"status {status}"
        host = self.name.partition(":")[2]
        if self.step == "connecting":
            return f"{self.name}: cannot connect: {reason}; this must work without a question: ssh {host} true"
        return f"{self.name}: ended while {self.step}: {reason}"

    def hand_over(self) -> int:
        """Return a descriptor of this end for another process."""
        return fcntl.fcntl(self._socket, fcntl.F_DUPFD_CLOEXEC, _DESCRIPTORS_FROM)

    def let_go(self) -> None:
        """Close this process's own descriptor, so that the connection ends with the process that has the other."""
        self._socket.close()

    def abandon(self) -> None:
        """End the connection at once, whoever uses it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self, deadline: float) -> None:
        """Wait until the host has stopped, at most until the deadline, by time.monotonic."""
        self._socket.close()
        try:
            self._ssh.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()


class Team:
    """The hosts of a run, ready to be used by pytest. descriptors: for it to inherit."""

    def __init__(self, hosts: Iterable[Host]) -> None:
        self._hosts = list(hosts)
        self.descriptors = [host.hand_over() for host in self._hosts]

    @property
    def environment(self) -> dict[str, str]:
        """The variable by which pytest finds the connections."""
        if not self._hosts:
            return {}
        pairs = zip(self._hosts, self.descriptors, strict=True)
        found = [{"name": h.name, "descriptor": d, "scratch": h.scratch, "log": str(h.log)} for h, d in pairs]
        return {HOSTS: json.dumps(found)}

    def handed_over(self) -> None:
        """Close what pytest has inherited."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []
        for host in self._hosts:
            host.let_go()


@contextmanager
def connected(words: Iterable[str], show: Callable[[str], object]) -> Iterator[Team]:
    """Connect to the hosts among the values of `--on`; at the end wait until they have stopped.

    show: called with a line for the user. Raises HarnessError if a host cannot be used, or for a wrong value.
    """
    names = read_places(words).hosts
    if not names:
        yield Team(())
        return
    hosts: list[Host] = []
    with tempfile.TemporaryDirectory(prefix="wg-interop-") as folder:
        try:
            # ssh connects while the wheel is being made.
            hosts += [Host(name, Path(folder, f"ssh-{number}.log")) for number, name in enumerate(names)]
            wheel = make_wheel(Path(folder))
            _prepare(hosts, wheel, show)
            team = Team(hosts)
            try:
                yield team
            finally:
                team.handed_over()
        finally:
            deadline = time.monotonic() + _PATIENCE
            for host in hosts:
                host.end(deadline)


def _prepare(hosts: list[Host], wheel: Wheel, show: Callable[[str], object]) -> None:
    """Prepare all hosts at the same time; shows their steps if that takes longer than a moment."""
    with ThreadPoolExecutor(len(hosts), thread_name_prefix="ssh") as threads:
        futures = [threads.submit(host.prepare, wheel) for host in hosts]
        try:
            pending = wait(futures, _QUIET).not_done
            shown: dict[str, str] = {}
            while pending:
                for host in hosts:
                    if shown.get(host.name) != host.step:
                        shown[host.name] = host.step
                        show(f"{host.name}: {host.step}")
                pending = wait(futures, 0.5).not_done
        except BaseException:
            # Ctrl-C: the threads end with their connections.
            for host in hosts:
                host.abandon()
            raise
    wrong = [error for future in futures if (error := future.exception())]
    if len(wrong) > 1 and all(isinstance(error, Unavailable) for error in wrong):
        raise Unavailable("; ".join(map(str, wrong)))
    if wrong:
        raise wrong[0]
