from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from refwg.boundary import Endpoint
from refwg.errors import DropReason
from refwg.ip import CE
from refwg.messages import (
    LAST_MINUTE_REKEY,
    REJECT_AFTER_MESSAGES,
    REJECT_AFTER_TIME,
    SECOND,
    CookieReply,
    Data,
    Initiation,
    MessageType,
    Response,
)
from refwg.timers import Timer
from selftests.support.packets import ip_packet
from selftests.support.pair import Pair, arrived_at, connected, host_prefix

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.peer import Peer
    from selftests.support.pair import Side

INITIATION, RESPONSE, DATA = MessageType.INITIATION, MessageType.RESPONSE, MessageType.DATA
ELSEWHERE = Endpoint(b"\x0a\0\0\x63", 99)


def sealed(sender: Peer, plaintext: bytes, counter: int | None = None) -> bytes:
    """A data message of the sender's current session with this plaintext and counter."""
    keypair = sender.keypairs.current
    assert keypair is not None
    number = keypair.sending_counter if counter is None else counter
    keypair.sending_counter = max(keypair.sending_counter, min(number + 1, 2**60))
    ciphertext = keypair.sending.seal(number, plaintext)
    return Data(receiver_index=keypair.remote_index, counter=number, ciphertext=ciphertext).to_bytes()


def drops(side: Side) -> list[DropReason]:
    return sorted(side.device.statistics.drops.elements(), key=lambda reason: reason.name)


def from_a(pair: Pair, payload: bytes = b"payload") -> bytes:
    return ip_packet(pair.a.inner[4], pair.b.inner[4], payload)


@pytest.mark.requirement("HS-06", "DOS-10")
def test_unknown_initiator_gets_no_response() -> None:
    pair = Pair()
    pair.b.device.remove_all_peers(0)
    pair.send(pair.a)
    pair.settle()
    assert pair.sent(pair.b, RESPONSE) == []
    assert drops(pair.b) == [DropReason.UNKNOWN_PEER]


@pytest.mark.requirement("HS-04", "RT-04")
def test_initiation_with_invalid_mac1_is_dropped() -> None:
    pair = Pair(endpoints=False)
    pair.a.peer.set_endpoint(pair.b.endpoint, 0)
    pair.wire.filter = lambda _: False
    pair.send(pair.a)
    datagram = bytearray(pair.log[0].datagram)
    datagram[116] ^= 1
    pair.inject(pair.b, bytes(datagram))
    assert (pair.b.peer.endpoint, drops(pair.b)) == (None, [DropReason.INVALID_MAC1])


@pytest.mark.requirement("HS-09", "RT-04")
def test_replayed_initiation_is_dropped_and_keeps_endpoint() -> None:
    pair = Pair()
    pair.send(pair.a)
    initiation = pair.log[0].datagram
    pair.settle()
    pair.run(SECOND)
    pair.forget()
    pair.inject(pair.b, initiation, source=ELSEWHERE)
    assert pair.log == []
    assert pair.b.peer.endpoint == arrived_at(pair.a.endpoint, pair.b)
    assert drops(pair.b) == [DropReason.OLD_TIMESTAMP]


@pytest.mark.requirement("HS-17", "HS-19")
def test_replayed_response_is_dropped_and_keeps_endpoint() -> None:
    pair = Pair()
    pair.send(pair.a)
    pair.settle()
    response = pair.sent(pair.b, RESPONSE)[0].datagram
    pair.forget()
    pair.inject(pair.a, response, source=ELSEWHERE)
    assert (pair.log, drops(pair.a)) == ([], [DropReason.UNKNOWN_INDEX])
    assert pair.a.peer.endpoint == arrived_at(pair.b.endpoint, pair.a)


@pytest.mark.requirement("HS-18", "HS-23")
def test_response_to_abandoned_initiation_is_dropped() -> None:
    pair = Pair()
    pair.send(pair.a)
    pair.send(pair.b)
    pair.settle()
    assert drops(pair.a) == drops(pair.b) == [DropReason.UNKNOWN_INDEX]


