"""Boot a guest, run one command in it, bring back its exit status and files.

    python ci/vm.py run [--kernel 6.12] [--warp] -- python -m pytest selftests/ --lane netns

`boot` is the same for programs. A guest is green only if its verdict came over a port of its own and carried the nonce
of this run, before the deadline, and if the kernel's log holds no complaint. Nothing is installed, no privilege used.
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
CANARY_SECONDS: Final = 10.0
MAX_DRIFT: Final = 1.0
# Of the message that all is ready a few come late: up to 12 were seen on a busy machine, and the clock was right.
MAX_INTERRUPTS: Final = 32
KVM_PROBE_DEADLINE: Final = 10.0
KEPT_RUNS: Final = 30
SHOWN_LINES: Final = 15


_ROOTS: Final = threading.Lock()


class Ending(Enum):
    """How a run ended; only after EXITED does the command's own exit status count."""

    EXITED = "the command ended, and the kernel had nothing to complain of"
    OVERDUE = "the command overstayed its deadline"
    COMPLAINED = "the kernel complained"
    PANICKED = "the kernel panicked"
    DRIFTED = "the guest's clock ran off"
    HUNG = "the guest hung"
    LOST = "the guest ended without a verdict"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmResult:
    """All that a run left."""

    ending: Ending
    status: int | None
    """The command's own, negative for a signal; None if nobody knows it."""
    message: str
    """One line that names the reason; empty after EXITED."""
    kernel: str
    """Its release."""
    accelerator: str
    directory: Path
    """Holds console.log, output.log and qemu.log."""
    durations: Mapping[str, float]
    """Seconds by step: `wall ...` on our clock, `guest ...` on the guest's, `cpu ...` computed: the same under load."""
    complaints: tuple[str, ...] = ()

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @property
    def results(self) -> Path:
        """What the command left in /lab/results, and kernel.log."""
        return self.directory / "results"

    def exit_status(self) -> int:
        """For a shell: the command's where it counts, else 1."""
        if self.ending is not Ending.EXITED or self.status is None:
            return 1
        return self.status if self.status >= 0 else 128 - self.status


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRun:
    """What is to run in a guest."""

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
        """As the guest gets it: its own deadline comes a little sooner, so that it can tell what it was waiting for."""
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
    folder: Path = image.PROJECT,
    accelerator: str = "auto",
    directory: Path | None = None,
    show: Callable[[bytes], object] = lambda _: None,
    stop: int | None = None,
    modules: Sequence[str] = (),
) -> VmResult:
    """Run `command` under `kernel` (kernels.find: a name, a version, a path) and wait for its end.

    warp: one CPU, and a clock that skips idle time; what the command prints comes when it has ended.
    deadline: seconds from the start of QEMU; the guest ends the command a little earlier, with stacks in its log.
    debug: the WireGuard module logs what it does (dynamic debug); read it in results/kernel.log.
    files: (path here, path in the guest), folders with all that is in them; the project is there anyway.
    collect: folders of the guest to bring back, as results/NAME, beside what the command leaves in $LAB_RESULTS.
    folder: where the command starts.
    accelerator: `auto`, `kvm` or `tcg`.
    show: takes what the command prints, as it comes; output.log has it too.
    modules: of the kernel, to be loaded beside those of kernels.toml.
    stop: a descriptor; when it becomes readable, the guest is ended and Stopped raised.

    UsageError: there is no such kernel. Unavailable: something must be installed first.
    """
    begun = time.monotonic()
    chosen = find(kernel)
    wanted = GuestRun(
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
    if not warp and (accelerator == "kvm" or (accelerator == "auto" and kvm_works(chosen, hardware))):
        hardware = replace(hardware, kvm=True)
    return run(wanted, chosen, hardware, begun=begun, directory=directory or new_directory(), show=show, stop=stop)


def find(kernel: str) -> Kernel:
    """The kernel and all else that a boot needs, fetched and built if it is not there: what takes a network."""
    qemu.find_qemu()
    cache = cache_root()
    chosen = kernels.find(kernel, cache)
    image.base(cache / "vm")
    modules.archive(chosen, cache / "vm")
    return chosen


def require_in_guest(folder: Path) -> None:
    """Raise UsageError if a guest would not have this folder, because it lies outside the checkout."""
    if not folder.is_relative_to(image.PROJECT):
        raise UsageError(f"lanes vm and warp need a checkout of wg-interop, which {folder} is not; go to one")


def run(
    wanted: GuestRun,
    kernel: Kernel,
    hardware: Hardware,
    *,
    begun: float,
    directory: Path,
    show: Callable[[bytes], object],
    stop: int | None = None,
) -> VmResult:
    """Boot, watch, judge. begun: when the caller was asked, by the monotonic clock."""
    console = directory / "console.log"
    with (
        root(wanted.job(hardware), wanted.files, kernel, wanted.modules) as initrd,
        (directory / "output.log").open("wb") as output,
    ):

        def both(data: bytes) -> None:
            output.write(data)
            show(data)

        image_done, cpu = time.monotonic(), cpu_of_children()
        append = kernel_arguments(debug=wanted.debug)
        with qemu.start(
            hardware, image=kernel.image, append=append, initrd=initrd, console=console, nonce=wanted.nonce
        ) as machine:
            in_time = machine.watch(machine.started + wanted.deadline, both, stop)
    received = machine.received
    received.save(directory / "results")
    log = read_log(console) + "\n" + received.files.get("kernel.log", b"").decode(errors="replace")
    found = tuple(kernel_log.complaints(log, kernel_log.load_noise(NOISE_TABLE)))
    ending, message = ending_of(received, found, in_time=in_time, warp=hardware.warp)
    if ending in {Ending.HUNG, Ending.OVERDUE}:
        message += f" (deadline: {wanted.deadline:g} s)"
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
        complaints=found,
    )


