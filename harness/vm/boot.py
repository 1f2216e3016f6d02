"""Boot a guest, run one command in it, bring back its exit status and files.

    python ci/vm.py run [--kernel 6.12] [--warp] -- python -m pytest selftests/ --lane netns

`boot` does the same from Python. A run has EXITED only if the guest sent its verdict in time, over a port that nothing
else uses and with the nonce of this run, and if the kernel log contains no complaint. Nothing is installed on the host,
and no privilege is needed.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import re
import resource
import secrets
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import suite
from harness.errors import UsageError
from harness.install.cache import cache_root
from harness.vm import bytecode, image, kernel_log, kernels, modules, qemu
from harness.vm.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from harness.vm.init import Job
    from harness.vm.kernels import Kernel
    from harness.vm.qemu import Hardware, Received

NOISE_TABLE: Final = image.HERE / "kernels.toml"
RESULTS_IN_GUEST: Final = "/lab/results"
DEFAULT_DEADLINE: Final = 300.0
# Seconds: how long the canary sleeps in lane warp, and by how much that may be too long.
CANARY_SECONDS: Final = 10.0
MAX_DRIFT: Final = 1.0
# Virtio interrupts of the `ready` record may fall into the measurement: up to 12 seen on a loaded host, without drift.
MAX_INTERRUPTS: Final = 32
KVM_PROBE_DEADLINE: Final = 10.0  # seconds
KEPT_RUNS: Final = 30
# Words of a command that runs tests: pytest rewrites them here, which takes long under emulation.
RUN_TESTS: Final = ("pytest", "harness.vm.reload")
SHOWN_LINES: Final = 15  # of the console, after a failed run


# Held while a guest's root is built: several threads may start guests at the same time.
_ROOTS: Final = threading.Lock()


class Ending(Enum):
    """How a run ended. The exit status of the command counts only after EXITED."""

    EXITED = "the command ended, and the kernel log contains no complaint"
    OVERDUE = "the command exceeded its deadline"
    COMPLAINED = "the kernel log contains complaints"
    PANICKED = "the kernel panicked"
    DRIFTED = "the guest's clock drifted"
    HUNG = "the guest hung"
    LOST = "the guest ended without a verdict"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmResult:
    """Result of a run."""

    ending: Ending
    status: int | None
    """Exit status of the command, negative for a signal; None if it did not end in time or its guest sent none."""
    message: str
    """One line with the reason; empty after EXITED."""
    kernel: str
    """Release, as `uname -r` prints it."""
    accelerator: str
    directory: Path
    """The folder with console.log, output.log and qemu.log."""
    durations: Mapping[str, float]
    """Seconds per step: `wall ...` on our clock, `guest ...` on the guest's; `cpu ...`: CPU time, which does
    not depend on the load."""
    complaints: tuple[str, ...] = ()
    """Lines of the kernel log that report a fault."""

    @property
    def console(self) -> Path:
        """The log of the guest's serial console."""
        return self.directory / "console.log"

    @property
    def results(self) -> Path:
        """The folder with the files that the command left in /lab/results, and kernel.log."""
        return self.directory / "results"

    def exit_status(self) -> int:
        """Return the status for a shell: that of the command after EXITED (128 + N for signal N), else 1."""
        if self.ending is not Ending.EXITED or self.status is None:
            return 1
        return self.status if self.status >= 0 else 128 - self.status


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRun:
    """The job of a guest; the fields are the arguments of `boot`. nonce: proves that a verdict is of this run."""

    command: tuple[str, ...]
    deadline: float
    folder: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=dict)
    files: tuple[tuple[Path, str], ...] = ()
    collect: tuple[str, ...] = ()
    debug: bool = False
    modules: tuple[str, ...] = ()
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))

    def job(self, hardware: Hardware) -> Job:
        """Return the job for the guest's init.

        Its deadline is up to 10 s shorter than ours, so that the guest can still log where the command hangs. In warp
        it has none: the guest's clock runs too fast.
        """
        return {
            "command": list(self.command),
            "folder": str(self.folder),
            "environment": {**guest_environment(), **self.environment},
            "nonce": self.nonce,
            "deadline": None if hardware.warp else self.deadline - min(10.0, self.deadline / 4),
            "warp": hardware.warp,
            "canary": CANARY_SECONDS,
            "collect": [RESULTS_IN_GUEST, *self.collect],
            "module_parameters": {"wireguard": "dyndbg=+p"} if self.debug else {},
            "linger": 10.0,
        }


