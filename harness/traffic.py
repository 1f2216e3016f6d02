"""Traffic made by sockets of our own process, so that most tests start no program.

`ping` for ICMP echo, `udp_message` for one datagram, `tcp_streams` for streams whose bytes are compared as they arrive.
"""

from __future__ import annotations

import ipaddress
import os
import selectors
import socket
import struct
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from harness.errors import DeadlineExceeded, HarnessError
from harness.frames import checksum
from harness.wait import Datagram, let_pass, scaled, wait_for

if TYPE_CHECKING:
    from harness.netns import NetNS

# Less than REKEY_TIMEOUT (5 s): a lost initiation shows as a lost ping and is not hidden by its retry.
PING_TIMEOUT: Final = 4.0
# After a loss the rest of the requests goes out quickly, as `ping -f` sends them.
PING_INTERVAL: Final = 0.2
_CHUNK: Final = 1 << 16
# By how many bytes a stream begins later than the one before.
_STRIDE: Final = 4099
# How long streams may take: seconds, and bytes per second of a slow program on a busy machine.
_PATIENCE: Final = 20.0
_SLOWEST: Final = 600_000
_SO_BINDTODEVICE: Final = 25
# struct tcp_info (linux/tcp.h) up to snd_cwnd, of which these are backoff, rto in microseconds, and snd_cwnd.
_TCP_INFO: Final = struct.Struct("=8B19I")
_BACKOFF, _RTO, _WINDOW = 4, 8, 26


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
            request = _echo_request(echo, identifier, sequence, size)
            raw.send(request)
            answer = Datagram(raw, partial(_is_reply, echo, request))
            with suppress(DeadlineExceeded):
                wait_for(answer, min(timeout, PING_INTERVAL) if outcome.lost > 1 else timeout, "an echo reply")
                outcome.answered[sequence] = time.monotonic() - started
    return outcome


def flood(node: NetNS, destination: str, *, count: int, seconds: float, size: int = 56) -> Pings:
    """Send echo requests all at once, let so much time pass, and see which were answered; refused ones are not."""
    echo = _ECHO[ipaddress.ip_address(destination).version]
    outcome = Pings(destination)
    with node.socket(echo.family, socket.SOCK_RAW, echo.protocol) as raw:
        raw.connect((destination, 0))
        identifier = os.urandom(2)
        for sequence in range(count):
            outcome.sent += 1
            # ENOBUFS where a queue is full, as in a loop of the driver's.
            with suppress(OSError):
                raw.send(_echo_request(echo, identifier, sequence, size))
        let_pass(seconds, "what the requests set off is what is looked at")
        for sequence in range(count):
            expected = partial(_is_reply, echo, _echo_request(echo, identifier, sequence, size))
            if Datagram(raw, expected).look() is not None:
                outcome.answered[sequence] = seconds
    return outcome


def must_ping(node: NetNS, destination: str, *, count: int = 1, size: int = 56, device: str | None = None) -> None:
    """Ping, and raise HarnessError unless every request was answered."""
    outcome = ping(node, destination, count=count, size=size, device=device)
    if outcome.lost:
        raise HarnessError(f"{node.name}: ping {outcome}")


def _echo_request(echo: _Echo, identifier: bytes, sequence: int, size: int) -> bytes:
    body = identifier + struct.pack(">H", sequence) + bytes(index & 0xFF for index in range(size))
    # The kernel fills in the checksum of ICMPv6 only, because it covers the addresses.
    value = checksum(bytes([echo.request, 0, 0, 0]) + body) if echo.family == socket.AF_INET else 0
    return struct.pack(">BBH", echo.request, 0, value) + body


def _is_reply(echo: _Echo, request: bytes, data: bytes) -> bool:
    """Whether it is the answer to this request: with its identifier and sequence number, and all that it carried."""
    # An IPv4 raw socket hands out the IP header too.
    message = data[(data[0] & 15) * 4 :] if echo.family == socket.AF_INET else data
    return message[0] == echo.reply and message[4:] == request[4:]


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


def tcp_stream(
    sender: NetNS, receiver: NetNS, address: str, *, size: int = 1 << 20, deadline: float | None = None
) -> float:
    """Send `size` random bytes over one TCP connection; see `tcp_streams`."""
    return tcp_streams(sender, receiver, address, count=1, size=size, deadline=deadline)


