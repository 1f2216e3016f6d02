"""Run as PID 1 of the guest: mount, load modules, run one command, report to the host.

It runs by `python -IS`, imports nothing of the project and of the library only what costs little: under emulation the
import of `json` takes longer than loading ten modules. What to do stands in /lab/job (marshal, written by boot.py);
the modules and their order come from modules.py. Three virtio ports lead to the host (qemu.py): `output` carries what
the command prints, `results` the files it left, `verdict` one record a line, the last with the exit status and the
nonce that only the job held.
"""

from __future__ import annotations

import ctypes
import errno
import marshal
import os
import select
import time

# `typing` would be the dearest import of all; checkers take any such name for theirs.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Literal, NoReturn, TypedDict

    class Job(TypedDict):
        """What the guest is to do, as boot.py writes it to /lab/job."""

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
        """Seconds to wait for the host to read everything before the machine is stopped."""

    class ReadyRecord(TypedDict):
        """What port `verdict` carries before the command starts."""

        event: Literal["ready"]
        marks: dict[str, float]
        """When each step was done, on the guest's clock since its boot: `init`, `modules`."""

    class LastRecord(TypedDict):
        """What port `verdict` carries when all else is sent."""

        event: Literal["verdict"]
        nonce: str
        status: int | None
        """The command's own, negative for a signal; None if it overstayed its deadline."""
        results: int
        """How many files went over port `results`."""
        marks: dict[str, float]
        """As in ReadyRecord, and `ready`, `command`."""
        drifts: list[float]
        """By how many seconds a sleep was too long, before the command and after it; in warp only, else 0."""
        interrupts: int
        """How many interrupts the host raised while the command ran."""


LAB: Final = "/lab"
RESULTS: Final = "/lab/results"
CHUNK: Final = 32768
ABORT_GRACE: Final = 3.0

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
    """Reap whatever is orphaned, as PID 1 must, while a child does the work; stop the machine when that has ended."""
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
    marks = {"init": boottime()}
    mount_filesystems()
    job = take_job()
    load_modules(job["module_parameters"])
    marks["modules"] = boottime()
    configure()
    output, results, verdict = Port("output"), Port("results"), Port("verdict")
    verdict.tell({"event": "ready", "marks": marks})
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
    verdict.tell(record)
    # The host ends the machine once it has everything; stopping now could lose what is still on its way.
    time.sleep(job["linger"])


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def check(result: int, what: str) -> None:
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount_filesystems() -> None:
    for kind, where, flags, options in MOUNTS:
        if not os.path.isdir(where) and kind not in NOT_IN_EVERY_KERNEL:
            os.makedirs(where)
        result = libc.mount(kind.encode(), where.encode(), kind.encode(), flags, options.encode())
        if kind not in NOT_IN_EVERY_KERNEL:
            check(result, f"mount {where}")
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"/dev/{name}")


def take_job() -> Job:
    """Read what to do, and remove it: the command must not learn the nonce."""
    with open(f"{LAB}/job", "rb") as content:
        job: Job = marshal.load(content)  # noqa: S302 - our own runner wrote it
    os.unlink(f"{LAB}/job")
    return job


def load_modules(parameters: dict[str, str]) -> None:
    if not os.path.exists(f"{LAB}/modules"):
        return
    with open(f"{LAB}/modules") as content:
        names = content.read().split()
    for name in names:
        path = f"{LAB}/{name}.ko"
        with open(path, "rb") as module:
            result = libc.syscall(SYS_FINIT_MODULE, module.fileno(), parameters.get(name, "").encode(), 0)
        # A build tree may hold modules that its kernel has built in by now.
        if ctypes.get_errno() != errno.EEXIST:
            check(result, f"module {name}")
        os.unlink(path)


def configure() -> None:
    """What a distribution's start-up does: loopback and host name."""
    os.makedirs(RESULTS, exist_ok=True)
    libc.sethostname(b"guest", 5)
    request = b"lo".ljust(16, b"\0") + IFF_UP.to_bytes(2, "little") + bytes(14)
    any_socket = libc.socket(AF_INET, SOCK_DGRAM, 0)
    check(libc.ioctl(any_socket, SIOCSIFFLAGS, request), "lo up")
    os.close(any_socket)


class Port:
    """A way to the host, found by its name since no udev makes links here."""

    def __init__(self, name: str) -> None:
        ports = "/sys/class/virtio-ports"
        for device in os.listdir(ports) if os.path.isdir(ports) else ():
            with open(f"{ports}/{device}/name") as content:
                if content.read().strip() == f"lab.{name}":
                    # A blocking write would spin, interrupts off, until the host has read it.
                    self.file = os.open(f"/dev/{device}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                    return
        raise OSError(
            errno.ENODEV, f"no port lab.{name}: has the kernel VIRTIO_PCI and VIRTIO_CONSOLE (kernel.config)?"
        )

    def tell(self, record: ReadyRecord | LastRecord) -> None:
        self.send(repr(record).encode() + b"\n")

    def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self.file, rest[:CHUNK]) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self.file, select.POLLOUT)
                poll.poll()


class Command:
    """The one command of this boot; what it prints goes to the host at once or, in warp, when it has ended.

    interrupts: how many the ways to the host have raised while it ran.
    """

    def __init__(self, job: Job, output: Port, verdict: Port) -> None:
        self.job = job
        self.output = output
        self.verdict = verdict
        self.held: list[bytes] = []
        self.interrupts = 0

    def run(self) -> int | None:
        """Its exit status as Python's subprocess gives it, or None if it overstayed its deadline."""
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
        # Those of the output that was held back come when there is nothing left to be measured.
        self.interrupts = host_interrupts() - interrupts
        for data in self.held:
            self.output.send(data)
        return status if in_time else None

    def become(self, output: int) -> NoReturn:
        try:
            os.setsid()
            # Python ignores SIGPIPE, and a program would inherit that.
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
        """Pass the output on until the command has ended (true) or its deadline has passed (false)."""
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(output, select.POLLIN)
        # No event is asked for: what comes is the hang-up, when the runner has died.
        poll.register(self.verdict.file, 0)
        while events := poll.poll(self.patience()):
            files = [file for file, _ in events]
            if self.verdict.file in files:
                libc.reboot(REBOOT_RESTART)
            if ended in files:
                return True
            if not self.drain(output):
                poll.unregister(output)
        return False

    def patience(self) -> float | None:
        if self.job["deadline"] is None:
            return None
        return max(0, self.job["deadline"] - boottime()) * 1000

    def drain(self, output: int) -> bool:
        """Pass on what is there by now; false at its end."""
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
        """End a command that overstayed, after the kernel and Python's faulthandler have told where it stands."""
        with open("/proc/sysrq-trigger", "w") as trigger:
            trigger.write("w")
        ended = select.poll()
        ended.register(os.pidfd_open(child), select.POLLIN)
        os.killpg(child, SIGABRT)
        if not ended.poll(ABORT_GRACE * 1000):
            os.killpg(child, SIGKILL)


def canary(job: Job) -> float:
    """In warp, by how much a sleep was longer than asked for (seconds); elsewhere 0, for it would cost that time."""
    if not job["warp"]:
        return 0.0
    before = boottime()
    time.sleep(job["canary"])
    return boottime() - before - job["canary"]


def host_interrupts() -> int:
    """How many interrupts the ways to the host have raised: in warp each may have moved the clock."""
    with open("/proc/interrupts") as table:
        rows = [line.split() for line in table if "virtio" in line]
    return sum(int(field) for row in rows for field in row[1:] if field.isdigit())


def look_for_leaks() -> None:
    """Where the kernel has kmemleak, let it search; it tells of finds in the kernel's log, their stacks are results."""
    leaks = "/sys/kernel/debug/kmemleak"
    if os.path.exists(leaks):
        with open(leaks, "w") as trigger:
            trigger.write("scan")
        with open(leaks, "rb") as found, open(f"{RESULTS}/kmemleak.log", "wb") as log:
            log.write(found.read())


def save_kernel_log() -> None:
    size = libc.klogctl(SYSLOG_SIZE_BUFFER, None, 0)
    content = ctypes.create_string_buffer(size)
    length = libc.klogctl(SYSLOG_READ_ALL, content, size)
    with open(f"{RESULTS}/kernel.log", "wb") as log:
        log.write(content.raw[:length])


def send_results(port: Port, folders: list[str]) -> int:
    """Send each file below the folders as a line `SIZE PATH` and its bytes; the number of files.

    PATH begins with the folder's own name; only what lies in /lab/results, the first, stands at the top.
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
