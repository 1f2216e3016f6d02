"""Send ICMP errors for packets without a peer or endpoint, at the stack's rate limits.

Uses raw sockets. Mirrors what net/ipv4/icmp.c and net/ipv6/icmp.c do for the driver's icmp_ndo_send. One rate limit
applies to all errors together. A second one, with a small burst, applies to each destination that is not this host. If
source NAT translated the sender's address, the error reaches the sender at its original address. Not implemented: the
higher rate that IPv6 allows for destinations with a short prefix.
"""

from __future__ import annotations

import socket
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from refwg.address import format_address
from refwg.boundary import LocalAddress
from refwg.conntrack import Conntrack
from refwg.ip import IPV4_BYTES, IPV6_BYTES
from refwg.messages import MILLISECOND, SECOND
from refwg.shortage import is_shortage
from refwg.socket import packet_info

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refwg.ip import IcmpError
    from refwg.rtnetlink import RtnetlinkSocket

_ICMP_HEADER_LENGTH: Final = 8
_LOOPBACK: Final = 1
# Burst of errors to a destination that has received none for a while (XRLIM_BURST_FACTOR, net/ipv4/inetpeer.c).
_BURST: Final = 6
_DESTINATIONS: Final = 4096
# Files in /proc/sys/net with the limits of the stack, and their defaults (icmp(7)).
_ERRORS_PER_SECOND: Final = ("ipv4/icmp_msgs_per_sec", 1000)
_ERRORS_AT_ONCE: Final = ("ipv4/icmp_msgs_burst", 50)
_MILLISECONDS_APART: Final = {IPV4_BYTES: ("ipv4/icmp_ratelimit", 1000), IPV6_BYTES: ("ipv6/icmp/ratelimit", 1000)}


class Bucket:
    """A token bucket: one event per `interval` nanoseconds, `burst` at once after a pause; interval 0: no limit."""

    __slots__ = ("_credit", "_interval", "_last", "_limit")

    def __init__(self, interval: int, burst: int) -> None:
        self._interval = interval
        self._limit = self._credit = interval * burst
        self._last: int | None = None

    def allow(self, now: int) -> bool:
        """Return True and take a token if one is left; now: nanoseconds."""
        self._credit = min(self._limit, self._credit + now - (now if self._last is None else self._last))
        self._last = now
        if self._credit < self._interval:
            return False
        self._credit -= self._interval
        return True


class IcmpLimits:
    """Limits on ICMP errors, read from the sysctls of the network namespace in which it was made."""

    def __init__(self) -> None:
        self._apart = {length: _sysctl(*limit) * MILLISECOND for length, limit in _MILLISECONDS_APART.items()}
        rate = _sysctl(*_ERRORS_PER_SECOND)
        self._all = Bucket(SECOND // rate if rate else 0, _sysctl(*_ERRORS_AT_ONCE))
        self._destinations: dict[bytes, Bucket] = {}

    def allow_any(self, now: int) -> bool:
        """Return True if the limit for all errors together permits one more."""
        return self._all.allow(now)

    def allow(self, destination: bytes, rtnetlink: RtnetlinkSocket, now: int) -> bool:
        """Return True if the limit of this destination permits one more error.

        rtnetlink: looks up whether the destination is local.
        """
        bucket = self._destinations.get(destination)
        if bucket is None:
            if len(self._destinations) >= _DESTINATIONS:
                self._destinations.clear()
            # Errors to local senders have no per-destination limit.
            is_local = rtnetlink.route(destination).interface == _LOOPBACK
            bucket = Bucket(0 if is_local else self._apart[len(destination)], _BURST)
            self._destinations[destination] = bucket
        return bucket.allow(now)

    def routes_changed(self) -> None:
        """Forget all destinations: a local address may be remote now, or a remote one local."""
        self._destinations.clear()


class IcmpSender:
    """Sends ICMP errors in the network namespace in which it was made.

    rtnetlink: a socket in the same namespace. Without the right to open raw sockets it sends nothing; a shortage raises
    OSError, because it may be over soon.
    """

    def __init__(self, rtnetlink: RtnetlinkSocket) -> None:
        self._rtnetlink = rtnetlink
        self._sockets: dict[int, socket.socket] = {}
        self._conntrack: Conntrack | None = None
        try:
            with _unless_shortage():
                self._conntrack = Conntrack()
            with _unless_shortage():
                self._sockets[IPV4_BYTES] = _raw_socket(socket.AF_INET, socket.IPPROTO_ICMP)
                self._sockets[IPV6_BYTES] = _raw_socket(socket.AF_INET6, socket.IPPROTO_ICMPV6)
        except OSError:
            self.close()
            raise

    def send(self, error: IcmpError, limits: IcmpLimits, now: int) -> bool:
        """Send an error; returns False if the limit of its destination is reached, or the stack refuses it."""
        sock = self._sockets.get(len(error.destination))
        if sock is None or not limits.allow(error.destination, self._rtnetlink, now):
            return False
        source = self._source_to_translated(error)
        try:
            sock.sendmsg([error.message], packet_info(source), 0, (format_address(error.destination), 0))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close all sockets but `rtnetlink`, which belongs to the caller."""
        if self._conntrack is not None:
            self._conntrack.close()
        for sock in self._sockets.values():
            sock.close()

    def _source_to_translated(self, error: IcmpError) -> LocalAddress | None:
        """Return the local address on the route to a sender behind source NAT; None if there is no NAT.

        The error is sent to the translated address, and the stack restores the original one when the error leaves. The
        stack would choose the source address for the translated destination, so it is chosen here.
        """
        if self._conntrack is None:
            return None
        original = self._conntrack.original_source(error.message[_ICMP_HEADER_LENGTH:])
        if original == error.destination:
            return None
        route = self._rtnetlink.route(original)
        return LocalAddress(route.source) if route.source else None


@contextmanager
def _unless_shortage() -> Iterator[None]:
    """Ignore an OSError of the block, such as a missing right, but not a shortage."""
    try:
        yield
    except OSError as error:
        if is_shortage(error):
            raise


def _raw_socket(family: socket.AddressFamily, protocol: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
    # The socket only sends; received messages would fill its buffer.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    return sock


def _sysctl(name: str, default: int) -> int:
    with _unless_shortage(), suppress(ValueError):
        return int(Path("/proc/sys/net", name).read_text())
    return default
