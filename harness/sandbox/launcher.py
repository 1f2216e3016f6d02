"""Run one command in namespaces of its own and return its exit status.

    python -I -S launcher.py [--die-with PID] [--or-without|--without] -- COMMAND...

--die-with PID: be killed when the parent PID ends. --or-without: run COMMAND without a sandbox if none can be created.
--without: run COMMAND without a sandbox. Exit status: that of COMMAND; 125: no sandbox; 2: wrong usage.

Processes, seen from outside: launcher (the pid that the caller gets) > init (pid 1 of the sandbox) > COMMAND.

The launcher is a program of its own and uses only the standard library, for two reasons: a process with threads cannot
unshare its user namespace, and a new PID namespace contains only children. The kernel cleans up: when the launcher
dies, init is killed (PR_SET_PDEATHSIG), and with init all processes of the sandbox, its interfaces, mounts and sockets.
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

# Signals that the launcher and init pass on to the command.
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

# Set for a command in a sandbox: the inode of its PID namespace, so that a value from another sandbox does not count.
INSIDE: Final = "WG_INTEROP_SANDBOX"
# Set with it: the pid of the sandbox's init in the PID namespace of the launcher, for nsenter(1).
OUTER_PID: Final = "WG_INTEROP_OUTER_PID"
# Set instead for a command that runs without one after --or-without: the reason and the remedy.
REFUSED: Final = "WG_INTEROP_NO_SANDBOX"

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The system does not allow a sandbox; the message gives reason and remedy."""


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Call unshare(2) for the calling thread; flags: CLONE_NEW*. Raises OSError."""
    _check(_libc.unshare(flags), f"unshare(0x{flags:x})")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Call mount(2). kind: filesystem type; flags: MS_*; data: options of the filesystem. Raises OSError."""

    def text(value: str | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    result = _libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data))
    _check(result, f"mount {target}")


def die_with_parent(parent_is_alive: bool) -> None:
    """Let the kernel kill this process when its parent ends (PR_SET_PDEATHSIG); exit if the parent is already gone.

    parent_is_alive: must be looked up after the parent was chosen; the kernel sends no signal for an earlier death.
    """
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl(PR_SET_PDEATHSIG)")
    if not parent_is_alive:
        os._exit(COULD_NOT_TEST)


# Sysctls that can forbid a sandbox: (file, the value that forbids it, the setting that allows it, for sysctl(8)).
_KINDS: Final = ("user", "mnt", "pid", "net", "ipc", "uts")
SWITCHES: Final = (
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns=0"),
    *((f"/proc/sys/user/max_{kind}_namespaces", "0", f"user.max_{kind}_namespaces=10000") for kind in _KINDS),
)


def remedy() -> str:
    """Return what the user can do to allow namespaces: the sysctl that forbids them, or general advice."""
    for path, forbids, setting in SWITCHES:
        try:
            with open(path, encoding="ascii") as file:
                if file.read().strip() == forbids:
                    return f"run as root: sysctl -w {setting}"
        except OSError:
            continue
    return "run as root, or allow user namespaces (in a container: start it with --privileged)"


