"""Check that plaintext and ciphertext never appear in the same namespace (`loopback`)."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest

from harness import V4_OF_B, Datagram, udp_message, udp_receiver, wait_for

if TYPE_CHECKING:
    from harness import NetNS, Tunnel

PORT = 1111
SECRET = b"for B only"
ETH_P_ALL = 3
DEADLINE = 5.0
# The UDP destination ports of both sides, and the first four bytes of a data message.
SEALED = tuple(struct.pack(">H", port) for port in (1, 2)), b"\4\0\0\0"


@pytest.mark.requirement("NS-03")
def test_namespace_sees_only_its_own_side_of_tunnel(loopback: Tunnel) -> None:
    ns0, ns1, ns2 = (loopback.nodes[name] for name in ("ns0", "ns1", "ns2"))
    with tap(ns0) as outside, tap(ns1) as inside, udp_receiver(ns2, V4_OF_B, PORT) as receiver:
        udp_message(ns1, V4_OF_B, PORT, SECRET)
        wait_for(Datagram(receiver), DEADLINE, "the datagram at B")
        sealed, plain = packets(outside), packets(inside)
    assert any(is_sealed(packet) for packet in sealed), "the test proved nothing: no data message passed ns0"
    assert not any(SECRET in packet for packet in sealed), "plaintext appeared in ns0, which has the sockets"
    assert any(SECRET in packet for packet in plain), "the test proved nothing: no plaintext passed ns1"
    assert not any(is_sealed(packet) for packet in plain), "ciphertext appeared in ns1, which has the interface"


def tap(node: NetNS) -> socket.socket:
    """Return a socket that receives every packet of every device of a node, without link headers."""
    return node.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))


def packets(tapped: socket.socket) -> list[bytes]:
    """Return all packets that a tap has received so far."""
    seen: list[bytes] = []
    while True:
        try:
            seen.append(tapped.recv(65535, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return seen


def is_sealed(packet: bytes) -> bool:
    ports, message_type = SEALED
    return packet[22:24] in ports and packet[28:32] == message_type
