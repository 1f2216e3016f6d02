"""List a run's processes, and read the state of the machine that no run may change."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from harness import poll_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

ROOT: Final = Path(__file__).parents[2]
ORDINARY_USER: Final = 12345
_MARK: Final = "WG_INTEROP_FAULT_TEST"
# The code by which execnet starts a worker.
_BOOTSTRAP: Final = b"exec(eval(sys.stdin.readline()))"
# Files below /proc/sys that the kernel changes, or that cannot be read.
_VOLATILE: Final = ("_count", "/flush", "stable_secret", "/random/")
_LIFETIMES: Final = ("valid_life_time", "preferred_life_time")


class Run:
    """A pytest started by the test, with all its descendants."""

    def __init__(self, argv: list[str], *, env: dict[str, str] | None = None, output: Path, cwd: Path = ROOT) -> None:
        self._mark = uuid.uuid4().hex
        self.output = output
        # Without the environment variables of this run, so that the child makes a sandbox of its own.
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("WG_INTEROP", "PYTEST"))}
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                argv,
                cwd=cwd,
                env=clean | (env or {}) | {_MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def pids(self) -> list[int]:
        """All living processes of the run, found by their environment."""
        mark = f"{_MARK}={self._mark}".encode()
        pids = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        pids.append(int(entry.name))
        return sorted(pids)

    def chain(self) -> list[int]:
        """The launcher, the sandbox's init and pytest, as far as they exist."""
        chain = [self.process.pid]
        while len(chain) < 3 and (child := _child(chain[-1])):
            chain.append(child)
        return chain

    def workers(self) -> list[int]:
        """The xdist workers, each the child of its own init."""
        return [pid for pid in self.pids() if _BOOTSTRAP in _cmdline(pid) and b"launcher" not in _cmdline(pid)]

    def first_worker(self, deadline: float = 30.0) -> int:
        """Wait for the first xdist worker by polling: /proc has no event for a new process."""
        workers = poll_until(self.workers, lambda found: bool(found) or self.process.poll() is not None, deadline)
        assert workers, f"no worker within {deadline:g} s: {self.output.read_text()}"
        return workers[0]

    def wait_until_gone(self, namespaces: AbstractSet[str], deadline: float = 10.0) -> list[int]:
        """Wait until all processes of the run and in its namespaces end; return those left.

        A dying process has no environment any more, but is still in its namespaces. The kernel may reuse the number of
        a namespace at once, so only processes older than this call count.
        """
        now = _ticks()

        def left() -> list[int]:
            # Reap the child: a zombie would still be in /proc.
            self.process.poll()
            return self.pids() + inhabitants(namespaces, now)

        return poll_until(left, lambda pids: not pids, deadline)

    def close(self) -> None:
        """Kill the processes that are left, also after a failed test."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _child(pid: int) -> int | None:
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return None


def _cmdline(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def namespaces_of(pids: list[int]) -> set[str]:
    """The namespaces that these processes are in, beyond those of this process."""
    return {name for pid in pids for name in _namespaces(pid)} - _namespaces(os.getpid())


def _namespaces(pid: int) -> set[str]:
    namespaces = set()
    for kind in ("net", "mnt", "pid", "ipc", "uts", "user"):
        with suppress(OSError):
            namespaces.add(os.readlink(f"/proc/{pid}/ns/{kind}"))  # noqa: PTH115 - not a path
    return namespaces


def inhabitants(namespaces: AbstractSet[str], born_before: int) -> list[int]:
    """Processes in one of these namespaces, born before a time in clock ticks since boot."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()] if namespaces else []
    return [pid for pid in pids if _namespaces(pid) & namespaces and _birth(pid) < born_before]


def _ticks() -> int:
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def _birth(pid: int) -> int:
    with suppress(OSError):
        # proc(5): the name in field 2 may contain spaces and brackets; starttime is field 22.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return sys.maxsize


def network_state() -> dict[str, Any]:
    """Links, addresses, routes, rules, firewall, sysctls and mounts as this process sees them."""
    return {
        "links": _ip("link"),
        "addresses": _ip("address"),
        "routes": _ip("route", "show", "table", "all"),
        "rules": _ip("rule"),
        "nft": subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=False).stdout,
        "sysctls": _sysctls(),
        "mounts": Path("/proc/self/mounts").read_text(),
        "netns": _entries(Path("/run/netns")),
        "wireguard": _entries(Path("/run/wireguard")),
    }


def _ip(*arguments: str) -> Any:
    output = subprocess.run(["ip", "-j", *arguments], capture_output=True, text=True, check=True).stdout
    return json.loads(output or "[]", object_hook=lambda item: {k: v for k, v in item.items() if k not in _LIFETIMES})


def _sysctls() -> dict[str, str]:
    values = {}
    for path in Path("/proc/sys/net").rglob("*"):
        if path.is_file() and not any(part in str(path) for part in _VOLATILE):
            with suppress(OSError):
                values[str(path)] = path.read_text()
    return values


def _entries(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir()) if directory.exists() else []


def pytest_command(*arguments: str, python: str = sys.executable) -> list[str]:
    return [python, "-m", "pytest", "-p", "no:cacheprovider", *arguments]


@contextmanager
def home(*, ordinary: bool) -> Iterator[Path]:
    """A directory for cache, results and output of one run, owned by the user who runs it."""
    path = Path(tempfile.mkdtemp(prefix="wg-interop-fault-"))
    try:
        if ordinary and os.geteuid() == 0:
            os.chown(path, ORDINARY_USER, ORDINARY_USER)
        yield path
    finally:
        subprocess.run(["rm", "-rf", str(path)], check=False)


def as_ordinary_user(argv: list[str], tun: Path) -> list[str]:
    """The command for an ordinary user who can read this checkout, at /mnt, and open TUN.

    tun: a device node that root has made for this user, because /dev/net/tun may be closed to users.
    """
    prepare = f"mount --bind {ROOT} /mnt && mount --bind {tun} /dev/net/tun && cd /mnt && exec setpriv"
    user = f"--reuid {ORDINARY_USER} --regid {ORDINARY_USER} --clear-groups"
    return ["unshare", "--mount", "sh", "-c", f'{prepare} {user} "$@"', "sh", *argv]
