"""Check what a device does as time passes, not what it does at once."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from refwg.boundary import Transmit
from refwg.errors import DropReason
from refwg.messages import MILLISECOND, SECOND, MessageType
from refwg.timers import Timer
from selftests.support.packets import ip_packet
from selftests.support.pair import Pair, connected

if TYPE_CHECKING:
    from selftests.support.pair import Sent

INITIATION, RESPONSE, COOKIE, DATA = MessageType


def times(sent: list[Sent]) -> list[float]:
    return [message.time / SECOND for message in sent]


def keepalives(pair: Pair) -> list[Sent]:
    return [sent for sent in pair.log if sent.type is DATA and len(sent.datagram) == 32]


@pytest.mark.requirement("TM-03", "TM-04", "TM-05")
def test_initiations_stop_after_twenty_attempts() -> None:
    pair = Pair()
    pair.wire.filter = lambda _: False
    pair.send(pair.a)
    pair.run(300 * SECOND)
    sent = pair.sent(pair.a, INITIATION)
    gaps = [later - earlier for earlier, later in zip(times(sent), times(sent)[1:], strict=False)]
    assert (len(sent), len(set(gaps))) == (20, 19)
    assert all(5 <= gap <= 5.334 for gap in gaps)
    assert pair.a.device.statistics.tx_dropped == 1


@pytest.mark.requirement("TM-06")
def test_initiations_do_not_stop_under_steady_traffic() -> None:
    pair = Pair()
    pair.wire.filter = lambda _: False
    for _ in range(60):
        pair.send(pair.a)
        pair.run(3 * SECOND)
    assert len(pair.sent(pair.a, INITIATION)) > 33


@pytest.mark.requirement("TM-24")
def test_initiations_do_not_stop_with_persistent_keepalive() -> None:
    pair = Pair()
    pair.wire.filter = lambda _: False
    pair.a.device.set_persistent_keepalive(pair.a.peer, 7)
    pair.carry_out(pair.a, pair.a.device.peer_configured(pair.a.peer, 0, wants_keepalive=True))
    pair.run(135 * SECOND)
    sent = times(pair.sent(pair.a, INITIATION))
    assert len(sent) > 24
    assert max(later - earlier for earlier, later in itertools.pairwise(sent)) < 8


@pytest.mark.requirement("TM-10", "TM-29")
def test_unanswered_data_gets_one_keepalive_after_ten_seconds() -> None:
    pair = connected()
    pair.run(60 * SECOND)
    pair.forget()
    start = pair.now / SECOND
    pair.send(pair.a)
    pair.run(60 * SECOND)
    (keepalive,) = keepalives(pair)
    assert keepalive.sender == "B"
    assert keepalive.time / SECOND == pytest.approx(start + 10.01)
    assert len(pair.log) == 2


@pytest.mark.requirement("TM-14")
def test_one_way_stream_gets_keepalive_every_ten_seconds() -> None:
    pair = connected()
    pair.run(60 * SECOND)
    pair.forget()
    for _ in range(70):
        pair.send(pair.a)
        pair.run(SECOND // 2)
    assert len([sent for sent in keepalives(pair) if sent.sender == "B"]) == 3


@pytest.mark.requirement("TM-16", "RT-15")
def test_initiation_is_sent_15_seconds_after_unanswered_data() -> None:
    pair = connected()
    pair.run(60 * SECOND)
    pair.wire.filter = lambda sent: sent.sender == "A"
    pair.forget()
    start = pair.now / SECOND
    pair.send(pair.a)
    assert pair.log[-1].endpoint.source is not None
    pair.run(16 * SECOND)
    (sent,) = pair.sent(pair.a, INITIATION)
    assert start + 15 <= sent.time / SECOND <= start + 15.334
    assert sent.endpoint.source is None


@pytest.mark.requirement("TM-20", "TM-23")
def test_persistent_keepalives_start_when_up_and_keep_interval() -> None:
    pair = Pair(up=False)
    pair.a.device.set_persistent_keepalive(pair.a.peer, 3)
    for side in (pair.a, pair.b):
        pair.carry_out(side, side.device.up(0))
    pair.run(10 * SECOND)
    assert pair.log[0].type is INITIATION
    assert times(keepalives(pair)) == pytest.approx([0.02, 3.02, 6.02, 9.02])


@pytest.mark.requirement("TM-27", "Q-09")
def test_keys_are_gone_after_540_seconds() -> None:
    pair = connected()
    session = pair.a.peer.keypairs.current
    assert session is not None
    pair.run(session.birthdate + 540 * SECOND - 1 - pair.now)
    assert len(pair.a.peer.shared.indices) == 1
    pair.run(1)
    assert pair.a.peer.keypairs.current is None
    assert len(pair.a.peer.shared.indices) == 0


@pytest.mark.requirement("TM-07", "HS-37", "TM-30")
def test_steady_stream_is_rekeyed_without_loss() -> None:
    pair = connected()
    packets = []
    for number in range(700):
        packets.append(pair.send(pair.a, number.to_bytes(2)))
        pair.run(SECOND)
    pair.settle()
    assert pair.b.delivered == packets
    assert 4 <= len(pair.sent(pair.a, INITIATION)) <= 6
    assert pair.sent(pair.b, INITIATION) == []


@pytest.mark.requirement("TM-16", "ERR-07")
def test_unsent_datagram_is_not_counted_and_starts_no_timer() -> None:
    pair = connected()
    pair.run(60 * SECOND)
    before = pair.a.peer.statistics.tx_bytes
    packet = ip_packet(pair.a.inner[4], pair.b.inner[4])
    (effect,) = pair.a.device.send_packet(packet, 1420, pair.now)
    assert isinstance(effect, Transmit)
    pair.a.device.send_failed(effect, pair.now, "network unreachable")
    assert pair.a.peer.statistics.tx_bytes == before
    assert pair.a.peer.timers.deadline_of(Timer.NEW_HANDSHAKE) is None
    assert pair.a.peer.statistics.drops[DropReason.SEND_FAILED] == 1


@pytest.mark.requirement("TM-16", "ERR-07")
@pytest.mark.parametrize(("error", "is_taken"), [("EPERM", True), ("ENOBUFS", True), ("ENETUNREACH", False)])
def test_datagram_lost_after_routing_starts_timer(error: str, is_taken: bool) -> None:
    pair = connected()
    pair.run(60 * SECOND)
    before = pair.a.peer.statistics.tx_bytes
    (effect,) = pair.a.device.send_packet(ip_packet(pair.a.inner[4], pair.b.inner[4]), 1420, pair.now)
    assert isinstance(effect, Transmit)
    pair.a.device.send_failed(effect, pair.now, error)
    assert pair.a.peer.statistics.tx_bytes == before + is_taken * len(effect.datagram)
    assert (pair.a.peer.timers.deadline_of(Timer.NEW_HANDSHAKE) is not None) is is_taken
    assert pair.a.peer.statistics.drops[DropReason.SEND_FAILED] == 1


@pytest.mark.requirement("IF-11")
def test_sent_cookie_reply_is_not_counted_in_tx_bytes() -> None:
    pair = Pair()
    pair.a.device.sent(Transmit(bytes(64), pair.b.endpoint, 0, None), 0)
    assert pair.a.device.statistics.tx_bytes == 0


@pytest.mark.requirement("ROB-12")
def test_lossy_link_delivers_most_packets_and_none_twice() -> None:
    pair = Pair(seed=7)
    pair.wire.loss, pair.wire.reordering = 0.1, 50 * MILLISECOND
    for number in range(500):
        pair.send(pair.a, number.to_bytes(2))
        pair.run(SECOND // 2)
    pair.settle()
    assert len(pair.b.delivered) == len(set(pair.b.delivered)) > 400
