"""Send numbered UDP datagrams, and report which arrive, in which order and how often.

Nothing here waits for the clock: who sends decides when, and who receives says how many are to come.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from harness.errors import UsageError
from harness.net.netns import enlarge_receive_buffer
from harness.wait import wait_for

if TYPE_CHECKING:
    from harness.net.netns import NetNS

_BUFFER: Final = 16 << 20
_NUMBER: Final = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What has arrived of a stream. numbers: of whole datagrams, in the order of their arrival; broken: of others."""

    sent: int
    numbers: tuple[int, ...]
    broken: int

    @property
    def distinct(self) -> int:
        return len(set(self.numbers))

    @property
    def lost(self) -> int:
        return self.sent - self.distinct

    @property
    def duplicated(self) -> int:
        """How many came although they had come before."""
        return len(self.numbers) - self.distinct

    @property
    def reordered(self) -> int:
        """How many came after one that was sent later."""
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


class UdpStream:
    """Datagrams of one size from one node to an address of another, as a context manager.

    Each carries its number and bytes that follow from it, so that a changed one is known.
    """

    def __init__(self, sender: NetNS, receiver: NetNS, address: str, *, size: int = 256) -> None:
        if size < _NUMBER.size:
            raise UsageError(f"a stream of datagrams of {size} bytes: want at least {_NUMBER.size}, for the number")
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def send(self, count: int = 1) -> None:
        """Send so many more, one directly after the other."""
        for number in range(self._sent, self._sent + count):
            self._sender.send(self._datagram(number))
            self._sent += 1

    def arrivals(self) -> Arrivals:
        """What has arrived so far."""
        self._drain()
        return Arrivals(self._sent, tuple(self._numbers), self._broken)

    def wait_for(self, distinct: int, deadline: float = 5.0) -> Arrivals:
        """Wait until so many different ones have arrived; DeadlineExceeded says what has."""
        return wait_for(_Enough(self, distinct), deadline, f"{distinct} of {self._sent} datagrams to arrive")

    def fileno(self) -> int:
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
    """So many datagrams have arrived: what has."""

    def __init__(self, stream: UdpStream, distinct: int) -> None:
        self._stream = stream
        self._distinct = distinct

    def fileno(self) -> int:
        return self._stream.fileno()

    def look(self) -> Arrivals | None:
        arrivals = self._stream.arrivals()
        return arrivals if arrivals.distinct >= self._distinct else None

    def seen(self) -> str:
        return str(self._stream.arrivals())


def udp_receiver(node: NetNS, address: str, port: int) -> socket.socket:
    """A UDP socket of the node, bound and ready to receive; the caller closes it."""
    receiver = node.socket(family_of(address), socket.SOCK_DGRAM)
    receiver.bind((address, port))
    return receiver


def udp_message(node: NetNS, address: str, port: int, data: bytes, *, source: str | None = None) -> None:
    """Send one UDP datagram from the node; source: from this one of its addresses."""
    with node.socket(family_of(address), socket.SOCK_DGRAM) as sender:
        if source is not None:
            sender.bind((source, 0))
        sender.sendto(data, (address, port))


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