def boot(
    kernel: str,
    command: Sequence[str],
    *,
    warp: bool = False,
    cpus: int = 2,
    memory: str = "2G",
    deadline: float = DEFAULT_DEADLINE,
    debug: bool = False,
    files: Sequence[tuple[Path, str]] = (),
    collect: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    accelerator: str = "auto",
    directory: Path | None = None,
    show: Callable[[bytes], object] = lambda _: None,
    stop: int | None = None,
    modules: Sequence[str] = (),
    replaced: Sequence[Path] = (),
) -> VmResult:
    """Run `command` under `kernel` (kernels.find: a name, a version, a path) and wait for its end.

    warp: use one CPU and a clock that skips idle time; the command's output comes only when it has ended.
    deadline: seconds from the start of QEMU; the guest stops the command a little earlier, with stacks in its log.
    debug: turn on dynamic debug of the WireGuard module; read it in results/kernel.log.
    files: (path here, path in the guest) of files and folders to copy; packages and suite are always in the guest.
    collect: folders of the guest to bring back, as results/NAME; the files in $LAB_RESULTS always come back.
    environment: variables for the command, besides those of `guest_environment`.
    folder: the command's working directory; None: the directory with the suite.
    accelerator: `auto`, `kvm` or `tcg`.
    directory: an empty folder for logs and results; None: a new one in the cache.
    show: called with each part of the command's output as it comes; output.log has it too.
    modules: of the kernel, to load besides those of kernels.toml.
    replaced: files of modules to load instead of the kernel's own ones, for example a wireguard.ko.
    stop: a descriptor; when it becomes readable, the guest is killed and Stopped raised.

    Raises UsageError if there is no such kernel, Unavailable if something must be installed first.
    """
    begun = time.monotonic()
    guest_kernel = find(kernel, replaced)
    folder = folder or suite.root()
    guest_run = GuestRun(
        command=tuple(command),
        folder=folder,
        environment=environment or {},
        files=tuple(files),
        collect=tuple(str(folder / path) for path in collect),
        deadline=deadline,
        debug=debug,
        modules=tuple(modules),
    )
    hardware = qemu.Hardware(cpus=cpus, memory=memory, warp=warp)
    if not warp and (accelerator == "kvm" or (accelerator == "auto" and kvm_works(guest_kernel, hardware))):
        hardware = replace(hardware, kvm=True)
    logs = directory or new_directory()
    return run(guest_run, guest_kernel, hardware, begun=begun, directory=logs, show=show, stop=stop)


def find(kernel: str, replaced: Sequence[Path] = ()) -> Kernel:
    """Find a kernel, and fetch and build all that a boot needs: the part that may need a network.

    kernel: see kernels.find. replaced: see `boot`. Raises UsageError if there is no such kernel, or if a module is not
    one of this kernel, Unavailable if a program is missing.
    """
    qemu.find_qemu()
    cache = cache_root()
    guest_kernel = replace(kernels.find(kernel, cache), replaced=tuple(path.absolute() for path in replaced))
    image.base(cache / "vm")
    modules.archive(guest_kernel, cache / "vm")
    return guest_kernel


def require_in_guest(folder: Path) -> None:
    """Raise UsageError for a root directory other than the suite's, which a guest does not have."""
    if not folder.is_relative_to(suite.root()):
        raise UsageError(
            f"lanes vm and warp run tests of the suite, below {suite.root()}, and pytest's root directory is {folder}; "
            "name tests of the suite, or choose lane netns"
        )


def run(
    guest_run: GuestRun,
    kernel: Kernel,
    hardware: Hardware,
    *,
    begun: float,
    directory: Path,
    show: Callable[[bytes], object],
    stop: int | None = None,
) -> VmResult:
    """Boot a guest, wait for its end, and decide how it ended.

    begun: start of the whole call, by the monotonic clock. directory, show, stop: see `boot`. Raises Stopped.
    """
    console = directory / "console.log"
    with (
        root(guest_run.job(hardware), guest_run.files, kernel, guest_run.modules) as initrd,
        (directory / "output.log").open("wb") as output,
    ):

        def log_and_show(data: bytes) -> None:
            output.write(data)
            show(data)

        image_done, cpu = time.monotonic(), cpu_of_children()
        append = kernel_arguments(debug=guest_run.debug)
        with qemu.start(
            hardware, image=kernel.image, append=append, initrd=initrd, console=console, nonce=guest_run.nonce
        ) as machine:
            in_time = machine.watch(machine.started + guest_run.deadline, log_and_show, stop)
    received = machine.received
    received.save(directory / "results")
    log = read_log(console) + "\n" + received.files.get("kernel.log", b"").decode(errors="replace")
    complaints = tuple(kernel_log.complaints(log, kernel_log.load_noise(NOISE_TABLE)))
    ending, message = ending_of(received, complaints, in_time=in_time, warp=hardware.warp)
    if complaints and (test := kernel_log.running_test(log, complaints[0])):
        message += f"; it came while {test} ran"
    if ending in {Ending.HUNG, Ending.OVERDUE}:
        message += f" (deadline: {guest_run.deadline:g} s)"
    if ending is Ending.LOST and received.ready is None:
        message += "".join(f"; {line}" for line in kernel_log.excerpt(read_log(directory / "qemu.log"), (), 1))
    return VmResult(
        ending=ending,
        status=received.verdict["status"] if received.verdict else None,
        message=message,
        kernel=kernel.release,
        accelerator=hardware.name(),
        directory=directory,
        durations=durations(received, log, begun=begun, started=image_done, cpu=cpu, warp=hardware.warp),
        complaints=complaints,
    )