@pytest.mark.requirement("HS-07", "RT-04")
def test_initiation_with_corrupt_static_key_is_dropped() -> None:
    pair = Pair()
    pair.wire.filter = lambda _: False
    pair.send(pair.a)
    forged = replace(Initiation.parse(pair.log[0].datagram), encrypted_static=bytes(48))
    pair.inject(pair.b, pair.a.peer.cookie.add_macs(forged.to_bytes(), 0), source=ELSEWHERE)
    assert (len(pair.log), drops(pair.b)) == (1, [DropReason.INVALID_TAG])
    assert pair.b.peer.endpoint == pair.a.endpoint


@pytest.mark.requirement("HS-18", "RT-04")
def test_response_with_wrong_tag_leaves_handshake_pending() -> None:
    pair = Pair()
    pair.wire.filter = lambda sent: sent.type is not RESPONSE
    pair.send(pair.a)
    pair.settle()
    genuine = pair.sent(pair.b, RESPONSE)[0].datagram
    forged = replace(Response.parse(genuine), encrypted_nothing=bytes(16))
    pair.inject(pair.a, pair.b.peer.cookie.add_macs(forged.to_bytes(), 0), source=ELSEWHERE)
    assert (pair.a.peer.endpoint, drops(pair.a)) == (pair.b.endpoint, [DropReason.INVALID_TAG])
    pair.inject(pair.a, genuine)
    pair.settle()
    assert len(pair.b.delivered) == 1


@pytest.mark.requirement("RT-02", "HS-02")
def test_endpoint_is_updated_by_response_from_other_address() -> None:
    pair = Pair()
    pair.wire.filter = lambda sent: sent.type is not RESPONSE
    pair.send(pair.a)
    pair.settle()
    pair.inject(pair.a, pair.sent(pair.b, RESPONSE)[0].datagram, source=ELSEWHERE)
    assert pair.a.peer.endpoint == arrived_at(ELSEWHERE, pair.a)
    assert pair.log[-1].endpoint == pair.a.peer.endpoint


@pytest.mark.requirement("CK-10", "CK-14", "CK-13")
@pytest.mark.parametrize("kind", [INITIATION, RESPONSE])
def test_cookie_reply_sets_cookie_and_changes_nothing_else(kind: MessageType) -> None:
    pair = Pair()
    pair.wire.filter = lambda sent: sent.type is INITIATION
    pair.send(pair.a)
    pair.settle()
    sender, issuer = (pair.a, pair.b) if kind is INITIATION else (pair.b, pair.a)
    message = pair.sent(sender, kind)[0].datagram
    index = int.from_bytes(message[4:8], "little")
    reply = issuer.peer.shared.cookie_checker.create_reply(message, index, bytes(4), 1, pair.now)
    pair.forget()
    before = (sender.peer.endpoint, sender.peer.statistics.rx_bytes, sender.peer.timers.next_deadline())
    pair.inject(sender, reply.to_bytes(), source=ELSEWHERE)
    assert (sender.peer.endpoint, sender.peer.statistics.rx_bytes, sender.peer.timers.next_deadline()) == before
    assert (pair.log, drops(sender)) == ([], [])
    assert sender.peer.cookie.add_macs(bytes(148), pair.now)[-16:] != bytes(16)


def initiation(pair: Pair, *, mac1: bool, mac2: bool) -> bytes:
    """An initiation of A that B has not received, with right or wrong macs."""
    pair.wire.filter = lambda _: False
    pair.send(pair.a)
    first = pair.log[0].datagram
    index, sender = int.from_bytes(first[4:8], "little"), pair.a.endpoint
    checker = pair.b.peer.shared.cookie_checker
    pair.inject(pair.a, checker.create_reply(first, index, sender.address, sender.port, pair.now).to_bytes())
    pair.run(6 * SECOND)
    message = bytearray(pair.log[-1].datagram)
    message[116] ^= not mac1
    message[147] ^= not mac2
    return bytes(message)


PROCESSED = None
COOKIE_REQUIRED, RATE_LIMITED, BAD_MAC1 = DropReason.COOKIE_REQUIRED, DropReason.RATE_LIMITED, DropReason.INVALID_MAC1


