"""Read the errors that a sender gets: from send(2), and by ICMP from its error queue.

Sources: IP_RECVERR in ip(7), struct sock_extended_err of include/uapi/linux/errqueue.h.
"""

from __future__ import annotations

import socket
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from harness.wait import wait_for

if TYPE_CHECKING:
    from harness.net.netns import NetNS

# Before a retry of a handshake (5 s) could have to do with it, and later than a busy machine forwards a packet.
AT_ONCE: Final = 3.0
DISCARD: Final = 9
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
_PMTUDISC_DO: Final = 2
_IP_RECVERR, _IPV6_RECVERR = 11, 25
# errno, origin, ICMP type and code, information, and the family of the offender's address.
_EXTENDED_ERROR: Final = Struct("=I3BxI4xH")


class Error(NamedTuple):
    """An entry of the error queue: errno, ICMP type and code, who sent the ICMP error, and its information (an MTU)."""

    errno: int
    icmp: tuple[int, int]
    offender: str
    information: int = 0


class QueuedError:
    """The error queue of a socket has an entry; as an event it is the Error."""

    def __init__(self, sender: socket.socket) -> None:
        self._sender = sender

    def fileno(self) -> int:
        return self._sender.fileno()

    def look(self) -> Error | None:
        try:
            _, ((_, _, data),), _, _ = self._sender.recvmsg(0, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        number, _, kind, code, information, family = _EXTENDED_ERROR.unpack_from(data)
        address = data[20:24] if family == socket.AF_INET else data[24:40]
        return Error(number, (kind, code), socket.inet_ntop(family, address) if family else "", information)

    def seen(self) -> str:
        return "no error"


def error_for(
    node: NetNS,
    address: str,
    *,
    source: str = "",
    hops: int = 64,
    size: int = 16,
    within: float = AT_ONCE,
) -> tuple[int, Error]:
    """Send a datagram that must not be fragmented; returns the errno of send(2), 0 for none, and the error that came.

    size: bytes of UDP payload. Raises DeadlineExceeded if there is no error within so many seconds.
    """
    is_v6 = ":" in address
    with node.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_DGRAM) as sender:
        level = socket.IPPROTO_IPV6 if is_v6 else socket.IPPROTO_IP
        sender.setsockopt(level, _IPV6_RECVERR if is_v6 else _IP_RECVERR, 1)
        sender.setsockopt(level, _IPV6_MTU_DISCOVER if is_v6 else _IP_MTU_DISCOVER, _PMTUDISC_DO)
        sender.setsockopt(level, socket.IPV6_UNICAST_HOPS if is_v6 else socket.IP_TTL, hops)
        if source:
            sender.bind((source, 0))
        sender.connect((address, DISCARD))
        said = 0
        try:
            sender.send(bytes(size))
        except OSError as error:
            said = error.errno or 0
        return said, wait_for(QueuedError(sender), within, f"an ICMP error about a datagram to {address}")
