"""Send a datagram and return its errors: from send(2), and from ICMP (error queue).

Sources: IP_RECVERR in ip(7), struct sock_extended_err of include/uapi/linux/errqueue.h.
"""

from __future__ import annotations

import errno
import socket
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from harness import steps
from harness.wait import wait_for

if TYPE_CHECKING:
    from harness.net.netns import NetNS

# Seconds: less than REKEY_TIMEOUT (5 s), so that a handshake retry cannot cause the error; enough for a loaded machine.
AT_ONCE: Final = 3.0
DISCARD: Final = 9  # the UDP port of RFC 863
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
_PMTUDISC_DO: Final = 2
_IP_RECVERR, _IPV6_RECVERR = 11, 25
# struct sock_extended_err: errno, origin, ICMP type, ICMP code, ee_info; then the family of the offender's sockaddr.
_EXTENDED_ERROR: Final = Struct("=I3BxI4xH")


class Error(NamedTuple):
    """An entry of a socket's error queue.

    icmp: (type, code). offender: the address that sent the ICMP error, "" if it did not come from the network.
    information: ee_info, for EMSGSIZE the path MTU in bytes.
    """

    errno: int
    icmp: tuple[int, int]
    offender: str
    information: int = 0


class QueuedError:
    """Event: the error queue of a socket has an entry; its value is the Error.

    sender: a socket with IP_RECVERR or IPV6_RECVERR turned on.
    """

    def __init__(self, sender: socket.socket) -> None:
        self._sender = sender

    def fileno(self) -> int:
        """Return the socket: poll(2) reports POLLERR while its error queue has an entry."""
        return self._sender.fileno()

    def look(self) -> Error | None:
        """Remove and return the oldest entry; None if the queue is empty."""
        try:
            _, ((_, _, data),), _, _ = self._sender.recvmsg(0, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        number, _, kind, code, information, family = _EXTENDED_ERROR.unpack_from(data)
        address = data[20:24] if family == socket.AF_INET else data[24:40]
        return Error(number, (kind, code), socket.inet_ntop(family, address) if family else "", information)

    def seen(self) -> str:
        """Return the text for a missed deadline."""
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
    """Send a UDP datagram that must not be fragmented, and wait for the ICMP error about it.

    source: address to send from, "" for the kernel's choice. hops: TTL or hop limit. size: bytes of UDP payload.
    within: seconds to wait, scaled. Returns the errno of send(2), 0 for success, and the error. Raises DeadlineExceeded
    if no error comes.
    """
    is_v6 = ":" in address
    origin = f" from {source}" if source else ""
    text = f"send {size} bytes by UDP to {address} port {DISCARD}{origin}, unfragmented, ttl {hops}"
    with (
        steps.step(node.name, text) as sending,
        node.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        level = socket.IPPROTO_IPV6 if is_v6 else socket.IPPROTO_IP
        sender.setsockopt(level, _IPV6_RECVERR if is_v6 else _IP_RECVERR, 1)
        sender.setsockopt(level, _IPV6_MTU_DISCOVER if is_v6 else _IP_MTU_DISCOVER, _PMTUDISC_DO)
        sender.setsockopt(level, socket.IPV6_UNICAST_HOPS if is_v6 else socket.IP_TTL, hops)
        if source:
            sender.bind((source, 0))
        sender.connect((address, DISCARD))
        send_errno = 0
        try:
            sender.send(bytes(size))
        except OSError as error:
            send_errno = error.errno or 0
        answer = send_errno, wait_for(QueuedError(sender), within, f"an ICMP error about a datagram to {address}")
        sending.outcome = f"send(2): {errno.errorcode.get(send_errno, 'no error')}; then {answer[1]}"
        return answer