@pytest.mark.requirement("DOS-03", "DOS-04", "DOS-05")
@pytest.mark.parametrize(
    ("mac1", "load", "mac2", "tokens", "fate", "tokens_left"),
    [
        (False, False, True, 1, BAD_MAC1, 1),
        (False, True, True, 1, BAD_MAC1, 1),
        (True, False, True, 0, PROCESSED, 0),
        (True, False, False, 1, PROCESSED, 1),
        (True, True, False, 1, COOKIE_REQUIRED, 1),
        (True, True, True, 0, RATE_LIMITED, 0),
        (True, True, True, 1, PROCESSED, 0),
    ],
)
def test_macs_load_and_tokens_decide_handshake_outcome(
    *, mac1: bool, load: bool, mac2: bool, tokens: int, fate: DropReason | None, tokens_left: int
) -> None:
    pair = Pair()
    datagram = initiation(pair, mac1=mac1, mac2=mac2)
    limiter = pair.b.peer.shared.ratelimiter
    for _ in range(5 - tokens):
        limiter.allow(pair.a.endpoint.address, pair.now)
    pair.b.last_under_load.time = pair.now if load else None
    pair.forget()
    pair.inject(pair.b, datagram)
    answer = {PROCESSED: [RESPONSE], COOKIE_REQUIRED: [MessageType.COOKIE_REPLY]}.get(fate, [])
    assert ([sent.type for sent in pair.log], drops(pair.b)) == (answer, [] if fate is PROCESSED else [fate])
    assert [limiter.allow(pair.a.endpoint.address, pair.now) for _ in range(2)] == [tokens_left == 1, False]


@pytest.mark.requirement("CK-11", "DT-13", "HS-18")
def test_drops_are_counted_per_peer_once_peer_is_known() -> None:
    pair = Pair()
    pair.wire.filter = lambda sent: sent.type is not RESPONSE
    pair.send(pair.a)
    pair.settle()
    index = pair.a.peer.handshake.local_index
    assert index is not None
    response = Response(sender_index=1, receiver_index=index, ephemeral=bytes(32), encrypted_nothing=bytes(16))
    pair.inject(pair.a, pair.b.peer.cookie.add_macs(response.to_bytes(), 0))
    reply = CookieReply(receiver_index=index, nonce=bytes(24), encrypted_cookie=bytes(32))
    pair.inject(pair.a, reply.to_bytes())
    pair.inject(pair.a, pair.sent(pair.b, RESPONSE)[0].datagram)
    session = pair.a.peer.keypairs.current
    assert session is not None
    pair.inject(pair.a, Data(receiver_index=session.local_index, counter=0, ciphertext=bytes(16)).to_bytes())
    assert pair.a.peer.statistics.drops == {DropReason.LOW_ORDER_POINT: 1, DropReason.INVALID_TAG: 2}
    pair.inject(pair.b, pair.sent(pair.a, INITIATION)[0].datagram)
    assert pair.b.peer.statistics.drops == {DropReason.OLD_TIMESTAMP: 1}


@pytest.mark.requirement("CK-11")
def test_unexpected_cookie_replies_are_counted_as_drops() -> None:
    pair = connected()
    keypair = pair.a.peer.keypairs.current
    assert keypair is not None
    for index in (keypair.local_index, keypair.local_index ^ 1):
        reply = CookieReply(receiver_index=index, nonce=bytes(24), encrypted_cookie=bytes(32))
        pair.inject(pair.a, reply.to_bytes())
    assert drops(pair.a) == [DropReason.INVALID_TAG, DropReason.UNKNOWN_INDEX]


@pytest.mark.requirement("DT-12", "HS-17")
def test_receiver_index_of_wrong_kind_is_unknown() -> None:
    pair = connected()
    pair.wire.filter = lambda _: False
    pair.run(6 * SECOND)
    pair.a.peer.keypairs.forbid_sending()
    pair.send(pair.a)
    pending = pair.a.peer.handshake.local_index
    assert pending is not None
    pair.inject(pair.a, Data(receiver_index=pending, counter=0, ciphertext=bytes(16)).to_bytes())
    session = pair.a.peer.keypairs.current
    assert session is not None
    response = Response(
        sender_index=1, receiver_index=session.local_index, ephemeral=bytes(32), encrypted_nothing=bytes(16)
    )
    pair.inject(pair.a, pair.b.peer.cookie.add_macs(response.to_bytes(), 0))
    assert drops(pair.a) == [DropReason.UNKNOWN_INDEX, DropReason.UNKNOWN_INDEX]


