"""Send ICMP echo requests from this process's sockets, so that tests start no program."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from harness import steps
from harness.errors import DeadlineExceeded, HarnessError
from harness.net.checksum import checksum
from harness.wait import Datagram, let_pass, wait_for

if TYPE_CHECKING:
    from harness.net.netns import NetNS

# Seconds: less than REKEY_TIMEOUT (5 s). So a lost initiation shows as a lost ping; its retry comes too late to hide
# it.
PING_TIMEOUT: Final = 4.0
# Seconds to wait for a reply once a request is lost, so that the rest of the requests does not take long.
PING_INTERVAL: Final = 0.2
_SO_BINDTODEVICE: Final = 25
_NAMED: Final = 10  # lost requests that a message names


@dataclass(frozen=True, slots=True)
class _Echo:
    """Numbers that differ between ICMP echo over IPv4 (RFC 792) and IPv6 (RFC 4443); request, reply: ICMP types."""

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
    """Result of a ping. sent: number of requests; answered: sequence number -> round-trip time in seconds."""

    destination: str
    sent: int = 0
    answered: dict[int, float] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Number of requests without a reply in time."""
        return self.sent - len(self.answered)

    def in_short(self) -> str:
        """Format for the evidence: the number answered, the lost ones, and the longest round-trip time."""
        missing = [number for number in range(self.sent) if number not in self.answered]
        longest = f", within {max(self.answered.values()) * 1000:.1f} ms" if self.answered else ""
        lost = f", not {steps.few(missing)}" if missing else ""
        return f"{len(self.answered)} of {self.sent} answered{longest}{lost}"

    def __str__(self) -> str:
        missing = [str(number) for number in range(self.sent) if number not in self.answered]
        more = [f"and {len(missing) - _NAMED} more"] if len(missing) > _NAMED else []
        lost = f", not [{', '.join([*missing[:_NAMED], *more])}]" if missing else ""
        return f"{self.destination}: {len(self.answered)} of {self.sent} answered{lost}"

    def __repr__(self) -> str:
        return f"Pings({self})"


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

    size: data bytes of a request. timeout: seconds to wait for a reply, scaled; after the first loss at most
    PING_INTERVAL. device: send by this device only (SO_BINDTODEVICE). Raises OSError if a request cannot be sent.
    """
    echo = _ECHO[ipaddress.ip_address(destination).version]
    outcome = Pings(destination)
    text = f"ping -c {count} -s {size} {f'-I {device} ' if device else ''}{destination}"
    with steps.step(node.name, text) as pinging, node.socket(echo.family, socket.SOCK_RAW, echo.protocol) as raw:
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
        pinging.outcome = outcome.in_short()
    return outcome


def flood(node: NetNS, destination: str, *, count: int, seconds: float, size: int = 56) -> Pings:
    """Send echo requests all at once, let `seconds` pass (not scaled), and return which were answered.

    A request that the kernel refuses to send counts as lost. The round-trip times in the result are not measured.
    """
    echo = _ECHO[ipaddress.ip_address(destination).version]
    outcome = Pings(destination)
    text = f"ping -f -c {count} -s {size} {destination}"
    with steps.step(node.name, text) as pinging, node.socket(echo.family, socket.SOCK_RAW, echo.protocol) as raw:
        raw.connect((destination, 0))
        identifier = os.urandom(2)
        for sequence in range(count):
            outcome.sent += 1
            # ENOBUFS if a queue is full, as in a routing loop of the kernel's driver.
            with suppress(OSError):
                raw.send(_echo_request(echo, identifier, sequence, size))
        let_pass(seconds, "the test observes what the requests cause in this time")
        for sequence in range(count):
            expected = partial(_is_reply, echo, _echo_request(echo, identifier, sequence, size))
            if Datagram(raw, expected).look() is not None:
                outcome.answered[sequence] = seconds
        pinging.outcome = outcome.in_short()
    return outcome


def must_ping(node: NetNS, destination: str, *, count: int = 1, size: int = 56, device: str | None = None) -> None:
    """Send echo requests as `ping` does; HarnessError lists the lost ones if any request is not answered."""
    __tracebackhide__ = True  # pytest's traceback ends at the test's own line
    outcome = ping(node, destination, count=count, size=size, device=device)
    if outcome.lost:
        raise HarnessError(f"{node.name}: ping {outcome}")


def _echo_request(echo: _Echo, identifier: bytes, sequence: int, size: int) -> bytes:
    body = identifier + struct.pack(">H", sequence) + bytes(index & 0xFF for index in range(size))
    # For ICMPv6 the kernel fills in the checksum, because it covers the addresses too (raw(7), RFC 3542 3.1).
    value = checksum(bytes([echo.request, 0, 0, 0]) + body) if echo.family == socket.AF_INET else 0
    return struct.pack(">BBH", echo.request, 0, value) + body


def _is_reply(echo: _Echo, request: bytes, data: bytes) -> bool:
    """Return whether `data` is the reply to this request: same identifier, sequence number and data bytes."""
    # An IPv4 raw socket also returns the IP header (raw(7)).
    message = data[(data[0] & 15) * 4 :] if echo.family == socket.AF_INET else data
    return message[0] == echo.reply and message[4:] == request[4:]
