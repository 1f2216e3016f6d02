"""Run as PID 1 of the guest: mount, load modules, run one command, report to the host.

It runs by `python -IS`, and imports only a few small modules of the standard library: under emulation the import of
`json` takes longer than loading ten kernel modules. boot.py writes the job to /lab/job (marshal), modules.py the kernel
modules and their order. Three virtio ports lead to the host (qemu.py): `output` carries the command's output, `results`
its files, and `verdict` one record per line. The last record has the exit status, and the nonce from the job, which the
command cannot know.
"""

from __future__ import annotations

import ctypes
import errno
import marshal
import os
import select
import time

# Importing `typing` would take the longest of all; type checkers accept any variable of this name.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Literal, NoReturn, TypedDict

    class Job(TypedDict):
        """The job that boot.py writes to /lab/job; boot.GuestRun explains the fields.

        deadline: seconds of the guest's clock since its boot, None for no limit. canary: seconds. collect: folders.
        """

        command: list[str]
        folder: str
        environment: dict[str, str]
        nonce: str
        deadline: float | None
        warp: bool
        canary: float
        collect: list[str]
        module_parameters: dict[str, str]
        linger: float
        """Seconds to wait for the host to read everything before the guest reboots, which ends QEMU."""

    class ReadyRecord(TypedDict):
        """The record on port `verdict` before the command starts."""

        event: Literal["ready"]
        marks: dict[str, float]
        """End of each step, in seconds of the guest's clock since its boot: `init`, `modules`."""

    class LastRecord(TypedDict):
        """The record on port `verdict` after everything else is sent."""

        event: Literal["verdict"]
        nonce: str
        status: int | None
        """Exit status of the command, negative for a signal; None if it exceeded its deadline."""
        results: int
        """Number of files sent over port `results`."""
        marks: dict[str, float]
        """As in ReadyRecord, and `ready`, `command`."""
        drifts: list[float]
        """By how many seconds a sleep was too long, before and after the command; 0 outside warp."""
        interrupts: int
        """Number of virtio interrupts while the command ran."""


LAB: Final = "/lab"
RESULTS: Final = "/lab/results"
CHUNK: Final = 32768  # bytes
ABORT_GRACE: Final = 3.0  # seconds from SIGABRT to SIGKILL

SIGABRT, SIGKILL, SIGPIPE, SIG_DFL = 6, 9, 13, 0
AF_INET, SOCK_DGRAM, SIOCSIFFLAGS, IFF_UP = 2, 2, 0x8914, 1
SYS_FINIT_MODULE: Final = 313
SYSLOG_READ_ALL, SYSLOG_SIZE_BUFFER = 3, 10
REBOOT_RESTART: Final = 0x01234567
NOSUID, NODEV, NOEXEC = 2, 4, 8

MOUNTS: Final = (
    ("proc", "/proc", NOSUID | NODEV | NOEXEC, ""),
    ("sysfs", "/sys", NOSUID | NODEV | NOEXEC, ""),
    ("devtmpfs", "/dev", NOSUID, "mode=755"),
    ("devpts", "/dev/pts", NOSUID, "ptmxmode=666"),
    ("tmpfs", "/dev/shm", NOSUID | NODEV, "mode=1777"),  # noqa: S108 - where the C library looks for it
    ("cgroup2", "/sys/fs/cgroup", NOSUID | NODEV | NOEXEC, ""),
    ("debugfs", "/sys/kernel/debug", NOSUID | NODEV | NOEXEC, ""),
)
NOT_IN_EVERY_KERNEL: Final = ("cgroup2", "debugfs")

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Reap orphans, as PID 1 must, while a child does the work; reboot, which ends QEMU, when the child has ended."""
    worker = os.fork()
    if worker == 0:
        try:
            serve()
        except BaseException as error:
            print(f"lab: guest failed: {error}", flush=True)
            raise
        os._exit(0)
    while os.wait()[0] != worker:
        pass
    libc.reboot(REBOOT_RESTART)


def serve() -> None:
    """Do everything in order, from the mounts to the verdict."""
    marks = {"init": boottime()}
    mount_filesystems()
    job = take_job()
    load_modules(job["module_parameters"])
    marks["modules"] = boottime()
    configure()
    output, results, verdict = Port("output"), Port("results"), Port("verdict")
    verdict.send_record({"event": "ready", "marks": marks})
    drifts = [canary(job)]
    marks["ready"] = boottime()
    command = Command(job, output, verdict)
    status = command.run()
    marks["command"] = boottime()
    drifts.append(canary(job))
    look_for_leaks()
    save_kernel_log()
    count = send_results(results, job["collect"])
    record: LastRecord = {
        "event": "verdict",
        "nonce": job["nonce"],
        "status": status,
        "results": count,
        "marks": marks,
        "drifts": drifts,
        "interrupts": command.interrupts,
    }
    verdict.send_record(record)
    # The host kills QEMU once it has everything; a reboot now could lose data that QEMU has not passed on yet.
    let_pass(job["linger"])


def let_pass(seconds: float) -> None:
    """Let time pass, as harness/wait.py does, which cannot be imported here."""
    time.sleep(seconds)


def boottime() -> float:
    """Return the seconds since the guest's boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def check(result: int, what: str) -> None:
    """Raise OSError with the C library's errno if a call returned -1; what: begins the message."""
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount_filesystems() -> None:
    """Mount the kernel's filesystems, and make the links in /dev that udev would make."""
    for kind, where, flags, options in MOUNTS:
        if not os.path.isdir(where) and kind not in NOT_IN_EVERY_KERNEL:
            os.makedirs(where)
        result = libc.mount(kind.encode(), where.encode(), kind.encode(), flags, options.encode())
        if kind not in NOT_IN_EVERY_KERNEL:
            check(result, f"mount {where}")
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"/dev/{name}")