def enter_namespaces() -> None:
    """Unshare all namespaces of the sandbox, and a user namespace too if we lack the privilege without one.

    Raises Refused.
    """
    try:
        try:
            unshare(SANDBOX)
        except PermissionError:
            _enter_user_namespace()
    except OSError as error:
        raise Refused(f"cannot create namespaces ({error.strerror}): {remedy()}") from error


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
    """Mount the sandbox's own /proc, /sys, /run/netns and /run/wireguard; all other files stay the user's.

    Raises Refused if the container forbids a new /proc, OSError for anything else.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    try:
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError as error:
        raise Refused(f"cannot mount a new /proc ({error}): start the container with --privileged") from error
    try:
        mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError as error:
        # Keep the outer /sys. It shows the network devices outside the sandbox; nothing in the sandbox reads those.
        if error.errno not in {errno.EPERM, errno.EBUSY}:
            raise
    _private_run()


def _private_run() -> None:
    """Mount a tmpfs on /run, where a user could not create a directory, and bind the former directories into it."""
    descriptors = {
        entry.name: os.open(entry.path, os.O_PATH | os.O_CLOEXEC)
        for entry in os.scandir("/run")
        if entry.name not in {"netns", "wireguard"} and entry.is_dir(follow_symlinks=False)
    }
    mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for name in ["netns", "wireguard"]:
        os.mkdir(f"/run/{name}", 0o755)
    for name, descriptor in descriptors.items():
        os.mkdir(f"/run/{name}")
        try:
            mount(f"/proc/self/fd/{descriptor}", f"/run/{name}", None, MS_BIND | MS_REC)
        except OSError:
            # A directory that we may not bind, such as another user's; the command could not use it before either.
            os.rmdir(f"/run/{name}")
        os.close(descriptor)


def loopback_up() -> None:
    """Set the loopback interface of the new network namespace up; it starts down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack("16xh22x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[0]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | IFF_UP))


def serve(child: int) -> int:
    """Forward signals to `child` and reap all children until it has ended; return its wait status (waitpid(2)).

    A signal from the terminal (si_code SI_KERNEL) is not forwarded: the kernel sends it to the whole foreground process
    group, and forwarding would turn one Ctrl-C into two.
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
    """Reap every child that has ended; return the wait status of `child` if it is one of them."""
    child_status = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return child_status
        if pid == 0:
            return child_status
        if pid == child:
            child_status = status


def middle(command: list[str], lifeline: int, answer: int) -> NoReturn:
    """Enter the namespaces, fork init in them, and exit, so that the launcher itself stays outside.

    lifeline, answer: for `init`.
    """
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
    """Run as pid 1 of the sandbox: mount, start the command, report how it ended.

    lifeline: the reading end of a pipe that only the launcher can write to. answer: a pipe to the launcher, for lines
    that begin with `init`, `refused`, `ready` or `ended`.
    """
    # The launcher writes our pid as it sees it when it has become our parent. The pipe ends without it if the launcher
    # is gone.
    outer_pid = os.read(lifeline, 32)
    die_with_parent(parent_is_alive=outer_pid != b"")
    if select.select([lifeline], [], [], 0)[0]:
        os._exit(COULD_NOT_TEST)
    try:
        private_mounts()
        loopback_up()
    except (OSError, Refused) as error:
        os.write(answer, f"refused {error}\n".encode())
        os._exit(COULD_NOT_TEST)
    os.environ[INSIDE] = str(os.stat("/proc/self/ns/pid").st_ino)
    os.environ[OUTER_PID] = outer_pid.decode()
    os.write(answer, b"ready\n")
    child = os.fork()
    if child == 0:
        run(command)
    os.write(answer, b"ended %d\n" % serve(child))
    # When pid 1 exits, the kernel kills all other processes of its PID namespace (pid_namespaces(7)).
    os._exit(0)


def run(command: list[str]) -> NoReturn:
    """Execute the command in this process with default signal handling; exit with 127 if it cannot be executed."""
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    # Python ignores these two signals, and execve(2) keeps that; the command expects the defaults.
    for number in [signal.SIGPIPE, signal.SIGXFSZ]:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"wg-interop: {command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127)


def end_like(status: int) -> NoReturn:
    """End this process with the same wait status as the command: by exit status, or by the same signal."""
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
    """Run the command in a sandbox, and end as it does; Refused, without side effects, if none can be created."""
    lifeline, lifeline_writer = os.pipe()
    answers, answer = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    # A subreaper becomes init's parent when the process between them ends, so the kernel kills init when we die.
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1), "prctl(PR_SET_CHILD_SUBREAPER)")
    between = os.fork()
    if between == 0:
        os.close(lifeline_writer)
        os.close(answers)
        middle(command, lifeline, answer)
    os.close(lifeline)
    os.close(answer)
    with os.fdopen(answers) as lines:
        child = int(_expect("init", lines.readline()))
        os.waitpid(between, 0)
        os.write(lifeline_writer, b"%d" % child)
        _expect("ready", lines.readline())
        status = serve(child)
        _, _, reported = lines.readline().partition(" ")
    end_like(int(reported) if reported else status)


def _expect(word: str, line: str) -> str:
    """Return the rest of an answer that begins with `word`; Refused, after all children have ended, for any other."""
    keyword, _, rest = line.strip().partition(" ")
    if keyword != word:
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 0), "prctl(PR_SET_CHILD_SUBREAPER)")
        raise Refused(rest or "the sandbox's init died")
    return rest


def main(arguments: list[str]) -> NoReturn:
    """Read the options and run the command; see the module's docstring."""
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