@pytest.mark.requirement("DT-03", "DT-13", "RT-04")
def test_replayed_and_forged_data_changes_nothing() -> None:
    pair = connected()
    datagram = sealed(pair.a.peer, from_a(pair))
    pair.inject(pair.b, datagram)
    before = (pair.b.peer.endpoint, pair.b.peer.statistics.rx_bytes, len(pair.b.delivered))
    forged = sealed(pair.a.peer, from_a(pair), 2**40)
    for wrong in (datagram, forged[:-1] + bytes([forged[-1] ^ 1])):
        pair.inject(pair.b, wrong, source=ELSEWHERE)
    assert (pair.b.peer.endpoint, pair.b.peer.statistics.rx_bytes, len(pair.b.delivered)) == before
    assert drops(pair.b) == [DropReason.INVALID_TAG, DropReason.REPLAY]


@pytest.mark.requirement("DT-07")
def test_forged_counter_does_not_move_replay_window() -> None:
    pair = connected()
    forged = sealed(pair.a.peer, b"", 2**40)
    pair.inject(pair.b, forged[:-1] + bytes([forged[-1] ^ 1]))
    pair.inject(pair.b, sealed(pair.a.peer, from_a(pair), 7))
    assert len(pair.b.delivered) == 1


@pytest.mark.requirement("DT-08", "DT-10")
def test_reject_after_messages_limits_counter_and_ends_session() -> None:
    pair = connected()
    for counter in (REJECT_AFTER_MESSAGES, 2**64 - 1, REJECT_AFTER_MESSAGES - 1, REJECT_AFTER_MESSAGES - 2):
        pair.inject(pair.b, sealed(pair.a.peer, b"", counter))
    assert drops(pair.b) == [DropReason.COUNTER_LIMIT] * 2 + [DropReason.SESSION_EXPIRED]


@pytest.mark.requirement("DT-20")
@pytest.mark.parametrize(("age", "reasons"), [(-1, []), (0, [DropReason.SESSION_EXPIRED])])
def test_data_packet_is_refused_when_session_is_180_s_old(age: int, reasons: list[DropReason]) -> None:
    pair = connected()
    session = pair.b.peer.keypairs.current
    assert session is not None
    pair.run(session.birthdate + REJECT_AFTER_TIME + age - pair.now)
    pair.inject(pair.b, sealed(pair.a.peer, b""))
    assert drops(pair.b) == reasons


PACKET = ip_packet("192.168.241.1", "192.168.241.2", bytes(28))
PACKET6 = ip_packet("fd00::1", "fd00::2", bytes(8))


def with_length(packet: bytes, length: int) -> bytes:
    at = 2 if packet[0] >> 4 == 4 else 4
    return packet[:at] + length.to_bytes(2) + packet[at + 2 :]


@pytest.mark.requirement("DT-22", "MSG-14", "DT-23")
@pytest.mark.parametrize(
    ("plaintext", "delivered"),
    [
        (PACKET, PACKET),
        (PACKET + bytes(16), PACKET),
        (PACKET + b"\xff" * 40, PACKET),
        (PACKET6 + bytes(3), PACKET6),
        (with_length(PACKET, 20), with_length(PACKET, 20)[:20]),
        (with_length(PACKET6, 0), with_length(PACKET6, 0)[:40]),
    ],
)
def test_padding_is_removed_by_inner_packet_length(plaintext: bytes, delivered: bytes) -> None:
    pair = connected()
    pair.inject(pair.b, sealed(pair.a.peer, plaintext))
    assert pair.b.delivered == [delivered]