def take_job() -> Job:
    """Read the job and delete its file: the command must not learn the nonce."""
    with open(f"{LAB}/job", "rb") as content:
        job: Job = marshal.load(content)  # noqa: S302 - our own runner wrote it
    os.unlink(f"{LAB}/job")
    return job


def load_modules(parameters: dict[str, str]) -> None:
    """Load the modules of /lab/modules in order; parameters: by module name. Raises OSError."""
    if not os.path.exists(f"{LAB}/modules"):
        return
    with open(f"{LAB}/modules") as content:
        names = content.read().split()
    for name in names:
        path = f"{LAB}/{name}.ko"
        with open(path, "rb") as module:
            result = libc.syscall(SYS_FINIT_MODULE, module.fileno(), parameters.get(name, "").encode(), 0)
        # EEXIST: built in. A build tree may contain old files of modules that its kernel has built in now.
        if ctypes.get_errno() != errno.EEXIST:
            check(result, f"module {name}")
        os.unlink(path)


def configure() -> None:
    """Create the results folder, set the host name, and set the loopback interface up."""
    os.makedirs(RESULTS, exist_ok=True)
    libc.sethostname(b"guest", 5)
    request = b"lo".ljust(16, b"\0") + IFF_UP.to_bytes(2, "little") + bytes(14)
    any_socket = libc.socket(AF_INET, SOCK_DGRAM, 0)
    check(libc.ioctl(any_socket, SIOCSIFFLAGS, request), "lo up")
    os.close(any_socket)


