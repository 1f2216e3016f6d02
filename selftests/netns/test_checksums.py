"""Check outer and inner checksums, which the stack leaves to the device (`direct`)."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest

from harness import V4_OF_B, V6_OF_B, Datagram, Endpoint, set_offloads, udp_message, wait_for
from harness.net.checksum import checksum

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import NetNS, Tunnel

TCP, UDP = 6, 17
PORT = 1111
ETH_P_ALL = 3
DEADLINE = 5.0


def tap(node: NetNS, device: str) -> socket.socket:
    """Return a socket that receives the IP packets of a device without link headers."""
    sock = node.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    sock.bind((device, ETH_P_ALL))
    return sock


def carries(protocol: int, port: int) -> Callable[[bytes], bool]:
    """Return a predicate for packets of this protocol to this port."""

    def accept(packet: bytes) -> bool:
        kind, payload = parts(packet)[1:]
        return kind == protocol and struct.unpack_from(">H", payload, 2)[0] == port

    return accept


def parts(packet: bytes) -> tuple[bytes, int, bytes]:
    """Split an IP packet into its addresses, protocol and payload."""
    if packet[0] >> 4 == 4:
        return packet[12:20], packet[9], packet[(packet[0] & 15) * 4 : struct.unpack_from(">H", packet, 2)[0]]
    return packet[8:40], packet[6], packet[40 : 40 + struct.unpack_from(">H", packet, 4)[0]]


def has_right_checksum(packet: bytes) -> bool:
    """Return whether the TCP or UDP checksum is present and correct."""
    addresses, protocol, payload = parts(packet)
    given = payload[16:18] if protocol == TCP else payload[6:8]
    return given != bytes(2) and checksum(addresses + struct.pack(">HH", protocol, len(payload)) + payload) == 0


@pytest.mark.requirement("MSG-18")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.parametrize("host", ["10.0.0.2", "fd00:aa::2"], ids=["v4", "v6"])
def test_outer_datagrams_have_correct_udp_checksum(direct: Tunnel, host: str) -> None:
    connect(direct, host)
    # With tx offload the stack would leave the checksum to the device, and a veth computes none.
    set_offloads(direct.nodes["ns1"], "veth1", tx=False)
    with tap(direct.nodes["ns1"], "veth1") as wire:
        direct.must_ping("ns1", V4_OF_B)
        sent = [wait_for(Datagram(wire, carries(UDP, 2)), DEADLINE, "a datagram of A")[0] for _ in range(2)]
    assert all(has_right_checksum(packet) for packet in sent)


@pytest.mark.requirement("DT-31")
@pytest.mark.parametrize("address", [V4_OF_B, V6_OF_B], ids=["v4", "v6"])
def test_inner_packets_have_correct_transport_checksums(direct: Tunnel, address: str) -> None:
    connect(direct, "10.0.0.2")
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with tap(ns2, "wg0") as inside, ns1.socket(family, socket.SOCK_STREAM) as client:
        udp_message(ns1, address, PORT, b"odd")
        client.setblocking(False)
        client.connect_ex((address, PORT))
        for protocol, name in ((UDP, "datagram"), (TCP, "SYN")):
            packet, _ = wait_for(Datagram(inside, carries(protocol, PORT)), DEADLINE, f"the {name} at B")
            assert has_right_checksum(packet), f"the {name} arrived with a wrong checksum: {packet.hex()}"


def connect(direct: Tunnel, host: str) -> None:
    direct.nodes["ns1"].add_address("veth1", "10.0.0.1/24", "fd00:aa::1/96")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24", "fd00:aa::2/96")
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint(host, 2))