@pytest.mark.requirement("DT-23", "DT-24", "DT-26")
@pytest.mark.parametrize(
    ("plaintext", "reason"),
    [
        (with_length(PACKET, 19), DropReason.INNER_LENGTH),
        (with_length(PACKET, 2000), DropReason.INNER_LENGTH),
        (with_length(PACKET6, 5000), DropReason.INNER_LENGTH),
        (with_length(PACKET6, 65495), DropReason.INNER_LENGTH),
        (with_length(PACKET6, 65496), DropReason.INNER_LENGTH),
        (with_length(PACKET6, 65535), DropReason.INNER_LENGTH),
        (bytes(16), DropReason.INNER_PROTOCOL),
        (b"\x50" * 48, DropReason.INNER_PROTOCOL),
        (b"\xf0" * 48, DropReason.INNER_PROTOCOL),
        (PACKET[:1], DropReason.INNER_PROTOCOL),
        (PACKET[:19], DropReason.INNER_PROTOCOL),
        (PACKET6[:39], DropReason.INNER_PROTOCOL),
        (ip_packet("10.9.9.9", "192.168.241.2"), DropReason.SOURCE_NOT_ALLOWED),
    ],
)
def test_refused_inner_packet_still_updates_endpoint_and_timer(plaintext: bytes, reason: DropReason) -> None:
    pair = connected()
    before = pair.b.peer.statistics.rx_bytes
    pair.inject(pair.b, sealed(pair.a.peer, plaintext), source=ELSEWHERE)
    assert (pair.b.delivered, drops(pair.b), pair.log) == ([], [reason], [])
    assert pair.b.peer.endpoint == arrived_at(ELSEWHERE, pair.b)
    assert pair.b.peer.timers.deadline_of(Timer.SEND_KEEPALIVE) is not None
    assert pair.b.peer.statistics.rx_bytes == before


@pytest.mark.requirement("DT-27", "DT-16", "HS-24")
def test_refused_inner_packet_still_confirms_session() -> None:
    pair = Pair()
    pair.wire.filter = lambda sent: sent.type is not DATA
    pair.send(pair.a)
    pair.settle()
    pair.send(pair.b)
    pair.inject(pair.b, sealed(pair.a.peer, bytes(16)))
    assert drops(pair.b) == [DropReason.INNER_PROTOCOL]
    assert len(pair.sent(pair.b, DATA)) == 1


@pytest.mark.requirement("IF-11", "IF-13")
def test_rx_bytes_include_padding_of_delivered_packet() -> None:
    pair = connected()
    before = pair.b.peer.statistics.rx_bytes
    pair.inject(pair.b, sealed(pair.a.peer, PACKET + bytes(16)))
    assert pair.b.peer.statistics.rx_bytes == before + 32 + len(PACKET) + 16


@pytest.mark.requirement("AIP-02", "AIP-03", "AIP-08")
def test_source_is_refused_while_other_peer_owns_its_prefix() -> None:
    pair = connected()
    device, sender, source = pair.b.device, pair.b.peer, host_prefix(pair.a.inner[4])
    other = device.add_peer(bytes([9] * 32), pair.now)
    assert other is not None

    def is_delivered() -> bool:
        pair.b.delivered.clear()
        pair.send(pair.a)
        pair.settle()
        return len(pair.b.delivered) == 1

    device.remove_allowed_ips(sender)
    assert not is_delivered()
    device.insert_allowed_ip(sender, source._replace(length=24))
    assert is_delivered()
    device.insert_allowed_ip(other, source)
    assert not is_delivered()
    device.remove_peer(other, pair.now)
    assert is_delivered()
    assert drops(pair.b) == [DropReason.SOURCE_NOT_ALLOWED] * 2


@pytest.mark.requirement("DT-29")
def test_outer_ce_mark_is_copied_to_inner_packet() -> None:
    pair = connected()
    packet = ip_packet(pair.a.inner[4], pair.b.inner[4], tos=2)
    pair.inject(pair.b, sealed(pair.a.peer, packet), ecn=CE)
    assert pair.b.delivered == [ip_packet(pair.a.inner[4], pair.b.inner[4], tos=3)]


@pytest.mark.requirement("TM-11", "IF-11")
def test_keepalive_counts_32_bytes_and_sets_no_keepalive_timer() -> None:
    pair = connected()
    pair.run(30 * SECOND)
    before = pair.b.peer.statistics.rx_bytes
    pair.inject(pair.b, sealed(pair.a.peer, b""))
    assert pair.b.peer.statistics.rx_bytes == before + 32
    assert pair.b.peer.timers.deadline_of(Timer.SEND_KEEPALIVE) is None


@pytest.mark.requirement("HS-24", "DT-16")
def test_first_data_packet_releases_packets_staged_by_responder() -> None:
    pair = Pair()
    pair.wire.filter = lambda sent: sent.type is not DATA
    pair.send(pair.a)
    pair.settle()
    packet = pair.send(pair.b)
    assert pair.sent(pair.b, DATA) == []
    pair.wire.filter = lambda _: True
    pair.inject(pair.b, pair.sent(pair.a, DATA)[0].datagram)
    pair.settle()
    assert pair.a.delivered == [packet]
    assert Data.parse(pair.sent(pair.b, DATA)[0].datagram).counter == 0