class Port:
    """A virtio port to the host."""

    def __init__(self, name: str) -> None:
        """Open the port; it is looked up in /sys, because there is no udev to make links. Raises OSError."""
        ports = "/sys/class/virtio-ports"
        for device in os.listdir(ports) if os.path.isdir(ports) else ():
            with open(f"{ports}/{device}/name") as content:
                if content.read().strip() == f"lab.{name}":
                    # A blocking write would spin with interrupts off until the host has read it (__send_to_port in
                    # virtio_console.c).
                    self.file = os.open(f"/dev/{device}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                    return
        raise OSError(
            errno.ENODEV, f"no port lab.{name}: has the kernel VIRTIO_PCI and VIRTIO_CONSOLE (kernel.config)?"
        )

    def send_record(self, record: ReadyRecord | LastRecord) -> None:
        """Send a record as one line of Python's literal syntax."""
        self.send(repr(record).encode() + b"\n")

    def send(self, data: bytes) -> None:
        """Send all bytes; wait for the host whenever the port is full."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self.file, rest[:CHUNK]) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self.file, select.POLLOUT)
                poll.poll()


class Command:
    """The command of this boot. Its output goes to the host at once or, in warp, after its end.

    interrupts: number of virtio interrupts while it ran.
    """

    def __init__(self, job: Job, output: Port, verdict: Port) -> None:
        self.job = job
        self.output = output
        self.verdict = verdict
        self.held: list[bytes] = []
        self.interrupts = 0

    def run(self) -> int | None:
        """Run the command; return its exit status, negative for a signal, or None if it exceeded its deadline."""
        interrupts = host_interrupts()
        reading, writing = os.pipe2(os.O_CLOEXEC)
        child = os.fork()
        if child == 0:
            self.become(writing)
        os.close(writing)
        os.set_blocking(reading, False)
        in_time = self.watch(os.pidfd_open(child), reading)
        if not in_time:
            self.stop(child)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.drain(reading)
        # Read before the held output is sent: that raises interrupts too, but nothing is measured any more.
        self.interrupts = host_interrupts() - interrupts
        for data in self.held:
            self.output.send(data)
        return status if in_time else None

    def become(self, output: int) -> NoReturn:
        """Execute the command in this process; output: for stdout and stderr. Exit with 127 if that fails."""
        try:
            os.setsid()
            # Python ignores SIGPIPE, and execve(2) keeps that.
            libc.signal(SIGPIPE, SIG_DFL)
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(self.job["folder"])
            os.execvpe(self.job["command"][0], self.job["command"], self.job["environment"])  # noqa: S606
        except OSError as error:
            os.write(2, f"{self.job['command'][0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def watch(self, ended: int, output: int) -> bool:
        """Pass on the output until the command has ended (True) or its deadline has passed (False).

        ended: a pidfd of the command. output: reading end of its output.
        """
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(output, select.POLLIN)
        # With no event requested, poll(2) still reports POLLHUP: the host has closed its end, so the runner is dead.
        poll.register(self.verdict.file, 0)
        while events := poll.poll(self.remaining()):
            files = [file for file, _ in events]
            if self.verdict.file in files:
                libc.reboot(REBOOT_RESTART)
            if ended in files:
                return True
            if not self.drain(output):
                poll.unregister(output)
        return False

    def remaining(self) -> float | None:
        """Return the milliseconds until the deadline; None without one."""
        if self.job["deadline"] is None:
            return None
        return max(0, self.job["deadline"] - boottime()) * 1000

    def drain(self, output: int) -> bool:
        """Pass on the output that can be read without waiting; False at its end."""
        try:
            while data := os.read(output, CHUNK):
                if self.job["warp"]:
                    self.held.append(data)
                else:
                    self.output.send(data)
        except BlockingIOError:
            return True
        return False

    def stop(self, child: int) -> None:
        """Stop a command that exceeded its deadline, with stacks in the logs.

        The kernel logs its blocked tasks (sysrq w), Python's faulthandler prints its stacks on SIGABRT.
        """
        with open("/proc/sysrq-trigger", "w") as trigger:
            trigger.write("w")
        ended = select.poll()
        ended.register(os.pidfd_open(child), select.POLLIN)
        os.killpg(child, SIGABRT)
        if not ended.poll(ABORT_GRACE * 1000):
            os.killpg(child, SIGKILL)


def canary(job: Job) -> float:
    """Sleep, and return by how many seconds that took too long; outside warp return 0 at once, to save the time."""
    if not job["warp"]:
        return 0.0
    before = boottime()
    let_pass(job["canary"])
    return boottime() - before - job["canary"]


def host_interrupts() -> int:
    """Return the number of virtio interrupts since boot: in warp each may have moved the clock."""
    with open("/proc/interrupts") as table:
        rows = [line.split() for line in table if "virtio" in line]
    return sum(int(field) for row in rows for field in row[1:] if field.isdigit())


def look_for_leaks() -> None:
    """Start a scan if the kernel has kmemleak; it logs the number of leaks, and kmemleak.log gets their stacks."""
    leaks = "/sys/kernel/debug/kmemleak"
    if os.path.exists(leaks):
        with open(leaks, "w") as trigger:
            trigger.write("scan")
        with open(leaks, "rb") as stacks, open(f"{RESULTS}/kmemleak.log", "wb") as log:
            log.write(stacks.read())


def save_kernel_log() -> None:
    """Write the kernel's log buffer to kernel.log in the results."""
    size = libc.klogctl(SYSLOG_SIZE_BUFFER, None, 0)
    content = ctypes.create_string_buffer(size)
    length = libc.klogctl(SYSLOG_READ_ALL, content, size)
    with open(f"{RESULTS}/kernel.log", "wb") as log:
        log.write(content.raw[:length])


def send_results(port: Port, folders: list[str]) -> int:
    """Send each file below the folders as a line `SIZE PATH` and its bytes; return the number of files.

    PATH begins with the name of the folder, except for the first folder, /lab/results: its files are at the top.
    """
    count = 0
    for number, top in enumerate(folders):
        start = os.path.dirname(top) if number else top
        for path in (os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names):
            if os.path.isfile(path):
                with open(path, "rb") as content:
                    data = content.read()
                port.send(f"{len(data)} {os.path.relpath(path, start)}\n".encode() + data)
                count += 1
    return count


if __name__ == "__main__":
    main()
