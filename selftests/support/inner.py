"""Put packets into a tunnel and take them out, byte for byte, by packet sockets."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final, Self

from harness import wait_for
from harness.net.netns import enlarge_receive_buffer

if TYPE_CHECKING:
    from harness import NetNS

_ETH_P_ALL: Final = 3
_ETHERTYPE: Final = {4: 0x0800, 6: 0x86DD}
_BUFFER: Final = 8 << 20


class Inside:
    """Packet sockets on an interface under test; a context manager.

    `send` puts packets into its tunnel. `packets` has those it delivered, with a link header if there were one.
    """

    def __init__(self, node: NetNS, device: str = "wg0") -> None:
        self._device = device
        self._packets: list[bytes] = []
        # SOCK_RAW: with a link header, if there were one.
        self._socket = node.socket(socket.AF_PACKET, socket.SOCK_RAW)
        enlarge_receive_buffer(self._socket, _BUFFER)
        self._socket.bind((device, _ETH_P_ALL))
        self._socket.setblocking(False)
        # SOCK_DGRAM: a TUN device learns the protocol from the address only.
        self._sender = node.socket(socket.AF_PACKET, socket.SOCK_DGRAM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._sender.close()

    def send(self, packet: bytes) -> None:
        """Send a packet through the tunnel as if the node's stack had routed it to the interface."""
        self._sender.sendto(packet, (self._device, _ETHERTYPE[packet[0] >> 4]))

    def packets(self) -> list[bytes]:
        """Return the packets that the interface has delivered so far, oldest first."""
        while True:
            try:
                data, address = self._socket.recvfrom(1 << 17)
            except BlockingIOError:
                return list(self._packets)
            if address[2] != socket.PACKET_OUTGOING:
                self._packets.append(data)

    def wait_for(self, packet: bytes, deadline: float, what: str) -> list[bytes]:
        """Wait until a packet is delivered; returns the packets that were delivered before it."""
        return wait_for(_Delivered(self, packet), deadline, what)

    def fileno(self) -> int:
        return self._socket.fileno()


class _Delivered:
    """Event: this packet was delivered; its value is the list of the packets before it."""

    def __init__(self, inside: Inside, packet: bytes) -> None:
        self._inside = inside
        self._packet = packet

    def fileno(self) -> int:
        return self._inside.fileno()

    def look(self) -> list[bytes] | None:
        packets = self._inside.packets()
        return packets[: packets.index(self._packet)] if self._packet in packets else None

    def seen(self) -> str:
        return f"{len(self._inside.packets())} packets"
