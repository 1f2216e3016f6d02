"""Carry inner packets of every shape byte for byte, and packets longer than the MTU (`direct`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import V4_OF_A, V4_OF_B, V6_OF_B, Endpoint, allowed_ips, must_ping
from selftests.support.inner import Inside
from selftests.support.peers import renew
from selftests.support.shapes import SHAPES, datagram, ipv4

if TYPE_CHECKING:
    from harness import Tunnel

EVERYWHERE = ("0.0.0.0/0", "::/0")
# Keep B's stack from answering or reassembling what a packet socket has seen before it.
DROP_INSIDE = """\
table inet inside {
    chain prerouting {
        type filter hook prerouting priority -450
        iifname "wg0" counter drop comment "inner"
    }
}
"""
DEADLINE = 5.0
MARKER = ipv4(datagram(V4_OF_A, V4_OF_B, b"the last one", port=2222))
ECN = 0b11


@pytest.fixture
def connected(direct: Tunnel) -> Tunnel:
    """A tunnel with a session; each side allows every inner address."""
    direct.nodes["ns1"].add_address("veth1", "10.0.0.1/24", "fd00:aa::1/96")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24", "fd00:aa::2/96")
    renew(direct.a, direct.pub_b, endpoint=Endpoint("10.0.0.2", 2), allowed_ips=allowed_ips(*EVERYWHERE))
    direct.must_ping("ns1", V4_OF_B)
    return direct


def without_ecn(packet: bytes) -> bytes:
    """Return the packet with the ECN bits cleared, and without the IPv4 header checksum, which covers them."""
    if packet[0] >> 4 == 4:
        return packet[:1] + bytes([packet[1] & ~ECN]) + packet[2:10] + packet[12:]
    return packet[:1] + bytes([packet[1] & ~(ECN << 4)]) + packet[2:]


@pytest.mark.requirement("IF-17")
@pytest.mark.bug("IB-72")
def test_packets_of_every_shape_arrive_byte_for_byte(connected: Tunnel) -> None:
    connected.nodes["ns2"].nft(DROP_INSIDE)
    with Inside(connected.nodes["ns1"]) as at_a, Inside(connected.nodes["ns2"]) as at_b:
        for packet in SHAPES.values():
            at_a.send(packet)
        at_a.send(MARKER)
        # A tunnel keeps order: nothing can arrive after this one.
        arrived = [without_ecn(packet) for packet in at_b.wait_for(MARKER, DEADLINE, "the last packet at B")]
    names = {without_ecn(packet): name for name, packet in SHAPES.items()}
    changed = [packet.hex() for packet in arrived if packet not in names]
    missing = [name for packet, name in names.items() if packet not in arrived]
    assert (missing, changed) == ([], []), f"not delivered as they were sent: {', '.join(missing)}; arrived: {changed}"
    twice = [names[packet] for packet in names if arrived.count(packet) > 1]
    assert not twice, f"delivered more than once: {', '.join(twice)}"
    assert [names[packet] for packet in arrived] == list(SHAPES), "packets of one peer were delivered in another order"


@pytest.mark.requirement("MTU-08")
@pytest.mark.bug("IB-72")
@pytest.mark.parametrize("address", [V4_OF_B, V6_OF_B], ids=["v4", "v6"])
@pytest.mark.parametrize("size", [1600, 4000, 20000, 60000])
def test_pings_longer_than_mtu_are_answered(connected: Tunnel, address: str, size: int) -> None:
    must_ping(connected.nodes["ns1"], address, size=size)
