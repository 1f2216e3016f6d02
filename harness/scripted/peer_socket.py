"""Send and take datagrams at one address and port of a scripted peer, alone or in batches."""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING, Final

from harness.net.netns import enlarge_receive_buffer
from harness.net.stamps import SO_TIMESTAMPNS
from harness.wire.messages import NANOSECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.net.netns import NetNS

_BUFFER: Final = 4 << 20
_LONGEST: Final = 1 << 16
_ANCILLARY: Final = 128
_TIMESPEC: Final = struct.Struct("qq")
_IP_TOS, _IP_RECVTOS, _IPV6_TCLASS, _IPV6_RECVTCLASS = 1, 13, 67, 66
_UDP_SEGMENT: Final = 103
# UDP_MAX_SEGMENTS before Linux 6.9, and the largest payload of a UDP datagram over IPv4.
_SEGMENTS: Final = 64
_LARGEST_BATCH: Final = 65507


class PeerSocket:
    """One address and port of a scripted peer.

    address, port: its own. target: the device's address and port, to which it sends.
    """

    def __init__(self, node: NetNS, address: str, port: int, target: tuple[str, int]) -> None:
        self._family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = node.socket(self._family, socket.SOCK_DGRAM)
        enlarge_receive_buffer(self._socket, _BUFFER)
        if self._family == socket.AF_INET6:
            self._socket.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVTCLASS, 1)
        else:
            self._socket.setsockopt(socket.IPPROTO_IP, _IP_RECVTOS, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.bind((address, port))
        self._socket.setblocking(False)
        self.target = target
        self.address, self.port = self._socket.getsockname()[:2]

    def fileno(self) -> int:
        """Return the socket."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket: from now on the node answers the device by ICMP "port unreachable"."""
        self._socket.close()

    def throw(self, datagram: bytes, tos: int = 0, segment: int = 0) -> None:
        """Send bytes to the device, with an outer TOS or traffic class; nothing is recorded.

        segment: the bytes are several datagrams of this length, of which the last may be shorter (UDP_SEGMENT, udp(7));
        0: they are one.
        """
        level, name = (
            (socket.IPPROTO_IPV6, _IPV6_TCLASS) if self._family == socket.AF_INET6 else (socket.IPPROTO_IP, _IP_TOS)
        )
        ancillary = [(level, name, struct.pack("i", tos))] if tos else []
        if segment:
            ancillary.append((socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("H", segment)))
        self._socket.sendmsg([datagram], ancillary, 0, self.target)

    def throw_together(self, datagrams: Sequence[bytes], tos: int = 0) -> None:
        """Send datagrams in this order by as few system calls as possible; nothing is recorded."""
        for batch in _batches(datagrams):
            self.throw(b"".join(batch), tos, len(batch[0]) if len(batch) > 1 else 0)

    def take(self) -> tuple[bytes, tuple[str, int], int, int] | None:
        """Return the next datagram, its source, its TOS or traffic class and when it came; None if there is none."""
        try:
            data, ancillary, _, source = self._socket.recvmsg(_LONGEST, _ANCILLARY)
        except BlockingIOError:
            return None
        tos = next(
            (
                content[0]
                for level, kind, content in ancillary
                if (level, kind) in {(socket.IPPROTO_IP, _IP_TOS), (socket.IPPROTO_IPV6, _IPV6_TCLASS)}
            ),
            0,
        )
        stamp = next((content for level, _, content in ancillary if level == socket.SOL_SOCKET), None)
        seconds, nanoseconds = _TIMESPEC.unpack(stamp) if stamp else divmod(time.time_ns(), NANOSECONDS)
        return data, source[:2], tos, seconds * NANOSECONDS + nanoseconds

    def __repr__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def _batches(datagrams: Sequence[bytes]) -> list[list[bytes]]:
    """Divide datagrams into batches for UDP_SEGMENT, in order."""
    batches: list[list[bytes]] = []
    for datagram in datagrams:
        last = batches[-1] if batches else []
        is_open = 0 < len(last) < _SEGMENTS and sum(map(len, last)) + len(datagram) <= _LARGEST_BATCH
        if is_open and 0 < len(datagram) <= len(last[-1]) == len(last[0]):
            last.append(datagram)
        else:
            batches.append([datagram])
    return batches
