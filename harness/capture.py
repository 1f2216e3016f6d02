"""Captures: the WireGuard datagrams that leave a node by a device, each with the kernel's time stamp.

Sources: packet(7), SO_TIMESTAMPNS in socket(7). The message types are those of the whitepaper, section 5.4.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from harness.wait import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.netns import NetNS

INITIATION, RESPONSE, COOKIE_REPLY, DATA = 1, 2, 3, 4
NAMES: Final = {INITIATION: "initiation", RESPONSE: "response", COOKIE_REPLY: "cookie reply", DATA: "data"}
KEEPALIVE_SIZE: Final = 32

_ETH_P_ALL: Final = 3
_ETH_HEADER: Final = 14
_IPV4, _IPV6 = 0x0800, 0x86DD
_PACKET_OUTGOING: Final = 4
_SO_TIMESTAMPNS: Final = 35
_SO_RCVBUFFORCE: Final = 33
_BUFFER: Final = 8 << 20
_IPV6_HEADER: Final = 40
_UDP_HEADER: Final = 8
_NANOSECONDS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One datagram: when it left (ns of wall time), from and to which address and port, and its UDP payload."""

    time: int
    source: tuple[str, int]
    destination: tuple[str, int]
    payload: bytes

    @property
    def kind(self) -> int:
        """Its message type; 0 if it is no WireGuard message."""
        return self.payload[0] if self.payload[:1] and self.payload[1:4] == bytes(3) else 0

    @property
    def is_keepalive(self) -> bool:
        return self.kind == DATA and len(self.payload) == KEEPALIVE_SIZE

    def __str__(self) -> str:
        name = "keepalive" if self.is_keepalive else NAMES.get(self.kind, "no message of WireGuard's")
        seconds = self.time / _NANOSECONDS
        return f"{seconds:.3f} {self.source[1]}>{self.destination[1]} {name} ({len(self.payload)})"


class Capture:
    """Takes every UDP datagram that leaves by a device, from the moment it is made; as a context manager."""

    def __init__(self, node: NetNS, device: str) -> None:
        self._messages: list[Message] = []
        self._socket = node.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        self._socket.bind((device, _ETH_P_ALL))
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def messages(self, *, kind: int | None = None, port: int | None = None) -> list[Message]:
        """What has left so far, oldest first: of one type, from one source port."""
        self._drain()
        return [m for m in self._messages if kind in {None, m.kind} and port in {None, m.source[1]}]

    def wait_for(self, accept: Callable[[Message], bool], deadline: float, what: str) -> Message:
        """Wait for a message that `accept` takes, among those already seen too."""
        return wait_for(_Seen(self, accept), deadline, what)

    def _drain(self) -> None:
        while True:
            try:
                data, ancillary, _, address = self._socket.recvmsg(65535, 64)
            except BlockingIOError:
                return
            # On the loopback device each packet passes twice, once in each direction.
            if address[2] == _PACKET_OUTGOING and (message := _parse(data, _time(ancillary))):
                self._messages.append(message)


class _Seen:
    """A capture has a message of a certain sort: the first one."""

    def __init__(self, capture: Capture, accept: Callable[[Message], bool]) -> None:
        self._capture = capture
        self._accept = accept

    def fileno(self) -> int:
        return self._capture.fileno()

    def look(self) -> Message | None:
        return next((message for message in self._capture.messages() if self._accept(message)), None)

    def seen(self) -> str:
        return "; ".join(str(message) for message in self._capture.messages()[-5:]) or "no datagram"


def _time(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", data[:16])
            return int(seconds * _NANOSECONDS + nanoseconds)
    return 0


def _parse(frame: bytes, time: int) -> Message | None:
    (protocol,) = struct.unpack_from(">H", frame, 12)
    packet = frame[_ETH_HEADER:]
    if protocol == _IPV4 and packet[9] == socket.IPPROTO_UDP:
        source, destination, udp = packet[12:16], packet[16:20], packet[(packet[0] & 15) * 4 :]
    elif protocol == _IPV6 and packet[6] == socket.IPPROTO_UDP:
        source, destination, udp = packet[8:24], packet[24:40], packet[_IPV6_HEADER:]
    else:
        return None
    ports = struct.unpack_from(">HHH", udp)
    return Message(
        time=time,
        source=(str(ipaddress.ip_address(source)), ports[0]),
        destination=(str(ipaddress.ip_address(destination)), ports[1]),
        payload=udp[_UDP_HEADER : ports[2]],
    )