def ending_of(received: Received, complaints: Sequence[str], *, in_time: bool, warp: bool) -> tuple[Ending, str]:
    """Decide how a run ended, and return the reason in one line, empty for EXITED; the worst reason wins.

    in_time: the guest sent all or ended before the deadline.
    """
    panic = next((line for line in complaints if kernel_log.PANIC in line), None)
    if panic:
        return Ending.PANICKED, f"{Ending.PANICKED.value}: {panic}"
    if received.verdict is None or not received.complete():
        ending = Ending.LOST if in_time else Ending.HUNG
        stage = "before it ran the command" if received.ready is None else "after it had started the command"
        return ending, "; ".join((f"{ending.value}, {stage}", *complaints[:1]))
    if received.verdict["status"] is None:
        return Ending.OVERDUE, Ending.OVERDUE.value
    if complaints:
        return Ending.COMPLAINED, f"{Ending.COMPLAINED.value} ({len(complaints)}), first: {complaints[0]}"
    drift, interrupts = max(received.verdict["drifts"], key=abs), received.verdict["interrupts"]
    if warp and (abs(drift) > MAX_DRIFT or interrupts > MAX_INTERRUPTS):
        return Ending.DRIFTED, f"{Ending.DRIFTED.value}: by {drift:+.3f} s, {interrupts} interrupts from the host"
    return Ending.EXITED, ""


def durations(
    received: Received, log: str, *, begun: float, started: float, cpu: float, warp: bool
) -> dict[str, float]:
    """Return the seconds per step (VmResult.durations) of the steps that the run reached.

    begun: see `run`. started: when QEMU started. cpu: `cpu_of_children` at that time.
    """
    steps = {"wall image": started - begun}
    if received.ready:
        steps["wall boot"] = received.ready_at - started
    if received.verdict:
        steps["wall command"] = received.verdict_at - received.ready_at
        marks = received.verdict["marks"]
        init = re.search(r"\[ *([\d.]+)\](?: *\[ *T\d+\])? Run \S+ as init process", log)
        kernel = float(init[1]) if init else marks["init"]
        if not warp:
            steps["wall firmware"] = max(0.0, steps["wall boot"] - marks["modules"])
        steps["guest kernel"] = kernel
        steps["guest python"] = marks["init"] - kernel
        steps["guest modules"] = marks["modules"] - marks["init"]
        steps["guest command"] = marks["command"] - marks["ready"]
    steps["wall total"] = time.monotonic() - begun
    steps["cpu QEMU"] = cpu_of_children() - cpu
    return steps


