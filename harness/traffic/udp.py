"""Send numbered UDP datagrams, and report which arrive, in which order and how often.

Nothing here waits by the clock: the caller decides when to send, and names how many datagrams to wait for.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from harness import steps
from harness.errors import UsageError
from harness.net.netns import enlarge_receive_buffer
from harness.wait import wait_for

if TYPE_CHECKING:
    from harness.net.netns import NetNS

_BUFFER: Final = 16 << 20
_NUMBER: Final = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Datagrams of a stream that have arrived.

    sent: how many were sent. numbers: of the intact ones, in order of arrival, 0 first sent. broken: how many arrived
    changed.
    """

    sent: int
    numbers: tuple[int, ...]
    broken: int

    @property
    def distinct(self) -> int:
        """The number of different datagrams that arrived intact."""
        return len(set(self.numbers))

    @property
    def lost(self) -> int:
        """The number of datagrams that have not arrived intact so far; one that arrived broken is lost too."""
        return self.sent - self.distinct

    @property
    def duplicated(self) -> int:
        """The number of arrivals that were copies of a datagram that had arrived before."""
        return len(self.numbers) - self.distinct

    @property
    def reordered(self) -> int:
        """The number of datagrams that arrived after one that was sent later."""
        latest, count = -1, 0
        for number in self.numbers:
            count += number < latest
            latest = max(latest, number)
        return count

    def __str__(self) -> str:
        return (
            f"{self.distinct} of {self.sent} datagrams arrived; {self.lost} lost, {self.duplicated} duplicated, "
            f"{self.reordered} reordered, {self.broken} broken"
        )

    def __repr__(self) -> str:
        return f"Arrivals({self})"


class UdpStream:
    """Numbered UDP datagrams of one size, from one node to an address of another; a context manager.

    Each datagram carries its number and bytes computed from it, so that a changed one is recognized.
    """

    def __init__(self, sender: NetNS, receiver: NetNS, address: str, *, size: int = 256) -> None:
        """Open both sockets. address: of the receiver. size: bytes of UDP payload; UsageError if too few."""
        if size < _NUMBER.size:
            raise UsageError(f"udp stream: datagrams of {size} bytes are too small; want at least {_NUMBER.size} bytes")
        self._size = size
        self._sent = 0
        self._broken = 0
        self._numbers: list[int] = []
        with ExitStack() as stack:
            self._receiver = stack.enter_context(udp_receiver(receiver, address, 0))
            enlarge_receive_buffer(self._receiver, _BUFFER)
            self._receiver.setblocking(False)
            self._sender = stack.enter_context(sender.socket(self._receiver.family, socket.SOCK_DGRAM))
            self._sender.connect((address, self._receiver.getsockname()[1]))
            self._close = stack.pop_all().close
        self._node = sender.name
        self._target = f"{receiver.name} {address} port {self._receiver.getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with steps.step(self._node, f"end the UDP stream to {self._target}") as ending:
            ending.outcome = str(self.arrivals())
            self._close()

    def send(self, count: int = 1) -> None:
        """Send `count` more datagrams, without a pause between them."""
        with steps.step(self._node, f"send {count} UDP datagrams of {self._size} bytes to {self._target}"):
            for number in range(self._sent, self._sent + count):
                self._sender.send(self._datagram(number))
                self._sent += 1

    def arrivals(self) -> Arrivals:
        """Return what has arrived so far, without waiting."""
        self._drain()
        return Arrivals(self._sent, tuple(self._numbers), self._broken)

    def wait_for(self, distinct: int, deadline: float = 5.0) -> Arrivals:
        """Wait until `distinct` different datagrams have arrived; DeadlineExceeded lists what has arrived.

        deadline: seconds, scaled.
        """
        return wait_for(_Enough(self, distinct), deadline, f"{distinct} of {self._sent} datagrams to arrive")

    def fileno(self) -> int:
        """Return the receiving socket."""
        return self._receiver.fileno()

    def _drain(self) -> None:
        while True:
            try:
                data = self._receiver.recv(65535)
            except BlockingIOError:
                return
            number = _NUMBER.unpack_from(data)[0] if len(data) >= _NUMBER.size else -1
            if 0 <= number < self._sent and data == self._datagram(number):
                self._numbers.append(number)
            else:
                self._broken += 1

    def _datagram(self, number: int) -> bytes:
        label = _NUMBER.pack(number)
        return label + hashlib.shake_128(label).digest(self._size - len(label))


class _Enough:
    """Event: `distinct` different datagrams of a stream have arrived; its value is the Arrivals."""

    def __init__(self, stream: UdpStream, distinct: int) -> None:
        self._stream = stream
        self._distinct = distinct

    def fileno(self) -> int:
        """Return the receiving socket."""
        return self._stream.fileno()

    def look(self) -> Arrivals | None:
        """Return the Arrivals once enough datagrams have arrived."""
        arrivals = self._stream.arrivals()
        return arrivals if arrivals.distinct >= self._distinct else None

    def seen(self) -> str:
        """Count what has arrived, lost and duplicated ones too."""
        return str(self._stream.arrivals())


def udp_receiver(node: NetNS, address: str, port: int) -> socket.socket:
    """Open a UDP socket in the node, bound to address and port (0: a free one); the caller closes it."""
    with steps.step(node.name, f"receive UDP at {address} port {port}") as binding:
        receiver = node.socket(family_of(address), socket.SOCK_DGRAM)
        receiver.bind((address, port))
        binding.outcome = "" if port else f"port {receiver.getsockname()[1]}"
    return receiver


def udp_message(node: NetNS, address: str, port: int, data: bytes, *, source: str | None = None) -> None:
    """Send one UDP datagram from the node; source: the node's address to send from, None for the kernel's choice."""
    text = f"send {len(data)} bytes by UDP to {address} port {port}{f' from {source}' if source else ''}"
    with steps.step(node.name, text), node.socket(family_of(address), socket.SOCK_DGRAM) as sender:
        if source is not None:
            sender.bind((source, 0))
        sender.sendto(data, (address, port))


def family_of(address: str) -> int:
    """Return AF_INET6 for an address with a colon, else AF_INET."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET
