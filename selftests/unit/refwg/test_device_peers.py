"""Check a device whose peers move, share an address, or answer messages that were replaced."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import pytest

from refwg.boundary import Deliver, Endpoint, Transmit
from refwg.errors import DropReason
from refwg.messages import SECOND, Data, MessageType
from selftests.support.packets import ip_packet, udp
from selftests.support.pair import Pair, Side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refwg.device import Effect
    from refwg.peer import Peer

INITIATION, RESPONSE, DATA = MessageType.INITIATION, MessageType.RESPONSE, MessageType.DATA


@pytest.mark.requirement("HS-22", "HS-16")
def test_response_to_superseded_initiation_is_ignored() -> None:
    pair = Pair()
    pair.wire.filter = lambda sent: sent.type is INITIATION
    pair.send(pair.a)
    pair.run(6 * SECOND)
    late, current = pair.sent(pair.b, RESPONSE)
    pair.inject(pair.a, late.datagram)
    assert pair.a.device.statistics.drops == {DropReason.UNKNOWN_INDEX: 1}
    assert pair.a.peer.keypairs.current is None
    pair.inject(pair.a, current.datagram)
    assert pair.a.peer.keypairs.current is not None


@pytest.mark.requirement("DT-17", "DT-15")
def test_data_packet_on_replaced_unconfirmed_session_is_dropped() -> None:
    pair = Pair()
    pair.wire.filter = lambda sent: sent.type is not DATA
    for _ in range(2):
        pair.send(pair.a)
        pair.settle()
        pair.run(6 * SECOND)
        pair.a.device.clear_keys(pair.now)
    first, second = pair.sent(pair.a, DATA)
    for late in (first, second):
        pair.inject(pair.b, late.datagram)
    assert (pair.b.device.statistics.drops, len(pair.b.delivered)) == ({DropReason.UNKNOWN_INDEX: 1}, 1)


@pytest.mark.requirement("RT-19", "RT-06")
def test_endpoint_follows_peer_when_nat_changes_its_port() -> None:
    pair = Pair()
    pair.connect()
    pair.a.endpoint = Endpoint(pair.a.endpoint.address, 4242)
    sent = pair.send(pair.b)
    pair.settle()
    assert pair.a.delivered == []
    pair.send(pair.a)
    pair.settle()
    answer = pair.send(pair.b, b"answer")
    pair.settle()
    assert (pair.a.delivered, sent != answer) == ([answer], True)


@pytest.mark.requirement("Q-04", "Q-05", "DT-01")
def test_packets_leave_and_arrive_in_order_of_their_counters() -> None:
    pair = Pair()
    packets = [pair.send(pair.a, bytes([number])) for number in range(50)]
    pair.settle()
    packets += [pair.send(pair.a, bytes([number])) for number in range(50, 60)]
    pair.settle()
    counters = [Data.parse(sent.datagram).counter for sent in pair.sent(pair.a, DATA)]
    assert (counters, pair.b.delivered) == ([*range(60)], packets)


@pytest.mark.requirement("MTU-13", "ROB-08")
@pytest.mark.parametrize("size", [34736, 65535])
def test_jumbo_packet_is_carried_whole(size: int) -> None:
    pair = Pair()
    pair.connect()
    packet = ip_packet(pair.a.inner[4], pair.b.inner[4], bytes(size - 20))
    pair.carry_out(pair.a, pair.a.device.send_packet(packet, size, pair.now))
    pair.settle()
    assert pair.b.delivered == [packet]


@pytest.mark.requirement("IF-18")
def test_packet_with_wrong_checksums_is_delivered_unchanged() -> None:
    pair = Pair()
    pair.connect()
    packet = bytearray(ip_packet(pair.a.inner[4], pair.b.inner[4], udp(1, 2)))
    packet[10] ^= 0xFF
    packet[26:28] = b"\xde\xad"
    pair.carry_out(pair.a, pair.a.device.send_packet(bytes(packet), 1420, pair.now))
    pair.settle()
    assert pair.b.delivered == [bytes(packet)]


class Hub:
    """A device with two peers behind one address and port; everything sent arrives at once."""

    SHARED = Endpoint(b"\x0a\0\0\x63", 99)

    def __init__(self) -> None:
        self.hub, self.left, self.right = (Side(name, number, int, number) for number, name in enumerate("HLR", 1))
        for spoke in (self.left, self.right):
            self.hub.add_peer(spoke, 0).set_endpoint(self.SHARED, 0)
            spoke.add_peer(self.hub, 0).set_endpoint(self.hub.endpoint, 0)
        for side in (self.hub, self.left, self.right):
            side.device.up(0)

    def carry_out(self, side: Side, effects: Sequence[Effect]) -> None:
        waiting = deque((side, effect) for effect in effects)
        while waiting:
            sender, effect = waiting.popleft()
            if isinstance(effect, Deliver):
                sender.delivered.append(effect.packet)
            if isinstance(effect, Transmit):
                receiver, source = self._route(sender, effect)
                effects = receiver.device.receive_datagram(effect.datagram, source, 0, 0)
                waiting += ((receiver, later) for later in [*effects, *receiver.device.process_handshakes(0)])

    def _route(self, sender: Side, effect: Transmit[Peer]) -> tuple[Side, Endpoint]:
        if sender is not self.hub:
            return self.hub, self.SHARED
        assert effect.endpoint == self.SHARED
        assert effect.peer is not None
        return (self.left if effect.peer.public_key == self.left.public_key else self.right), self.hub.endpoint


@pytest.mark.requirement("RT-20", "MSG-11")
def test_peers_behind_one_endpoint_are_distinguished_by_index() -> None:
    net = Hub()
    packets = []
    for spoke in (net.left, net.right, net.left):
        packets.append(ip_packet(spoke.inner[4], net.hub.inner[4], spoke.name.encode()))
        net.carry_out(spoke, spoke.device.send_packet(packets[-1], 1420, 0))
    assert net.hub.delivered == packets
    for spoke in (net.left, net.right):
        answer = ip_packet(net.hub.inner[4], spoke.inner[4])
        net.carry_out(net.hub, net.hub.device.send_packet(answer, 1420, 0))
        assert spoke.delivered == [answer]