def cpu_of_children() -> float:
    """Return the CPU seconds of all children of this process that have ended so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def root(
    job: Job, files: Sequence[tuple[Path, str]], kernel: Kernel, more_modules: Sequence[str] = ()
) -> Iterator[int]:
    """Build the guest's root, an initramfs, in memory; the context is its file descriptor.

    A memfd, not a file: nothing is left behind if the runner is killed. more_modules: see `boot`.
    """
    cache = cache_root()
    memory = os.memfd_create("guest-root")
    try:
        # Guests may start at the same time. The first one compiles, the next ones find the compiled files.
        with _ROOTS, os.fdopen(os.dup(memory), "wb") as out:
            parts = [image.base(cache / "vm"), modules.archive(kernel, cache / "vm", more_modules)]
            for part in parts:
                with part.open("rb") as content:
                    shutil.copyfileobj(content, out, 1 << 20)
            with Archive(out) as archive:
                archive.directory(job["environment"]["HOME"], permissions=0o700)
                tests = any(name in word for name in RUN_TESTS for word in job["command"])
                image.write_project(archive, files, cache / "vm", tests=tests)
                archive.file("lab/init.pyc", bytecode.program(image.HERE / "init.py"))
                archive.file("lab/job", marshal.dumps(dict(job)), permissions=0o600)
        yield memory
    finally:
        os.close(memory)


def kernel_arguments(*, debug: bool) -> str:
    """Return the kernel's command line: log, checks and speed; then Python as init, with init.py's compiled form.

    debug: the WireGuard module logs what it does. Source: Documentation/admin-guide/kernel-parameters.txt.
    """
    arguments = [
        "console=ttyS0",
        # Only warnings and worse, because each line takes time on the serial port; kernel.log has all.
        "loglevel=5",
        "printk.devkmsg=on",
        f"log_buf_len={'16M' if debug else '2M'}",
        # With -no-reboot a panic ends QEMU at once.
        "panic=-1",
        "oops=panic",
        "softlockup_panic=1",
        "sysctl.kernel.hung_task_panic=1",
        "sysctl.kernel.hung_task_timeout_secs=60",
        # A loaded host may not run a virtual CPU for many seconds; that is not a fault of the guest's kernel.
        "watchdog_thresh=60",
        "rcupdate.rcu_cpu_stall_timeout=120",
        # Return trampolines and self-tests of ciphers take a second under emulation, and no test needs them.
        "mitigations=off",
        "cryptomgr.notests",
        "random.trust_cpu=on",
        "nokaslr",
        # Creating and deleting interfaces and namespaces waits for RCU; expedited it takes a third less time under TCG.
        "rcupdate.rcu_expedited=1",
        # message_cost=0: the driver's lines are not rate-limited (net_ratelimit), so none is missing.
        *(["wireguard.dyndbg=+p", "sysctl.net.core.message_cost=0"] if debug else []),
        f"rdinit={os.path.realpath(sys.executable)}",
        "--",
        "-IS",
        "/lab/init.pyc",
    ]
    return " ".join(arguments)


def guest_environment() -> dict[str, str]:
    """Return the environment variables that every command in a guest has."""
    return {
        "PATH": f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        # The cache with the programs under test is below HOME or XDG_CACHE_HOME, and PYTHONPATH may name the checkout,
        # in the guest as here.
        "HOME": str(Path.home()),
        **{name: value for name in ("XDG_CACHE_HOME", "PYTHONPATH", suite.SUITE) if (value := os.environ.get(name))},
        "LANG": "C.UTF-8",
        "LAB_RESULTS": RESULTS_IN_GUEST,
    }


def kvm_works(kernel: Kernel, hardware: Hardware) -> bool:
    """Return whether a guest boots under KVM: boot one, and remember the result until this machine reboots.

    In a virtual machine KVM may not work although /dev/kvm can be opened.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    program = Path(qemu.find_qemu()).stat()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    key = hashlib.sha256(f"{kernel.identity()} {program.st_size} {program.st_mtime_ns} {boot_id}".encode()).hexdigest()
    probe_result = cache_root() / "vm" / "kvm" / key[:24]
    if not probe_result.exists():
        kvm = replace(hardware, kvm=True)
        probe = GuestRun(command=("true",), deadline=KVM_PROBE_DEADLINE)
        result = run(probe, kernel, kvm, begun=time.monotonic(), directory=new_directory(), show=lambda _: None)
        probe_result.parent.mkdir(parents=True, exist_ok=True)
        probe_result.write_text(f"{result.ending.name} {result.message}\n")
    return probe_result.read_text().startswith(Ending.EXITED.name)


def new_directory() -> Path:
    """Create an empty directory in the cache for a run's logs, and delete all but the newest KEPT_RUNS."""
    runs = cache_root() / "vm" / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for old in sorted(runs.iterdir())[: -KEPT_RUNS + 1]:
        shutil.rmtree(old, ignore_errors=True)
    directory = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(2)}"
    directory.mkdir()
    return directory


def read_log(path: Path) -> str:
    """Return a log's text; empty if there is no such file."""
    return path.read_text(errors="replace") if path.exists() else ""


def explain(result: VmResult) -> str:
    """Return lines for the user: why the run failed, the path of the console log, and its part that matters."""
    lines = [f"vm: {result.message}", f"vm: console log: {result.console}"]
    lines += [f"vm: complaint: {line}" for line in result.complaints]
    lines += [f"  | {line}" for line in kernel_log.excerpt(read_log(result.console), result.complaints, SHOWN_LINES)]
    return "\n".join(lines)