def tcp_streams(
    sender: NetNS,
    receiver: NetNS,
    address: str,
    *,
    count: int,
    size: int = 1 << 20,
    deadline: float | None = None,
) -> float:
    """Send `size` random bytes by sendfile(2) over each of `count` TCP connections at once, and compare what arrives.

    address: of the receiver, where each connection has a port of its own. deadline: seconds, scaled; by default as many
    as a slow program on a busy machine may need. Returns bytes per second, of all together. Raises DeadlineExceeded, or
    HarnessError that says what arrived.
    """
    deadline = scaled(deadline or _PATIENCE + count * size / _SLOWEST)
    with ExitStack() as stack:
        way = _Way(sender, receiver, address, size, stack)
        started = time.monotonic()
        streams = [_Stream(way, number) for number in range(count)]
        while not all(stream.is_complete for stream in streams):
            left = started + deadline - time.monotonic()
            for key, _ in way.selector.select(left) if left > 0 else ():
                key.data()
            if left <= 0:
                done, arrived = sum(stream.is_complete for stream in streams), sum(stream.arrived for stream in streams)
                what = f"{done} of {count} streams and {arrived} of {count * size} bytes"
                left_behind = next(stream for stream in streams if not stream.is_complete)
                raise DeadlineExceeded(f"{way}: {what} arrived within {deadline:g} s; {left_behind}")
        return count * size / (time.monotonic() - started)


class _Way:
    """What the streams of one call have in common: the ends, the bytes, and who waits for events."""

    def __init__(self, sender: NetNS, receiver: NetNS, address: str, size: int, stack: ExitStack) -> None:
        self.sender, self.receiver, self.address, self.size = sender, receiver, address, size
        self.stack = stack
        self.selector = stack.enter_context(selectors.DefaultSelector())
        # Twice the same, so that a stream may begin anywhere.
        self.payload = memoryview(os.urandom(size) * 2)
        self.file = stack.enter_context(os.fdopen(os.memfd_create("payload"), "wb", buffering=0))
        self.file.write(self.payload)

    def __str__(self) -> str:
        return f"tcp {self.sender.name} to {self.receiver.name} {self.address}"

    def socket(self, node: NetNS) -> socket.socket:
        made = self.stack.enter_context(node.socket(_family(self.address), socket.SOCK_STREAM))
        made.setblocking(False)
        return made


class _Stream:
    """One TCP connection, which the events of its way's selector move on."""

    def __init__(self, way: _Way, number: int) -> None:
        """Listen, and connect. number: each stream is another stretch of the bytes; none can stand in for another."""
        self._way = way
        self._number = number
        self._start = number * _STRIDE % way.size
        self._sent = self.arrived = 0
        self.is_complete = False
        self._listener = way.socket(way.receiver)
        self._listener.bind((way.address, 0))
        self._listener.listen(1)
        way.selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._client = way.socket(way.sender)
        self._client.connect_ex(self._listener.getsockname()[:2])
        way.selector.register(self._client, selectors.EVENT_WRITE, self._send)

    def __str__(self) -> str:
        """How far it has come, and why it may be no further."""
        info = _TCP_INFO.unpack(self._client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
        why = f"{info[_BACKOFF]} times in vain since the last answer, a window of {info[_WINDOW]} segments"
        return f"stream {self._number}: {self.arrived} bytes, retransmits after {info[_RTO] / 1000:.0f} ms, {why}"

    def _accept(self) -> None:
        self._server = self._way.stack.enter_context(self._listener.accept()[0])
        self._server.setblocking(False)
        self._way.selector.unregister(self._listener)
        self._way.selector.register(self._server, selectors.EVENT_READ, self._receive)

    def _send(self) -> None:
        left = self._way.size - self._sent
        try:
            with suppress(BlockingIOError):
                at = self._start + self._sent
                self._sent += os.sendfile(self._client.fileno(), self._way.file.fileno(), at, min(_CHUNK, left))
        except OSError as error:
            raise HarnessError(f"{self._way}: {error.strerror} after {self._sent} bytes") from error
        if self._sent == self._way.size:
            self._way.selector.unregister(self._client)
            self._client.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        chunk = self._server.recv(_CHUNK)
        at = self._start + self.arrived
        expected = self._way.payload[at : min(at + len(chunk), self._start + self._way.size)]
        if chunk != expected:
            raise HarnessError(f"{self._way}: {self._difference(chunk, expected)}")
        self.arrived += len(chunk)
        if not chunk:
            if self.arrived != self._way.size:
                raise HarnessError(f"{self._way}: {self.arrived} bytes arrived of {self._way.size}")
            self._way.selector.unregister(self._server)
            self.is_complete = True

    def _difference(self, chunk: bytes, expected: memoryview) -> str:
        for index, (is_, should_be) in enumerate(zip(chunk, expected, strict=False)):
            if is_ != should_be:
                return f"byte {self.arrived + index} arrived as 0x{is_:02x}, not 0x{should_be:02x}"
        return f"more than {self._way.size} bytes arrived"


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
