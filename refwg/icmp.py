"""Send ICMP errors to senders whose packets no peer takes, as rarely as the stack does.

By raw sockets. Mirrors what net/ipv4/icmp.c and net/ipv6/icmp.c do for the driver's icmp_ndo_send: there is a limit for
all errors together, and for each destination that is not this host a rate with a small burst. A sender whose address
was translated on the way here gets the error by the way it came. Left out is the higher rate that IPv6 allows to
destinations behind a short prefix.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from refwg.address import format_address
from refwg.boundary import LocalAddress
from refwg.conntrack import Conntrack
from refwg.ip import IPV4_BYTES, IPV6_BYTES
from refwg.messages import MILLISECOND, SECOND
from refwg.socket import packet_info

if TYPE_CHECKING:
    from refwg.ip import IcmpError
    from refwg.rtnetlink import RtnetlinkSocket

_ICMP_HEADER_LENGTH: Final = 8
_LOOPBACK: Final = 1
# How many errors a destination may get at once that has not had any for a while (net/ipv4/inetpeer.c).
_BURST: Final = 6
_DESTINATIONS: Final = 4096
# Where the stack keeps its limits, and what they are if it does not show them (icmp(7)).
_ERRORS_PER_SECOND: Final = ("ipv4/icmp_msgs_per_sec", 1000)
_ERRORS_AT_ONCE: Final = ("ipv4/icmp_msgs_burst", 50)
_MILLISECONDS_APART: Final = {IPV4_BYTES: ("ipv4/icmp_ratelimit", 1000), IPV6_BYTES: ("ipv6/icmp/ratelimit", 1000)}


class Bucket:
    """Lets one thing happen per `interval` nanoseconds, and `burst` at once after a pause; interval 0: all."""

    __slots__ = ("_credit", "_interval", "_last", "_limit")

    def __init__(self, interval: int, burst: int) -> None:
        self._interval = interval
        self._limit = self._credit = interval * burst
        self._last: int | None = None

    def allow(self, now: int) -> bool:
        self._credit = min(self._limit, self._credit + now - (now if self._last is None else self._last))
        self._last = now
        if self._credit < self._interval:
            return False
        self._credit -= self._interval
        return True


class IcmpLimits:
    """How often errors may be sent, by the sysctls of the namespace in which it was made."""

    def __init__(self) -> None:
        self._apart = {length: _sysctl(*limit) * MILLISECOND for length, limit in _MILLISECONDS_APART.items()}
        rate = _sysctl(*_ERRORS_PER_SECOND)
        self._all = Bucket(SECOND // rate if rate else 0, _sysctl(*_ERRORS_AT_ONCE))
        self._destinations: dict[bytes, Bucket] = {}

    def allow_any(self, now: int) -> bool:
        """Whether an error may be sent, to whomever."""
        return self._all.allow(now)

    def allow(self, destination: bytes, rtnetlink: RtnetlinkSocket, now: int) -> bool:
        """Whether an error may be sent to this destination."""
        bucket = self._destinations.get(destination)
        if bucket is None:
            if len(self._destinations) >= _DESTINATIONS:
                self._destinations.clear()
            # This host may hear of its own mistakes as often as it makes them.
            is_local = rtnetlink.route(destination).interface == _LOOPBACK
            bucket = Bucket(0 if is_local else self._apart[len(destination)], _BURST)
            self._destinations[destination] = bucket
        return bucket.allow(now)

    def routes_changed(self) -> None:
        """Who was this host may be another now."""
        self._destinations.clear()


class IcmpSender:
    """Sends ICMP errors in the network namespace in which it was made.

    rtnetlink: a socket in the same namespace.
    """

    def __init__(self, rtnetlink: RtnetlinkSocket) -> None:
        self._rtnetlink = rtnetlink
        self._sockets: dict[int, socket.socket] = {}
        self._conntrack: Conntrack | None = None
        with suppress(OSError):
            self._conntrack = Conntrack()
        with suppress(OSError):
            self._sockets[IPV4_BYTES] = _raw_socket(socket.AF_INET, socket.IPPROTO_ICMP)
            self._sockets[IPV6_BYTES] = _raw_socket(socket.AF_INET6, socket.IPPROTO_ICMPV6)

    def send(self, error: IcmpError, limits: IcmpLimits, now: int) -> bool:
        """Send it; False if its destination had too many lately, or the stack does not take it."""
        one = self._sockets.get(len(error.destination))
        if one is None or not limits.allow(error.destination, self._rtnetlink, now):
            return False
        source = self._source_to_translated(error)
        try:
            one.sendmsg([error.message], packet_info(source), 0, (format_address(error.destination), 0))
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._conntrack is not None:
            self._conntrack.close()
        for one in self._sockets.values():
            one.close()

    def _source_to_translated(self, error: IcmpError) -> LocalAddress | None:
        """The address from which a sender behind source NAT is reached; None if there is no NAT.

        The stack translates the error back as it leaves, but by then its source is chosen, for the wrong destination.
        """
        if self._conntrack is None:
            return None
        original = self._conntrack.original_source(error.message[_ICMP_HEADER_LENGTH:])
        if original == error.destination:
            return None
        route = self._rtnetlink.route(original)
        return LocalAddress(route.source) if route.source else None


def _raw_socket(family: socket.AddressFamily, protocol: int) -> socket.socket:
    one = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
    # It only sends; what comes in would fill its buffer to no purpose.
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    return one


def _sysctl(name: str, default: int) -> int:
    try:
        return int(Path("/proc/sys/net", name).read_text())
    except (OSError, ValueError):
        return default
