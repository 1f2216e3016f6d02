"""Traffic made by sockets of our own process, so that most tests start no program.

`ping` for ICMP echo, `udp_message` for one datagram, `tcp_stream` for a stream whose bytes are compared at the end.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import select
import socket
import struct
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from harness.errors import DeadlineExceeded, HarnessError
from harness.wait import Datagram, scaled, wait_for

if TYPE_CHECKING:
    from harness.netns import NetNS

# Less than REKEY_TIMEOUT (5 s): a lost initiation shows as a lost ping and is not hidden by its retry.
PING_TIMEOUT: Final = 4.0
# After a loss the rest of the requests goes out quickly, as `ping -f` sends them.
PING_INTERVAL: Final = 0.2
_CHUNK: Final = 1 << 16
_SO_BINDTODEVICE: Final = 25


@dataclass(frozen=True, slots=True)
class _Echo:
    """What differs between ICMP echo over IPv4 (RFC 792) and IPv6 (RFC 4443)."""

    family: int
    protocol: int
    request: int
    reply: int


_ECHO: Final = {
    4: _Echo(socket.AF_INET, socket.IPPROTO_ICMP, 8, 0),
    6: _Echo(socket.AF_INET6, socket.IPPROTO_ICMPV6, 128, 129),
}


@dataclass(slots=True)
class Pings:
    """The outcome of a ping: how many requests, and the round-trip time in seconds of each answered one by sequence."""

    destination: str
    sent: int = 0
    answered: dict[int, float] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        return self.sent - len(self.answered)

    def __str__(self) -> str:
        missing = [number for number in range(self.sent) if number not in self.answered]
        return f"{self.destination}: {len(self.answered)} of {self.sent} answered" + (
            f", not {missing}" if missing else ""
        )


def ping(
    node: NetNS,
    destination: str,
    *,
    count: int = 1,
    size: int = 56,
    timeout: float = PING_TIMEOUT,
    device: str | None = None,
) -> Pings:
    """Send echo requests one by one, each as soon as the one before is answered or lost.

    size: data bytes of a request. timeout: seconds to wait for an answer, scaled; after the first loss
    PING_INTERVAL is enough. device: bind to this one.
    """
    echo = _ECHO[ipaddress.ip_address(destination).version]
    outcome = Pings(destination)
    with node.socket(echo.family, socket.SOCK_RAW, echo.protocol) as raw:
        if device is not None:
            raw.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, device.encode())
        raw.connect((destination, 0))
        identifier = os.urandom(2)
        for sequence in range(count):
            started = time.monotonic()
            outcome.sent += 1
            raw.send(_echo_request(echo, identifier, sequence, size))
            expected = partial(_is_reply, echo, identifier + struct.pack(">H", sequence))
            answer = Datagram(raw, expected)
            with suppress(DeadlineExceeded):
                wait_for(answer, min(timeout, PING_INTERVAL) if outcome.lost > 1 else timeout, "an echo reply")
                outcome.answered[sequence] = time.monotonic() - started
    return outcome


def must_ping(node: NetNS, destination: str, *, count: int = 1, size: int = 56, device: str | None = None) -> None:
    """Ping, and raise HarnessError unless every request was answered."""
    outcome = ping(node, destination, count=count, size=size, device=device)
    if outcome.lost:
        raise HarnessError(f"{node.name}: ping {outcome}")


def _echo_request(echo: _Echo, identifier: bytes, sequence: int, size: int) -> bytes:
    body = identifier + struct.pack(">H", sequence) + bytes(index & 0xFF for index in range(size))
    # The kernel fills in the checksum of ICMPv6 only, because it covers the addresses.
    checksum = _checksum(bytes([echo.request, 0, 0, 0]) + body) if echo.family == socket.AF_INET else 0
    return struct.pack(">BBH", echo.request, 0, checksum) + body


def _is_reply(echo: _Echo, label: bytes, data: bytes) -> bool:
    # An IPv4 raw socket hands out the IP header too.
    message = data[(data[0] & 15) * 4 :] if echo.family == socket.AF_INET else data
    return message[0] == echo.reply and message[4:8] == label


def _checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    while total > 0xFFFF:  # noqa: PLR2004 - 16 bits
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def udp_receiver(node: NetNS, address: str, port: int) -> socket.socket:
    """A UDP socket of the node, bound and ready to receive; the caller closes it."""
    receiver = node.socket(_family(address), socket.SOCK_DGRAM)
    receiver.bind((address, port))
    return receiver


def udp_message(node: NetNS, address: str, port: int, data: bytes, *, source: str | None = None) -> None:
    """Send one UDP datagram from the node; source: from this one of its addresses."""
    with node.socket(_family(address), socket.SOCK_DGRAM) as sender:
        if source is not None:
            sender.bind((source, 0))
        sender.sendto(data, (address, port))


def tcp_stream(sender: NetNS, receiver: NetNS, address: str, *, size: int = 1 << 20, deadline: float = 20.0) -> float:
    """Send `size` random bytes by sendfile(2) over one TCP connection and compare what arrives.

    address: of the receiver. Returns bytes per second. Raises DeadlineExceeded, or HarnessError that says what arrived.
    """
    payload = os.urandom(size)
    with ExitStack() as stack:
        listener = stack.enter_context(receiver.socket(_family(address), socket.SOCK_STREAM))
        listener.bind((address, 0))
        listener.listen(1)
        listener.settimeout(scaled(deadline))
        client = stack.enter_context(sender.socket(_family(address), socket.SOCK_STREAM))
        client.settimeout(scaled(deadline))
        started = time.monotonic()
        client.connect((address, listener.getsockname()[1]))
        server = stack.enter_context(listener.accept()[0])
        pump = threading.Thread(target=_pump, args=(client, payload), name="tcp-sender")
        pump.start()
        try:
            arrived = _drain(server, size, scaled(deadline))
        finally:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            pump.join()
        seconds = time.monotonic() - started
    if hashlib.sha256(arrived).digest() != hashlib.sha256(payload).digest():
        raise HarnessError(f"tcp {sender.name} to {receiver.name} {address}: {_difference(payload, arrived)}")
    return size / seconds


def _pump(client: socket.socket, payload: bytes) -> None:
    with os.fdopen(os.memfd_create("payload"), "wb+") as file, suppress(OSError):
        file.write(payload)
        file.seek(0)
        client.sendfile(file)
        client.shutdown(socket.SHUT_WR)


def _drain(server: socket.socket, size: int, seconds: float) -> bytes:
    end = time.monotonic() + seconds
    arrived = bytearray()
    while len(arrived) <= size:
        left = end - time.monotonic()
        if left <= 0 or not select.select([server], [], [], left)[0]:
            raise DeadlineExceeded(f"tcp: {len(arrived)} of {size} bytes arrived within {seconds:g} s")
        chunk = server.recv(_CHUNK)
        if not chunk:
            break
        arrived += chunk
    return bytes(arrived)


def _difference(payload: bytes, arrived: bytes) -> str:
    if len(payload) != len(arrived):
        return f"{len(arrived)} bytes arrived of {len(payload)}"
    first = next(index for index, pair in enumerate(zip(payload, arrived, strict=True)) if pair[0] != pair[1])
    return f"byte {first} arrived as 0x{arrived[first]:02x}, not 0x{payload[first]:02x}"


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