@pytest.mark.requirement("TM-09", "TM-08")
@pytest.mark.parametrize(("side", "age", "asks"), [("a", 0, True), ("a", -1, False), ("b", 14 * SECOND, False)])
def test_initiator_alone_rekeys_when_receiving_on_old_session(side: str, age: int, asks: bool) -> None:
    pair = connected()
    receiver = getattr(pair, side)
    sender = pair.b if receiver is pair.a else pair.a
    pair.run(receiver.peer.keypairs.current.birthdate + LAST_MINUTE_REKEY + age - pair.now)
    pair.forget()
    for _ in range(3):
        pair.inject(receiver, sealed(sender.peer, b""))
    assert len(pair.sent(receiver, INITIATION)) == int(asks)


@pytest.mark.requirement("TM-09")
def test_late_session_is_rekeyed_once_for_several_packets() -> None:
    pair = connected()
    pair.run(LAST_MINUTE_REKEY)
    pair.forget()
    pair.wire.filter = lambda _: False
    for _ in range(2):
        pair.inject(pair.a, sealed(pair.b.peer, b""))
        pair.a.peer.last_sent_handshake = None
    assert len(pair.sent(pair.a, INITIATION)) == 1


@pytest.mark.requirement("RT-03", "RT-05", "RT-07")
@pytest.mark.parametrize(
    "elsewhere", [ELSEWHERE, Endpoint(bytes(15) + b"\1", 5), Endpoint(b"\xfe\x80" + bytes(14), 5, 7)]
)
def test_endpoint_follows_authenticated_data_packet(elsewhere: Endpoint) -> None:
    pair = connected()
    pair.inject(pair.b, sealed(pair.a.peer, b""), source=elsewhere)
    assert pair.b.peer.endpoint == arrived_at(elsewhere, pair.b)
    pair.send(pair.b)
    assert pair.log[-1].endpoint == arrived_at(elsewhere, pair.b)


@pytest.mark.requirement("ROB-03")
def test_own_messages_are_dropped_when_sent_back() -> None:
    pair = Pair()
    for side in (pair.a, pair.b):
        pair.send(side)
        pair.settle()
    messages, delivered = list(pair.log), [*pair.a.delivered, *pair.b.delivered]
    for sent in messages:
        pair.inject(pair.a if sent.sender == "A" else pair.b, sent.datagram)
    kinds = [(sent.sender, sent.type) for sent in messages]
    assert kinds == [("A", INITIATION), ("B", RESPONSE), ("A", DATA), ("B", DATA)]
    assert drops(pair.a) == drops(pair.b) == [DropReason.INVALID_MAC1, DropReason.UNKNOWN_INDEX]
    assert (pair.log, [*pair.a.delivered, *pair.b.delivered]) == (messages, delivered)


@pytest.mark.requirement("HS-38", "MSG-11")
@pytest.mark.parametrize("index", [0, 1, 0xFFFFFFFF])
def test_response_echoes_sender_index_of_any_value(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    monkeypatch.setattr(pair.a.environment, "random_bytes", fixed_index(pair.a, index))
    pair.send(pair.a)
    pair.settle()
    assert Initiation.parse(pair.log[0].datagram).sender_index == index
    assert Response.parse(pair.log[1].datagram).receiver_index == index
    assert len(pair.b.delivered) == 1


def fixed_index(side: Side, index: int) -> Callable[[int], bytes]:
    draw = side.environment.random_bytes
    return lambda length: index.to_bytes(4, "little") if length == 4 else draw(length)


@pytest.mark.requirement("ROB-10")
def test_message_body_with_wrong_type_is_dropped() -> None:
    pair = Pair()
    pair.wire.filter = lambda _: False
    pair.send(pair.a)
    body = pair.log[0].datagram
    response = replace(Response.parse(b"\2\0\0\0" + body[4:92]), receiver_index=5).to_bytes()
    pair.inject(pair.b, pair.a.peer.cookie.add_macs(response, 0))
    pair.inject(pair.b, b"\4" + body[1:])
    assert drops(pair.b) == [DropReason.UNKNOWN_INDEX] * 2
