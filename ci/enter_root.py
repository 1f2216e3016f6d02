"""Run a command in mount, PID, IPC and UTS namespaces of its own, in another root if asked.

    python -m ci.enter_root [--parent PID] [--root FOLDER] [--hostname NAME] [--share PATH=TARGET]... -- COMMAND...

The command uses the caller's network. When it ends, the kernel kills its other processes and removes its mounts. The
exit status is that of the command. Sources: mount_namespaces(7), pid_namespaces(7), user_namespaces(7), switch_root(8).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import Final, NoReturn

from harness.install.tools import exit_on_sigterm
from harness.sandbox.launcher import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    COULD_NOT_TEST,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    die_with_parent,
    mount,
    run,
    unshare,
)

NAMESPACES: Final = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
MS_MOVE: Final = 0x2000
# Documentation/admin-guide/devices.txt.
DEVICES: Final = {
    "null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0),
    "net/tun": (10, 200),
}  # fmt: skip
LINKS: Final = {
    "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx",
}  # fmt: skip
_STRICT: Final = MS_NOSUID | MS_NODEV | MS_NOEXEC


def command_line(
    *command: str, root: Path | None = None, hostname: str | None = None, shares: dict[str, str] | None = None
) -> list[str]:
    """Return the command line that runs `command` by this program; it must be started in the root of the checkout.

    root, hostname: of the command, None for those of this machine. shares: path here -> path in the root.
    """
    options = [f"--parent={os.getpid()}"]
    options += [f"--share={path}={target}" for path, target in (shares or {}).items()]
    options += [f"--root={root}"] if root else []
    options += [f"--hostname={hostname}"] if hostname else []
    return [sys.executable, "-m", "ci.enter_root", *options, "--", *command]


def main() -> int:
    """Run the command and return its exit status; 128 + N for signal N, 125 if namespaces cannot be created."""
    parser = argparse.ArgumentParser(prog="ci/enter_root.py", description="Run a command in namespaces of its own.")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process, the caller, ends")
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="root folder of the command (default: this root)")
    parser.add_argument("--hostname", metavar="NAME", help="host name of the command")
    parser.add_argument(
        "--share",
        action="append",
        default=[],
        metavar="PATH=TARGET",
        help="bind PATH of this machine to TARGET in the root; may be repeated",
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    exit_on_sigterm()
    if options.parent is not None:
        die_with_parent(os.getppid() == options.parent)
    try:
        unshare(NAMESPACES)
    except OSError as error:
        print(f"ci/enter_root: cannot create namespaces: {error}; run as root, in a container with --privileged")
        return COULD_NOT_TEST
    init = os.fork()
    if init == 0:
        die_with_parent(parent_is_alive=True)
        _init(options)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])
    except (KeyboardInterrupt, SystemExit):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        os.kill(init, signal.SIGKILL)
        # Pid 1 of a namespace ends after all other processes in it (zap_pid_ns_processes).
        os.waitpid(init, 0)
        return 128 + signal.SIGINT


def _init(options: argparse.Namespace) -> NoReturn:
    """Run as pid 1 of the namespace: mount, start the command, reap children, exit with the command's status.

    The command is not pid 1 itself: a program that changes its user loses its parent-death signal (prctl(2)).
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        if options.hostname:
            socket.sethostname(options.hostname)
        if options.root:
            _mount_all(options.root, dict(share.split("=", 1) for share in options.share))
            _switch_root(options.root)
    except OSError as error:
        print(f"ci/enter_root: {error}", file=sys.stderr, flush=True)
        os._exit(COULD_NOT_TEST)
    command = os.fork()
    if command == 0:
        run(options.command)
    pid = 0
    while pid != command:
        pid, wait_status = os.wait()
    status = os.waitstatus_to_exitcode(wait_status)
    os._exit(status if status >= 0 else 128 - status)


def _mount_all(root: Path, shares: dict[str, str]) -> None:
    mount(str(root), str(root), None, MS_BIND)
    _mount_devices(root / "dev")
    mount("proc", str(root / "proc"), "proc", _STRICT)
    mount("sysfs", str(root / "sys"), "sysfs", _STRICT)
    mount("tmpfs", str(root / "run"), "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for path, target in shares.items():
        place = root / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            place.mkdir(exist_ok=True)
        else:
            place.touch()
        mount(path, str(place), None, MS_BIND)


def _mount_devices(dev: Path) -> None:
    """Create the devices that programs need, with the permissions that udev sets on Debian."""
    mount("tmpfs", str(dev), "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755")
    for folder in ("pts", "shm", "net"):
        (dev / folder).mkdir()
    for name, number in DEVICES.items():
        os.mknod(dev / name, stat.S_IFCHR, os.makedev(*number))
        (dev / name).chmod(0o666)
    for name, target in LINKS.items():
        (dev / name).symlink_to(target)
    mount("devpts", str(dev / "pts"), "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5")
    mount("tmpfs", str(dev / "shm"), "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")


def _switch_root(root: Path) -> None:
    # chroot alone is not enough: in a chroot unshare(2) refuses user namespaces (EPERM), which the tests need.
    os.chdir(root)
    mount(".", "/", None, MS_MOVE)
    os.chroot(".")
    os.chdir("/")


if __name__ == "__main__":
    sys.exit(main())
