"""Run one command in namespaces of its own and return its exit status.

    python -I -S launcher.py [--die-with PID] [--or-without|--without] -- COMMAND...

Processes, seen from outside: launcher (the pid the caller knows) > init (pid 1 of the sandbox) > COMMAND.

It is a program of its own, with the standard library only, because unsharing a user namespace fails in a process
with threads and because a new PID namespace holds only children. The kernel does the cleaning: init dies with
the launcher (PR_SET_PDEATHSIG), and with init go all processes of the sandbox, its interfaces, mounts and sockets.
Sources: unshare(2), pid_namespaces(7), user_namespaces(7), mount_namespaces(7), prctl(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import sys
from typing import Final, NoReturn

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000
SANDBOX: Final = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1

# What a caller may send to the launcher and means for the command.
FORWARDED: Final = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
WATCHED: Final = FORWARDED | {signal.SIGCHLD}

COULD_NOT_TEST: Final = 125
USAGE: Final = 2

# Set for the command: the inode of its PID namespace, so that a value inherited from elsewhere does not count.
INSIDE: Final = "WG_INTEROP_SANDBOX"
# Set instead, with --or-without, when there could be no sandbox: the reason and the remedy.
REFUSED: Final = "WG_INTEROP_NO_SANDBOX"

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The system does not let us make a sandbox; the message says what to do about it."""


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), f"unshare(0x{flags:x})")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    result = _libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data))
    _check(result, f"mount {target}")


def die_with_parent(parent_is_alive: bool) -> None:
    """Be killed when our parent is; `parent_is_alive` is asked after, because it may have died just before."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl(PR_SET_PDEATHSIG)")
    if not parent_is_alive:
        os._exit(COULD_NOT_TEST)


# Switches that forbid what a sandbox needs: the file, the value that forbids, the name that sysctl(8) knows it by.
_KINDS: Final = ("user", "mnt", "pid", "net", "ipc", "uts")
SWITCHES: Final = (
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns=0"),
    *((f"/proc/sys/user/max_{kind}_namespaces", "0", f"user.max_{kind}_namespaces=10000") for kind in _KINDS),
)


def remedy() -> str:
    """Find the switch that forbids namespaces, and say how to turn it."""
    for path, forbids, setting in SWITCHES:
        try:
            with open(path, encoding="ascii") as file:
                if file.read().strip() == forbids:
                    return f"run as root: sysctl -w {setting}"
        except OSError:
            continue
    return "run as root, or allow user namespaces (in a container: start it with --privileged)"


def enter_namespaces() -> None:
    """Unshare all namespaces of the sandbox, with a user namespace of our own only where it takes one."""
    try:
        try:
            unshare(SANDBOX)
        except PermissionError:
            _enter_user_namespace()
    except OSError as error:
        raise Refused(f"no namespaces here ({error.strerror}): {remedy()}") from error


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    unshare(SANDBOX | CLONE_NEWUSER)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1")
    _write("/proc/self/gid_map", f"0 {gid} 1")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def private_mounts() -> None:
    """Give the sandbox its own /proc, /sys, /run/netns and /run/wireguard; all else stays as the user sees it."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    try:
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError as error:
        raise Refused(f"no fresh /proc here ({error}): in a container, start it with --privileged") from error
    try:
        mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError as error:
        # The outer /sys stays; it shows the outer network devices, which nobody here asks for.
        if error.errno not in {errno.EPERM, errno.EBUSY}:
            raise
    _private_run()


