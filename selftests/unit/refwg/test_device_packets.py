"""Check what a device does at once with a packet of its interface, and with a datagram."""

from __future__ import annotations

import pytest

from refwg.boundary import LocalAddress, Transmit
from refwg.errors import DropReason
from refwg.ip import unreachable
from refwg.messages import SECOND, Initiation, MessageType
from selftests.support.packets import ip_packet, udp
from selftests.support.pair import Pair, arrived_at, connected, host_prefix

INITIATION, RESPONSE, DATA = MessageType.INITIATION, MessageType.RESPONSE, MessageType.DATA


# Packets from the interface.


@pytest.mark.requirement("ERR-02", "ERR-03")
@pytest.mark.parametrize("destination", ["10.9.9.9", "fd99::1"])
def test_packet_outside_allowed_ips_is_answered_by_icmp(destination: str) -> None:
    pair = Pair()
    packet = ip_packet("10.0.0.1" if "." in destination else "fd00::1", destination)
    pair.carry_out(pair.a, pair.a.device.send_packet(packet, 1420, 0))
    assert pair.a.icmp == [unreachable(packet)]
    assert pair.a.device.statistics.tx_errors == 1


@pytest.mark.requirement("ERR-04")
def test_packet_is_answered_not_staged_when_peer_has_no_endpoint() -> None:
    pair = Pair(endpoints=False)
    packet = pair.send(pair.a)
    assert pair.a.icmp == [unreachable(packet)]
    assert (len(pair.a.peer.staged), pair.log) == (0, [])
    assert pair.a.peer.statistics.drops[DropReason.NO_ENDPOINT] == 1


@pytest.mark.requirement("ERR-05")
@pytest.mark.parametrize("packet", [b"", b"\0" * 64, b"\x45" + bytes(10)])
def test_invalid_ip_packet_is_counted_as_tx_error_not_answered(packet: bytes) -> None:
    pair = Pair()
    assert pair.a.device.send_packet(packet, 1420, 0) == []
    assert pair.a.device.statistics.tx_errors == 1


@pytest.mark.requirement("IF-13")
def test_undelivered_packet_is_counted_for_peer_and_device() -> None:
    pair = Pair()
    pair.a.device.drop(DropReason.NOT_DELIVERED, pair.a.peer, 0)
    assert pair.a.peer.statistics.drops == pair.a.device.statistics.drops == {DropReason.NOT_DELIVERED: 1}


def test_packet_to_multicast_address_is_not_answered() -> None:
    assert Pair().a.device.send_packet(ip_packet("10.0.0.1", "224.0.0.1"), 1420, 0) == []


@pytest.mark.requirement("ROB-04", "AIP-01")
def test_routing_loop_check_drops_own_datagrams_only() -> None:
    pair = connected()
    pair.a.device.insert_allowed_ip(pair.a.peer, host_prefix("10.0.0.2"))
    (ours,) = pair.a.device.send_packet(ip_packet("10.9.9.9", "10.0.0.2", udp(5, 6)), 1420, pair.now)
    assert isinstance(ours, Transmit)
    looping = ip_packet("10.9.9.9", "10.0.0.2", udp(1, 2, ours.datagram))
    assert pair.a.device.send_packet(looping, 1420, pair.now) == []
    assert pair.a.peer.statistics.drops == {DropReason.ROUTING_LOOP: 1}
    strangers = ip_packet("10.9.9.9", "10.0.0.2", udp(1, 2, b"\4" + bytes(31)))
    (effect,) = pair.a.device.send_packet(strangers, 1420, pair.now)
    assert isinstance(effect, Transmit)


@pytest.mark.requirement("Q-01", "Q-02", "Q-03")
def test_last_129_of_300_packets_sent_before_session_arrive() -> None:
    pair = Pair()
    for number in range(300):
        pair.send(pair.a, number.to_bytes(2))
    pair.settle()
    assert [int.from_bytes(packet[-2:]) for packet in pair.b.delivered] == list(range(171, 300))
    assert pair.a.device.statistics.tx_dropped == 171


# Datagrams from the network.


@pytest.mark.requirement("MSG-09", "MSG-10", "DOS-10")
@pytest.mark.parametrize("datagram", [b"", b"\0", b"\1" * 148, b"\5" + bytes(147), bytes(32)])
def test_malformed_datagram_is_counted_and_not_answered(datagram: bytes) -> None:
    pair = Pair()
    pair.inject(pair.a, datagram)
    assert pair.log == []
    assert pair.a.device.statistics.drops[DropReason.MALFORMED] == 1


def test_device_that_is_down_drops_datagrams() -> None:
    pair = Pair(up=False)
    pair.inject(pair.a, bytes(148))
    assert pair.a.device.statistics.drops[DropReason.INTERFACE_DOWN] == 1


@pytest.mark.requirement("HS-01", "HS-02", "IF-11")
def test_first_packet_takes_three_messages() -> None:
    pair = Pair()
    packet = pair.send(pair.a)
    pair.settle()
    assert [(sent.sender, sent.type, len(sent.datagram)) for sent in pair.log] == [
        ("A", INITIATION, 148),
        ("B", RESPONSE, 92),
        ("A", DATA, 64),
    ]
    assert pair.b.delivered == [packet]
    assert (pair.a.peer.statistics.tx_bytes, pair.a.peer.statistics.rx_bytes) == (212, 92)
    assert (pair.b.peer.statistics.tx_bytes, pair.b.peer.statistics.rx_bytes) == (92, 212)


@pytest.mark.requirement("IF-12")
def test_byte_counters_after_ten_pings_equal_those_of_kernel() -> None:
    pair = Pair()
    for number in range(10):
        pair.send(pair.a, bytes([number]) * 64)
        pair.settle()
        pair.send(pair.b, bytes([number]) * 64)
        pair.settle()
    assert (pair.a.device.statistics.tx_bytes, pair.a.device.statistics.rx_bytes) == (1428, 1372)


@pytest.mark.requirement("RT-10", "RT-01")
def test_peer_without_endpoint_is_reachable_after_its_initiation() -> None:
    pair = Pair(endpoints=False)
    pair.a.peer.set_endpoint(pair.b.endpoint, 0)
    pair.connect()
    assert pair.b.peer.endpoint == arrived_at(pair.a.endpoint, pair.b)
    assert pair.send(pair.b)
    pair.settle()
    assert len(pair.a.delivered) == 1


@pytest.mark.requirement("RT-11", "RT-06")
def test_answer_has_source_address_that_peer_sent_to() -> None:
    pair = connected()
    pair.send(pair.b)
    assert pair.log[-1].endpoint.source == LocalAddress(pair.b.endpoint.address, 3)


@pytest.mark.requirement("ROB-14")
def test_packets_arrive_when_both_sides_initiate_at_once() -> None:
    pair = Pair()
    packets = [pair.send(pair.a), pair.send(pair.b)]
    pair.run(15 * SECOND)
    assert pair.b.delivered + pair.a.delivered == packets


@pytest.mark.requirement("MSG-16", "HS-39")
def test_initiations_share_no_field_except_zero_mac2() -> None:
    pair = Pair()
    pair.wire.filter = lambda _: False
    pair.send(pair.a)
    pair.run(6 * SECOND)
    first, second = (Initiation.parse(sent.datagram) for sent in pair.log)
    same = [name for name in Initiation.__slots__ if getattr(first, name) == getattr(second, name)]
    assert same == ["mac2"]
    assert pair.a.public_key not in pair.log[0].datagram
