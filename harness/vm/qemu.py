"""Start QEMU as a child that ends with this process, and read the guest's output ports.

Each port is a socket pair; QEMU connects its far end with a virtio port, which init.py writes to. The sockets close
when QEMU ends, for whatever reason, so the runner waits for the sockets only.
"""

from __future__ import annotations

import ast
import os
import selectors
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError, Unavailable
from harness.install.packages import install_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from harness.vm.init import LastRecord, ReadyRecord

QEMU: Final = "qemu-system-x86_64"
QEMU_PACKAGE: Final = "qemu-system-x86"
PORTS: Final = ("output", "results", "verdict")
CHUNK: Final = 1 << 18  # bytes


class Stopped(HarnessError):
    """The caller of `boot` has stopped the guest, by its descriptor `stop`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The machine to emulate. memory: as for QEMU's option -m. kvm: use KVM; else TCG. warp: skip idle time (TCG)."""

    cpus: int
    memory: str
    kvm: bool = False
    warp: bool = False

    def name(self) -> str:
        """Return the accelerator in words, for reports."""
        if self.kvm:
            return "kvm"
        return "tcg, warp" if self.warp else "tcg"

    def arguments(self) -> list[str]:
        """Return QEMU's options for this machine."""
        machine = ["-machine", "pc", "-m", self.memory]
        if self.warp:
            # sleep=off: when the CPU is idle, the clock jumps to the next timer. shift=0: an instruction takes 1 ns. So
            # the guest's clock does not depend on the load of the host.
            return [*machine, "-smp", "1", "-accel", "tcg", "-cpu", EMULATED_CPU, "-icount", "shift=0,sleep=off"]
        if self.kvm:
            return [*machine, "-smp", str(self.cpus), "-accel", "kvm", "-cpu", "host"]
        return [*machine, "-smp", str(self.cpus), "-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU]


# The simplest model is the fastest under TCG. Vector instructions are slow there: to encrypt a packet takes 142 us with
# AVX2, 68 us with SSSE3, 36 us with neither. On a CPU with ERMS the kernel copies by `rep movsb`, which TCG emulates
# byte by byte: then the root is unpacked in 2.5 s, not 1 s. RDRAND seeds the kernel's random generator at once.
EMULATED_CPU: Final = "qemu64,+rdrand"


def find_qemu() -> str:
    """Return the path of QEMU; Unavailable, with the remedy, if it is not installed."""
    program = shutil.which(QEMU)
    if program is None:
        raise Unavailable(f"{QEMU} is not installed: {install_command([QEMU_PACKAGE])}")
    return program


@dataclass(slots=True)
class Received:
    """Everything that the guest has sent so far.

    ready_at, verdict_at: when the record came, by the monotonic clock. files: path below the results -> content. count:
    number of files received.
    """

    ready: ReadyRecord | None = None
    ready_at: float = 0.0
    verdict: LastRecord | None = None
    verdict_at: float = 0.0
    files: dict[str, bytes] = field(default_factory=dict)
    count: int = 0
    _lines: bytes = b""
    _results: bytearray = field(default_factory=bytearray)

    def read_verdict(self, data: bytes, nonce: str) -> None:
        """Parse bytes from the port `verdict`: one record per line; a verdict with another nonce is ignored."""
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            # Only init.py writes here: the driver lets one process open a port (port_fops_open in virtio_console.c).
            record: ReadyRecord | LastRecord = ast.literal_eval(line.decode())
            if record["event"] == "ready":
                self.ready, self.ready_at = record, time.monotonic()
            elif record["event"] == "verdict" and record["nonce"] == nonce:
                self.verdict, self.verdict_at = record, time.monotonic()

    def collect(self, data: bytes) -> None:
        """Parse bytes from the port `results`: for each file a line `SIZE PATH`, then its content."""
        self._results += data
        while (end := self._results.find(b"\n")) >= 0:
            size, _, path = self._results[:end].decode().partition(" ")
            if len(self._results) < end + 1 + int(size):
                return
            self.count += 1
            self.files[path] = bytes(self._results[end + 1 : end + 1 + int(size)])
            del self._results[: end + 1 + int(size)]

    def complete(self) -> bool:
        """Return whether the verdict and all files it announces have been received."""
        return self.verdict is not None and self.count == self.verdict["results"]

    def save(self, folder: Path) -> None:
        """Write the files below `folder`; a path that leads out of it is skipped, because the guest is not trusted."""
        for name, content in self.files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


def command_line(
    hardware: Hardware, *, image: Path, append: str, initrd: str, console: Path, ports: Mapping[str, int]
) -> list[str]:
    """Return QEMU's command line.

    append: the kernel's command line. initrd: path of the root. console: log of the serial console. ports: name ->
    descriptor of a socket. Raises Unavailable without QEMU.
    """
    command = [find_qemu(), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", *hardware.arguments()]
    command += ["-kernel", str(image), "-initrd", initrd, "-append", append]
    command += ["-chardev", f"file,id=console,path={escape(console)}", "-serial", "chardev:console"]
    command += ["-device", "virtio-serial-pci"]
    for name, file in ports.items():
        command += ["-chardev", f"socket,id={name},fd={file}"]
        command += ["-device", f"virtserialport,chardev={name},name=lab.{name}"]
    return command


def escape(path: Path) -> str:
    """Escape a path for use in QEMU's comma-separated options."""
    return str(path).replace(",", ",,")


class Machine:
    """A running QEMU, our ends of its ports, and the data received from them."""

    def __init__(self, process: subprocess.Popen[bytes], ports: Mapping[str, socket.socket], nonce: str) -> None:
        self.process = process
        self.ports = ports
        self.nonce = nonce
        self.received = Received()
        self.started = time.monotonic()

    def watch(self, deadline: float, show: Callable[[bytes], object], stop: int | None = None) -> bool:
        """Read the ports until everything is received or QEMU has ended (True), or the deadline has passed (False).

        deadline: by the monotonic clock. show: called with output of the command. stop: a descriptor; raise Stopped
        when it becomes readable.
        """
        open_ports = set(self.ports)
        with selectors.DefaultSelector() as selector:
            for name, port in self.ports.items():
                selector.register(port, selectors.EVENT_READ, name)
            if stop is not None:
                selector.register(stop, selectors.EVENT_READ)
            while open_ports and not self.received.complete():
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    return False
                for key, _ in events:
                    if key.fd == stop:
                        raise Stopped("the guest was stopped, because its result is not needed any more")
                    data = os.read(key.fd, CHUNK)
                    if not data:
                        selector.unregister(key.fileobj)
                        open_ports.remove(key.data)
                    self._take(key.data, data, show)
        return True

    def _take(self, port: str, data: bytes, show: Callable[[bytes], object]) -> None:
        match port:
            case "output":
                show(data)
            case "results":
                self.received.collect(data)
            case "verdict":
                self.received.read_verdict(data, self.nonce)


@contextmanager
def start(hardware: Hardware, *, image: Path, append: str, initrd: int, console: Path, nonce: str) -> Iterator[Machine]:
    """Run QEMU for the length of the block; initrd: file descriptor of the root; the rest: see `command_line`.

    The kernel kills QEMU when the thread that started it ends, even by SIGKILL (PR_SET_PDEATHSIG, by setpriv(1)). So
    the thread that calls boot() must wait for it. If the runner dies before setpriv has run, the ports close, and the
    guest's PID 1 reboots.
    """
    pairs = {name: socket.socketpair() for name in PORTS}
    files = {name: far_end.fileno() for name, (_, far_end) in pairs.items()}
    command = command_line(
        hardware, image=image, append=append, initrd=f"/proc/self/fd/{initrd}", console=console, ports=files
    )
    try:
        with console.with_name("qemu.log").open("wb") as errors:
            process = subprocess.Popen(
                bound_to_us(command),
                pass_fds=[initrd, *files.values()],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                # In a session of its own QEMU does not get Ctrl-C; it would end before we handle it.
                start_new_session=True,
            )
        for _, far_end in pairs.values():
            far_end.close()
        try:
            yield Machine(process, {name: near_end for name, (near_end, _) in pairs.items()}, nonce)
        finally:
            process.kill()
            process.wait()
    finally:
        for pair in pairs.values():
            for end in pair:
                end.close()


def bound_to_us(command: Sequence[str]) -> list[str]:
    """Return a command line by which `command` is killed when the calling thread ends; Unavailable without setpriv."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise Unavailable(f"setpriv is not installed: {install_command(['util-linux'])}")
    return [setpriv, "--pdeathsig", "KILL", "--", *command]