def ending_of(received: Received, found: Sequence[str], *, in_time: bool, warp: bool) -> tuple[Ending, str]:
    """What a run comes to, and the line that says why; the worst reason wins."""
    panic = next((line for line in found if kernel_log.PANIC in line), None)
    if panic:
        return Ending.PANICKED, f"{Ending.PANICKED.value}: {panic}"
    if received.verdict is None or not received.complete():
        ending = Ending.LOST if in_time else Ending.HUNG
        stage = "before it ran the command" if received.ready is None else "after it had started the command"
        return ending, "; ".join((f"{ending.value}, {stage}", *found[:1]))
    if received.verdict["status"] is None:
        return Ending.OVERDUE, Ending.OVERDUE.value
    if found:
        return Ending.COMPLAINED, f"{Ending.COMPLAINED.value} {len(found)} times, first: {found[0]}"
    drift, interrupts = max(received.verdict["drifts"], key=abs), received.verdict["interrupts"]
    if warp and (abs(drift) > MAX_DRIFT or interrupts > MAX_INTERRUPTS):
        return Ending.DRIFTED, f"{Ending.DRIFTED.value}: by {drift:+.3f} s, {interrupts} interrupts from the host"
    return Ending.EXITED, ""


def durations(
    received: Received, log: str, *, begun: float, started: float, cpu: float, warp: bool
) -> dict[str, float]:
    """Where the time went, as far as the run came."""
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
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def root(
    job: Job, files: Sequence[tuple[Path, str]], kernel: Kernel, more_modules: Sequence[str] = ()
) -> Iterator[int]:
    """The guest's root as one archive in memory, so that no killed runner leaves it behind: a file descriptor."""
    cache = cache_root()
    memory = os.memfd_create("guest-root")
    try:
        # Guests may start side by side; what the first has compiled for its root, the next finds.
        with _ROOTS, os.fdopen(os.dup(memory), "wb") as out:
            parts = [image.base(cache / "vm"), modules.archive(kernel, cache / "vm", more_modules)]
            for part in parts:
                with part.open("rb") as content:
                    shutil.copyfileobj(content, out, 1 << 20)
            with Archive(out) as archive:
                archive.directory(job["environment"]["HOME"], permissions=0o700)
                tests = any("pytest" in word for word in job["command"])
                image.write_project(archive, files, cache / "vm", tests=tests)
                archive.file("lab/init.pyc", bytecode.program(image.HERE / "init.py"))
                archive.file("lab/job", marshal.dumps(dict(job)), permissions=0o600)
        yield memory
    finally:
        os.close(memory)