def _private_run() -> None:
    """Cover /run, where an ordinary user could make no directory, and show its former entries again."""
    kept = {
        entry.name: os.open(entry.path, os.O_PATH | os.O_CLOEXEC)
        for entry in os.scandir("/run")
        if entry.name not in {"netns", "wireguard"} and entry.is_dir(follow_symlinks=False)
    }
    mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for name in ["netns", "wireguard"]:
        os.mkdir(f"/run/{name}", 0o755)
    for name, descriptor in kept.items():
        os.mkdir(f"/run/{name}")
        try:
            mount(f"/proc/self/fd/{descriptor}", f"/run/{name}", None, MS_BIND | MS_REC)
        except OSError:
            # An entry that may not be shown again, such as another user's: it was not ours to use.
            os.rmdir(f"/run/{name}")
        os.close(descriptor)


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack("16xh22x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[0]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | IFF_UP))


def serve(child: int) -> int:
    """Forward signals to the child and reap until it has ended; return its wait status.

    What the terminal sends (si_code SI_KERNEL) reaches the whole foreground group by itself; forwarding it would turn
    one Ctrl-C into two.
    """
    while True:
        info = signal.sigwaitinfo(WATCHED)
        if info.si_signo == signal.SIGCHLD:
            status = _reap(child)
            if status is not None:
                return status
        elif info.si_code <= 0:
            os.kill(child, info.si_signo)


def _reap(child: int) -> int | None:
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status


def middle(command: list[str], lifeline: int, answer: int) -> NoReturn:
    """Enter the namespaces, leave init behind in them and go, so that the launcher itself stays where it was."""
    try:
        enter_namespaces()
    except Refused as error:
        os.write(answer, f"refused {error}\n".encode())
        os._exit(COULD_NOT_TEST)
    child = os.fork()
    if child == 0:
        init(command, lifeline, answer)
    os.write(answer, b"init %d\n" % child)
    os._exit(0)


def init(command: list[str], lifeline: int, answer: int) -> NoReturn:
    """Pid 1 of the sandbox: set the scene, start the command, report how it ended.

    lifeline: a pipe whose other end only the launcher holds. answer: where errors and the status go.
    """
    # One byte comes when the launcher has become our parent; the end of the file, if it is no more.
    die_with_parent(parent_is_alive=os.read(lifeline, 1) != b"")
    if select.select([lifeline], [], [], 0)[0]:
        os._exit(COULD_NOT_TEST)
    try:
        private_mounts()
        loopback_up()
    except (OSError, Refused) as error:
        os.write(answer, f"refused {error}\n".encode())
        os._exit(COULD_NOT_TEST)
    os.environ[INSIDE] = str(os.stat("/proc/self/ns/pid").st_ino)
    os.write(answer, b"ready\n")
    child = os.fork()
    if child == 0:
        run(command)
    os.write(answer, b"ended %d\n" % serve(child))
    # With pid 1 the kernel ends all that is left in the sandbox.
    os._exit(0)


def run(command: list[str]) -> NoReturn:
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    # Python ignores these two for itself; the command expects the defaults.
    for number in [signal.SIGPIPE, signal.SIGXFSZ]:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"wg-interop: {command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127)


def end_like(status: int) -> NoReturn:
    """End as the command did, by signal too, so that a shell or a parent sees no difference."""
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os._exit(128 + number)


def launch(command: list[str]) -> NoReturn:
    """Run the command in a sandbox; raises Refused, with nothing changed, where there can be none."""
    lifeline, held = os.pipe()
    answers, answer = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    # A subreaper inherits init from the process between, and with it the power to die for it.
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1), "prctl(PR_SET_CHILD_SUBREAPER)")
    between = os.fork()
    if between == 0:
        os.close(held)
        os.close(answers)
        middle(command, lifeline, answer)
    os.close(lifeline)
    os.close(answer)
    with os.fdopen(answers) as lines:
        child = int(_expect("init", lines.readline()))
        os.waitpid(between, 0)
        os.write(held, b"!")
        _expect("ready", lines.readline())
        status = serve(child)
        _, _, reported = lines.readline().partition(" ")
    end_like(int(reported) if reported else status)


def _expect(word: str, line: str) -> str:
    said, _, rest = line.strip().partition(" ")
    if said != word:
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 0), "prctl(PR_SET_CHILD_SUBREAPER)")
        raise Refused(rest or "the sandbox's init died")
    return rest


def main(arguments: list[str]) -> NoReturn:
    or_without, without, parent = False, False, None
    while arguments and arguments[0] != "--":
        option = arguments.pop(0)
        if option == "--or-without":
            or_without = True
        elif option == "--without":
            without = True
        elif option == "--die-with" and arguments:
            parent = int(arguments.pop(0))
        else:
            print(f"launcher: unknown option {option}", file=sys.stderr)
            sys.exit(USAGE)
    command = arguments[1:]
    if not command:
        print(
            "launcher: no command; usage: launcher.py [--die-with PID] [--or-without|--without] -- COMMAND...",
            file=sys.stderr,
        )
        sys.exit(USAGE)
    if parent is not None:
        die_with_parent(os.getppid() == parent)
    if without:
        run(command)
    try:
        launch(command)
    except (OSError, Refused) as error:
        if not or_without:
            print(f"wg-interop: no sandbox: {error}", file=sys.stderr)
            sys.exit(COULD_NOT_TEST)
        os.environ[REFUSED] = str(error)
        run(command)


if __name__ == "__main__":
    main(sys.argv[1:])
