"""Start QEMU as a child that cannot outlive us, and read the ports the guest writes to.

Each port is a socket pair whose far end QEMU holds as a virtio port (init.py reads and writes it). They close when QEMU
ends, however it ends, so the runner waits for nothing else.
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from harness.vm.init import LastRecord, ReadyRecord

QEMU: Final = "qemu-system-x86_64"
QEMU_REMEDY: Final = "apt-get install --no-install-recommends qemu-system-x86"
PORTS: Final = ("output", "results", "verdict")
CHUNK: Final = 1 << 18


class Stopped(HarnessError):
    """Whoever asked for the guest wants it no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The machine to emulate."""

    cpus: int
    memory: str
    kvm: bool = False
    warp: bool = False

    def name(self) -> str:
        if self.kvm:
            return "kvm"
        return "tcg, warp" if self.warp else "tcg"

    def arguments(self) -> list[str]:
        machine = ["-machine", "pc", "-m", self.memory]
        if self.warp:
            # With `sleep=off` the clock jumps to the next timer as soon as the one CPU idles, and with `shift=0` an
            # instruction takes 1 ns, so that the guest's clock does not depend on how busy this machine is.
            return [*machine, "-smp", "1", "-accel", "tcg", "-cpu", EMULATED_CPU, "-icount", "shift=0,sleep=off"]
        if self.kvm:
            return [*machine, "-smp", str(self.cpus), "-accel", "kvm", "-cpu", "host"]
        return [*machine, "-smp", str(self.cpus), "-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU]


# A plain model is the fastest. Vector instructions are dear under TCG: with AVX2 sealing a packet takes 142 us, with
# SSSE3 68, without either 36. And where a CPU has ERMS the kernel copies by `rep movsb`, which TCG does byte by byte:
# unpacking the root then takes 2.5 s, not 1. RDRAND seeds the kernel's generator at once.
EMULATED_CPU: Final = "qemu64,+rdrand"


def find_qemu() -> str:
    program = shutil.which(QEMU)
    if program is None:
        raise Unavailable(f"no {QEMU} here; install it: {QEMU_REMEDY}")
    return program


@dataclass(slots=True)
class Received:
    """What the guest has told so far."""

    ready: ReadyRecord | None = None
    ready_at: float = 0.0
    verdict: LastRecord | None = None
    verdict_at: float = 0.0
    files: dict[str, bytes] = field(default_factory=dict)
    count: int = 0
    _lines: bytes = b""
    _results: bytearray = field(default_factory=bytearray)

    def hear(self, data: bytes, nonce: str) -> None:
        """Take bytes of the port `verdict`: one record a line, and a verdict only counts with our nonce in it."""
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            # init.py alone writes here: the driver gives a port to one process (virtio_console.c, port_fops_open).
            record: ReadyRecord | LastRecord = ast.literal_eval(line.decode())
            if record["event"] == "ready":
                self.ready, self.ready_at = record, time.monotonic()
            elif record["event"] == "verdict" and record["nonce"] == nonce:
                self.verdict, self.verdict_at = record, time.monotonic()

    def collect(self, data: bytes) -> None:
        """Take bytes of the port `results`: for each file a line `SIZE PATH`, then its content."""
        self._results += data
        while (end := self._results.find(b"\n")) >= 0:
            size, _, path = self._results[:end].decode().partition(" ")
            if len(self._results) < end + 1 + int(size):
                return
            self.count += 1
            self.files[path] = bytes(self._results[end + 1 : end + 1 + int(size)])
            del self._results[: end + 1 + int(size)]

    def complete(self) -> bool:
        return self.verdict is not None and self.count == self.verdict["results"]

    def save(self, folder: Path) -> None:
        """Write the files below `folder`; a path that leads out of it is the guest's mischief and left out."""
        for name, content in self.files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


def command_line(
    hardware: Hardware, *, image: Path, append: str, initrd: str, console: Path, ports: Mapping[str, int]
) -> list[str]:
    command = [find_qemu(), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", *hardware.arguments()]
    command += ["-kernel", str(image), "-initrd", initrd, "-append", append]
    command += ["-chardev", f"file,id=console,path={escape(console)}", "-serial", "chardev:console"]
    command += ["-device", "virtio-serial-pci"]
    for name, file in ports.items():
        command += ["-chardev", f"socket,id={name},fd={file}"]
        command += ["-device", f"virtserialport,chardev={name},name=lab.{name}"]
    return command


def escape(path: Path) -> str:
    """A path as a value among QEMU's comma-separated options."""
    return str(path).replace(",", ",,")


class Machine:
    """A running QEMU, our ends of its ports, and what came over them."""

    def __init__(self, process: subprocess.Popen[bytes], ports: Mapping[str, socket.socket], nonce: str) -> None:
        self.process = process
        self.ports = ports
        self.nonce = nonce
        self.received = Received()
        self.started = time.monotonic()

    def watch(self, deadline: float, show: Callable[[bytes], object], stop: int | None = None) -> bool:
        """Listen until all is told (true), QEMU has ended (true), or `deadline` of the monotonic clock (false).

        Raises Stopped when the descriptor `stop` becomes readable.
        """
        left = set(self.ports)
        with selectors.DefaultSelector() as selector:
            for name, port in self.ports.items():
                selector.register(port, selectors.EVENT_READ, name)
            if stop is not None:
                selector.register(stop, selectors.EVENT_READ)
            while left and not self.received.complete():
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    return False
                for key, _ in events:
                    if key.fd == stop:
                        raise Stopped("the guest was given up")
                    data = os.read(key.fd, CHUNK)
                    if not data:
                        selector.unregister(key.fileobj)
                        left.remove(key.data)
                    self._take(key.data, data, show)
        return True

    def _take(self, port: str, data: bytes, show: Callable[[bytes], object]) -> None:
        match port:
            case "output":
                show(data)
            case "results":
                self.received.collect(data)
            case "verdict":
                self.received.hear(data, self.nonce)


@contextmanager
def start(hardware: Hardware, *, image: Path, append: str, initrd: int, console: Path, nonce: str) -> Iterator[Machine]:
    """QEMU for the length of the block; `initrd` is a file descriptor.

    It dies with the thread that started it, even by SIGKILL (`setpriv --pdeathsig`; that is why boot() must be called
    where it may block). Should the runner die before that is in force, PID 1 of the guest sees its ports closed.
    """
    pairs = {name: socket.socketpair() for name in PORTS}
    files = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
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
                # Ctrl-C is ours to handle: QEMU would end in its own way, and first.
                start_new_session=True,
            )
        for _, theirs in pairs.values():
            theirs.close()
        try:
            yield Machine(process, {name: ours for name, (ours, _) in pairs.items()}, nonce)
        finally:
            process.kill()
            process.wait()
    finally:
        for pair in pairs.values():
            for end in pair:
                end.close()


def bound_to_us(command: Sequence[str]) -> list[str]:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise Unavailable("no setpriv here; install it: apt-get install util-linux")
    return [setpriv, "--pdeathsig", "KILL", "--", *command]