def kernel_arguments(*, debug: bool) -> str:
    arguments = [
        "console=ttyS0",
        # Warnings and worse, for each line costs; the whole log comes with the results.
        "loglevel=5",
        "printk.devkmsg=on",
        f"log_buf_len={'16M' if debug else '2M'}",
        # With -no-reboot a panic ends QEMU at once.
        "panic=-1",
        "oops=panic",
        "softlockup_panic=1",
        "sysctl.kernel.hung_task_panic=1",
        "sysctl.kernel.hung_task_timeout_secs=60",
        # A busy machine may not run a virtual CPU for many seconds: no fault of the kernel's.
        "watchdog_thresh=60",
        "rcupdate.rcu_cpu_stall_timeout=120",
        # Return trampolines and self-tests of ciphers cost a second under emulation and tell nothing here.
        "mitigations=off",
        "cryptomgr.notests",
        "random.trust_cpu=on",
        "nokaslr",
        # Making and deleting interfaces and namespaces waits for RCU: a third less under emulation.
        "rcupdate.rcu_expedited=1",
        # Without its usual limit on the rate, or lines would be missing.
        *(["wireguard.dyndbg=+p", "sysctl.net.core.message_cost=0"] if debug else []),
        f"rdinit={os.path.realpath(sys.executable)}",
        "--",
        "-IS",
        "/lab/init.pyc",
    ]
    return " ".join(arguments)


def guest_environment() -> dict[str, str]:
    return {
        "PATH": f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        # The cache lies below it, and with it the programs under test.
        "HOME": str(Path.home()),
        **{name: value for name in ("XDG_CACHE_HOME",) if (value := os.environ.get(name))},
        "LANG": "C.UTF-8",
        "LAB_RESULTS": RESULTS_IN_GUEST,
    }


def kvm_works(kernel: Kernel, hardware: Hardware) -> bool:
    """Whether a guest came up under KVM on this boot of this machine; /dev/kvm alone proves nothing in a VM."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    program = Path(qemu.find_qemu()).stat()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    key = hashlib.sha256(f"{kernel.identity()} {program.st_size} {program.st_mtime_ns} {boot_id}".encode()).hexdigest()
    note = cache_root() / "vm" / "kvm" / key[:24]
    if not note.exists():
        kvm = replace(hardware, kvm=True)
        wanted = GuestRun(command=("true",), deadline=KVM_PROBE_DEADLINE)
        result = run(wanted, kernel, kvm, begun=time.monotonic(), directory=new_directory(), show=lambda _: None)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{result.ending.name} {result.message}\n")
    return note.read_text().startswith(Ending.EXITED.name)


def new_directory() -> Path:
    """A fresh directory for a run's logs; of the older ones the last few are kept."""
    runs = cache_root() / "vm" / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for old in sorted(runs.iterdir())[: -KEPT_RUNS + 1]:
        shutil.rmtree(old, ignore_errors=True)
    directory = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(2)}"
    directory.mkdir()
    return directory


def read_log(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def explain(result: VmResult) -> str:
    """For a person: why the run is red, and where to look."""
    lines = [f"vm: {result.message}", f"vm: console log: {result.console}"]
    lines += [f"vm: complaint: {line}" for line in result.complaints]
    lines += [f"  | {line}" for line in kernel_log.excerpt(read_log(result.console), result.complaints, SHOWN_LINES)]
    return "\n".join(lines)
