"""Check a device under load: cookie replies, the rate limiter, the queue of handshakes."""

from __future__ import annotations

import pytest

from refwg.boundary import Transmit
from refwg.device import Device
from refwg.errors import DropReason
from refwg.messages import MILLISECOND, SECOND, CookieReply, MessageType
from refwg.queueing import LastUnderLoad
from refwg.ratelimiter import RateLimiter
from selftests.support.pair import FakeSockets, Pair, SeededEnvironment, arrived_at

RESPONSE, COOKIE = MessageType.RESPONSE, MessageType.COOKIE_REPLY


def flood(pair: Pair, count: int = 512) -> bytes:
    """Fill B's queue with copies of a valid initiation of A, and return the initiation."""
    pair.wire.filter = lambda _: False
    pair.send(pair.a)
    datagram = pair.log[-1].datagram
    for _ in range(count):
        pair.b.device.receive_datagram(datagram, arrived_at(pair.a.endpoint, pair.b), 0, pair.now)
    return datagram


@pytest.mark.requirement("DOS-03", "DOS-01", "CK-13")
def test_message_without_mac2_gets_cookie_reply_when_under_load() -> None:
    pair = Pair()
    flood(pair)
    effects = pair.b.device.process_handshakes(pair.now)
    replies = [effect.datagram for effect in effects if isinstance(effect, Transmit)]
    assert {len(reply) for reply in replies} == {64}
    assert (len(replies), pair.b.device.has_waiting_handshakes) == (512, False)
    assert pair.b.peer.endpoint == pair.a.endpoint
    assert pair.b.device.statistics.drops[DropReason.COOKIE_REQUIRED] == 512


@pytest.mark.requirement("DOS-04", "CK-10", "RL-06")
def test_message_with_mac2_gets_response_when_under_load() -> None:
    pair = Pair()
    flood(pair)
    (reply, *_) = pair.b.device.process_handshakes(pair.now, limit=1)
    assert isinstance(reply, Transmit)
    pair.inject(pair.a, reply.datagram)
    pair.run(6 * SECOND)
    retry = pair.log[-1].datagram
    flood(pair, 512)
    pair.b.device.receive_datagram(retry, arrived_at(pair.a.endpoint, pair.b), 0, pair.now)
    effects = pair.b.device.process_handshakes(pair.now)
    lengths = [len(effect.datagram) for effect in effects if isinstance(effect, Transmit)]
    assert lengths.count(92) == 1


@pytest.mark.requirement("DOS-02")
@pytest.mark.parametrize(("pause", "kind"), [(999 * MILLISECOND, COOKIE), (1000 * MILLISECOND, RESPONSE)])
def test_load_is_remembered_for_one_second(pause: int, kind: MessageType) -> None:
    pair = Pair()
    datagram = flood(pair)
    pair.b.device.process_handshakes(pair.now)
    pair.now += pause
    pair.inject(pair.b, datagram)
    assert pair.log[-1].type is kind


def retry_with_cookie(pair: Pair) -> bytes:
    """Bring B under load, so that A gets a cookie; return A's next initiation, which has a valid mac2."""
    flood(pair)
    (reply, *_) = pair.b.device.process_handshakes(pair.now)
    assert isinstance(reply, Transmit)
    pair.inject(pair.a, reply.datagram)
    pair.run(6 * SECOND)
    return pair.log[-1].datagram


@pytest.mark.requirement("RL-01", "RL-02")
def test_source_passes_five_messages_at_once_when_under_load() -> None:
    pair = Pair()
    retry = retry_with_cookie(pair)
    for _ in range(700):
        pair.b.device.receive_datagram(retry, arrived_at(pair.a.endpoint, pair.b), 0, pair.now)
    effects = pair.b.device.process_handshakes(pair.now, limit=20)
    assert [len(effect.datagram) for effect in effects if isinstance(effect, Transmit)] == [92]
    drops = pair.b.device.statistics.drops
    assert (drops[DropReason.OLD_TIMESTAMP], drops[DropReason.RATE_LIMITED]) == (4, 15 + 183)


@pytest.mark.requirement("RL-09", "DOS-10")
def test_rate_limiter_forgets_idle_sources_after_two_seconds() -> None:
    pair = Pair()
    limiter = pair.b.peer.shared.ratelimiter
    for host in range(100):
        limiter.allow(bytes([10, 1, 1, host]), pair.now)
    pair.run(SECOND)
    assert len(limiter) == 100
    pair.run(SECOND)
    assert (len(limiter), pair.b.device.next_deadline()) == (0, None)


@pytest.mark.requirement("NS-07", "DOS-09")
def test_devices_share_rate_limiter_that_they_are_given() -> None:
    limiter, last, environment = RateLimiter(), LastUnderLoad(), SeededEnvironment(1, int)
    first, second = (
        Device(environment, FakeSockets(), now=0, ratelimiter=limiter, last_under_load=last) for _ in range(2)
    )
    limiter.allow(b"\x0a\0\0\1", 0)
    assert first.next_deadline() == second.next_deadline() == SECOND


def test_next_deadline_is_earlier_of_timer_and_sweep() -> None:
    pair = Pair()
    pair.send(pair.a)
    device, limiter = pair.a.device, pair.a.peer.shared.ratelimiter
    retry = device.next_deadline()
    assert retry is not None
    assert 5 * SECOND <= retry < 6 * SECOND
    limiter.allow(b"\x0a\0\0\1", 0)
    assert device.next_deadline() == SECOND
    limiter.allow(b"\x0a\0\0\2", 6 * SECOND)
    assert device.next_deadline() == retry


@pytest.mark.requirement("DOS-07")
def test_handshake_messages_beyond_queue_are_counted_as_drops() -> None:
    pair = Pair()
    flood(pair, 4100)
    assert pair.b.device.statistics.drops[DropReason.HANDSHAKE_QUEUE_FULL] == 4


@pytest.mark.requirement("DOS-04", "DOS-07")
def test_full_queue_takes_message_with_valid_mac2() -> None:
    pair = Pair()
    retry = retry_with_cookie(pair)
    forged = retry[:-1] + bytes([retry[-1] ^ 1])
    for datagram in [forged] * 5000 + [retry]:
        pair.b.device.receive_datagram(datagram, arrived_at(pair.a.endpoint, pair.b), 0, pair.now)
    (first,) = pair.b.device.process_handshakes(pair.now, limit=1)
    assert isinstance(first, Transmit)
    assert (first.datagram[0], pair.b.device.statistics.drops[DropReason.HANDSHAKE_QUEUE_FULL]) == (RESPONSE, 904)


@pytest.mark.requirement("DOS-05", "DOS-07")
def test_wrong_mac1_takes_no_place_and_causes_no_load() -> None:
    pair = Pair()
    datagram = flood(pair, 1)
    pair.b.device.process_handshakes(pair.now)
    wrong = datagram[:-17] + bytes([datagram[-17] ^ 1]) + datagram[-16:]
    for _ in range(5000):
        pair.b.device.receive_datagram(wrong, arrived_at(pair.a.endpoint, pair.b), 0, pair.now)
    assert not pair.b.device.has_waiting_handshakes
    assert pair.b.device.statistics.drops[DropReason.INVALID_MAC1] == 5000
    pair.run(6 * SECOND)
    pair.inject(pair.b, pair.log[-1].datagram)
    assert pair.log[-1].type is RESPONSE


@pytest.mark.requirement("CK-11", "DOS-07")
def test_cookie_reply_with_unknown_index_takes_no_place() -> None:
    pair = Pair()
    reply = CookieReply(receiver_index=7, nonce=bytes(24), encrypted_cookie=bytes(32)).to_bytes()
    pair.b.device.receive_datagram(reply, pair.a.endpoint, 0, pair.now)
    assert not pair.b.device.has_waiting_handshakes
    assert pair.b.device.statistics.drops[DropReason.UNKNOWN_INDEX] == 1


@pytest.mark.requirement("CK-11")
def test_queued_cookie_reply_to_removed_peer_is_dropped() -> None:
    pair = Pair()
    flood(pair)
    (reply, *_) = pair.b.device.process_handshakes(pair.now)
    assert isinstance(reply, Transmit)
    pair.a.device.receive_datagram(reply.datagram, pair.b.endpoint, 0, pair.now)
    pair.a.device.remove_peer(pair.a.peer, pair.now)
    assert pair.a.device.process_handshakes(pair.now) == []
    assert pair.a.device.statistics.drops[DropReason.UNKNOWN_INDEX] == 1


@pytest.mark.requirement("DOS-05", "DOS-06")
def test_message_with_wrong_mac1_gets_no_reply_when_under_load() -> None:
    pair = Pair()
    datagram = flood(pair)
    pair.b.device.process_handshakes(pair.now)
    pair.inject(pair.b, datagram[:-17] + bytes([datagram[-17] ^ 1]) + datagram[-16:])
    assert len(pair.log) == 1
