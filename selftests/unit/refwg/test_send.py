from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from refwg import send
from refwg.boundary import Endpoint
from refwg.crypto import Aead
from refwg.messages import (
    REJECT_AFTER_MESSAGES,
    REJECT_AFTER_TIME,
    REKEY_AFTER_MESSAGES,
    REKEY_AFTER_TIME,
    SECOND,
    Data,
    MessageType,
)
from refwg.peer import StagedPacket
from refwg.timers import Timer
from selftests.support.packets import ip_packet, udp
from selftests.support.pair import Pair, connected

INITIATION, RESPONSE, DATA = MessageType.INITIATION, MessageType.RESPONSE, MessageType.DATA


@pytest.mark.requirement("MSG-17", "CK-02")
def test_initiation_carries_handshake_dscp_and_zero_mac2() -> None:
    pair = Pair()
    (effect,) = send.handshake_initiation(pair.a.peer, 0)
    assert (effect.datagram[0], effect.traffic_class, effect.carries_data) == (INITIATION, 0x88, False)
    assert effect.endpoint == pair.b.endpoint
    assert effect.datagram[-16:] == bytes(16)


@pytest.mark.requirement("HS-14", "TM-06")
def test_early_initiation_is_not_sent_but_resets_attempt_count() -> None:
    peer = Pair().a.peer
    assert send.handshake_initiation(peer, 0, is_retry=True)
    peer.timers.handshake_attempts = 7
    assert send.handshake_initiation(peer, 5 * SECOND - 1) == []
    assert peer.timers.handshake_attempts == 0
    assert send.handshake_initiation(peer, 5 * SECOND)


@pytest.mark.requirement("CR-16", "HS-16")
def test_each_initiation_has_new_index_and_ephemeral_key() -> None:
    peer = Pair().a.peer
    first, second = (send.handshake_initiation(peer, now)[0].datagram for now in (0, 5 * SECOND))
    assert first[4:8] != second[4:8]
    assert first[8:40] != second[8:40]
    assert len(peer.shared.indices) == 1


@pytest.mark.requirement("HS-27", "HS-34")
def test_device_without_private_key_sends_no_initiation() -> None:
    pair = Pair()
    pair.a.device.set_private_key(bytes(32), 0)
    assert send.handshake_initiation(pair.a.peer, 0) == []
    assert len(pair.a.peer.shared.indices) == 0


def test_response_to_low_order_ephemeral_key_is_not_sent() -> None:
    pair = Pair()
    pair.a.peer.handshake.remote_ephemeral = bytes(32)
    assert send.handshake_response(pair.a.peer, 0) == []
    assert len(pair.a.peer.shared.indices) == 0


@pytest.mark.requirement("TM-26")
def test_peer_without_endpoint_gets_no_message() -> None:
    pair = Pair(endpoints=False)
    assert send.handshake_initiation(pair.a.peer, 0) == []
    assert send.keepalive(pair.a.peer, 6 * SECOND) == []


@pytest.mark.requirement("Q-10")
def test_keepalive_is_not_staged_when_queue_is_not_empty() -> None:
    pair = Pair()
    for _ in range(5):
        send.keepalive(pair.a.peer, 0)
    assert len(pair.a.peer.staged) == 1
    pair.a.peer.staged.take()
    packet = StagedPacket(ip_packet("10.0.0.1", "10.0.0.2"), 1420)
    pair.a.peer.staged.stage([packet])
    send.keepalive(pair.a.peer, 0)
    assert pair.a.peer.staged.take() == [packet]


@pytest.mark.requirement("DT-01", "DT-02", "Q-03")
def test_staged_packets_get_consecutive_counters_from_zero() -> None:
    pair = Pair()
    for number in range(3):
        pair.send(pair.a, bytes([number]))
    pair.settle()
    messages = [Data.parse(sent.datagram) for sent in pair.sent(pair.a, DATA)]
    assert [message.counter for message in messages] == [0, 1, 2]
    assert [packet[-1] for packet in pair.b.delivered] == [0, 1, 2]
    response = pair.sent(pair.b, RESPONSE)[0].datagram
    assert {message.receiver_index for message in messages} == {int.from_bytes(response[4:8], "little")}


@pytest.mark.requirement("MSG-12", "MSG-13", "CR-14")
@pytest.mark.parametrize(("length", "padded"), [(0, 0), (29, 32), (32, 32), (44, 48), (1420, 1420)])
def test_data_is_padded_with_zeros(length: int, padded: int) -> None:
    keypair = connected().a.peer.keypairs.current
    assert keypair is not None
    keypair.sending = keypair.receiving = Aead(bytes(32))
    datagram = send.seal(keypair, 5, StagedPacket(b"x" * length, 1420 if length else 0))
    assert len(datagram) == 32 + padded
    # By another implementation of the AEAD, without associated data.
    nonce = bytes(4) + (5).to_bytes(8, "little")
    plaintext = ChaCha20Poly1305(bytes(32)).decrypt(nonce, datagram[16:], None)
    assert plaintext == (b"x" * length).ljust(padded, b"\0")


@pytest.mark.requirement("DT-28", "DT-30")
def test_outer_traffic_class_carries_only_ecn() -> None:
    pair = connected()
    for tos in (0, 1, 2, 3, 0xB8):
        packet = ip_packet(pair.a.inner[4], pair.b.inner[4], tos=tos)
        pair.carry_out(pair.a, pair.a.device.send_packet(packet, 1420, pair.now))
    assert [sent.traffic_class for sent in pair.sent(pair.a, DATA)] == [0, 1, 2, 2, 0]


@pytest.mark.requirement("MSG-13", "MSG-17")
def test_keepalive_is_empty_and_has_zero_traffic_class() -> None:
    pair = connected()
    (effect,) = send.keepalive(pair.a.peer, pair.now)
    assert (len(effect.datagram), effect.traffic_class, effect.carries_data) == (32, 0, False)


@pytest.mark.requirement("DT-11")
def test_sending_counter_ends_below_reject_after_messages() -> None:
    pair = connected()
    pair.run(6 * SECOND)
    keypair = pair.a.peer.keypairs.current
    assert keypair is not None
    keypair.sending_counter = REJECT_AFTER_MESSAGES - 1
    keypair.i_am_the_initiator = False
    pair.a.peer.last_sent_handshake = pair.now
    pair.send(pair.a)
    assert Data.parse(pair.sent(pair.a, DATA)[-1].datagram).counter == REJECT_AFTER_MESSAGES - 1
    pair.a.peer.last_sent_handshake = None
    pair.send(pair.a)
    assert not keypair.is_valid_for_sending
    assert pair.log[-1].type is INITIATION


@pytest.mark.requirement("DT-32")
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize(("counter", "asks"), [(REKEY_AFTER_MESSAGES - 1, False), (REKEY_AFTER_MESSAGES, True)])
def test_initiator_and_responder_rekey_after_many_messages(side: str, counter: int, asks: bool) -> None:
    pair = connected()
    pair.run(6 * SECOND)
    sender = getattr(pair, side)
    sender.peer.keypairs.current.sending_counter = counter
    pair.send(sender)
    assert bool(pair.sent(sender, INITIATION)) is asks


@pytest.mark.requirement("TM-07", "TM-08")
@pytest.mark.parametrize(
    ("side", "age", "asks"),
    [("a", REKEY_AFTER_TIME - 1, False), ("a", REKEY_AFTER_TIME, True), ("b", REJECT_AFTER_TIME - SECOND, False)],
)
def test_initiator_alone_rekeys_when_session_is_old(side: str, age: int, asks: bool) -> None:
    pair = connected()
    sender = getattr(pair, side)
    pair.run(sender.peer.keypairs.current.birthdate + age - pair.now)
    pair.forget()
    pair.send(sender)
    assert bool(pair.sent(sender, INITIATION)) is asks
    assert pair.log[0].type is DATA


@pytest.mark.requirement("DT-21", "Q-12")
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize(("age", "kind"), [(REJECT_AFTER_TIME - 1, DATA), (REJECT_AFTER_TIME, INITIATION)])
def test_expired_session_is_not_used_for_sending(side: str, age: int, kind: MessageType) -> None:
    pair = Pair()
    pair.wire.latency = 0
    pair.connect()
    sender = getattr(pair, side)
    pair.run(sender.peer.keypairs.current.birthdate + age - pair.now)
    pair.forget()
    packet = pair.send(sender)
    assert pair.log[0].type is kind
    pair.settle()
    assert (pair.b if sender is pair.a else pair.a).delivered == [packet]


@pytest.mark.requirement("TM-17", "TM-16")
@pytest.mark.parametrize(("is_data", "waits"), [(True, True), (False, False)])
def test_new_handshake_timer_is_set_by_data_not_by_keepalive(is_data: bool, waits: bool) -> None:
    pair = connected()
    pair.run(20 * SECOND)
    if is_data:
        pair.send(pair.a)
    else:
        pair.carry_out(pair.a, send.keepalive(pair.a.peer, pair.now))
    assert (pair.a.peer.timers.deadline_of(Timer.NEW_HANDSHAKE) is not None) is waits


@pytest.mark.parametrize(
    ("host", "ports", "protocol", "is_own"),
    [
        ("10.0.0.2", (1, 2), 17, True),
        ("10.0.0.2", (9, 2), 17, False),
        ("10.0.0.2", (1, 9), 17, False),
        ("10.0.0.9", (1, 2), 17, False),
        ("10.0.0.2", (1, 2), 6, False),
    ],
)
def test_own_datagram_to_peer_endpoint_is_recognized(
    host: str, ports: tuple[int, int], protocol: int, is_own: bool
) -> None:
    pair = connected()
    (ours,) = send.keepalive(pair.a.peer, pair.now)
    packet = ip_packet("10.9.9.9", host, udp(*ports, ours.datagram), protocol=protocol)
    assert send.is_own_datagram(packet, pair.a.peer, 1) is is_own
    pair.a.peer.endpoint = None
    assert not send.is_own_datagram(packet, pair.a.peer, 1)


@pytest.mark.requirement("ROB-04")
def test_own_handshake_message_is_recognized_while_index_exists() -> None:
    pair = Pair()
    pair.send(pair.a)
    pair.settle()
    for side, other, kind in ((pair.a, pair.b, INITIATION), (pair.b, pair.a, RESPONSE)):
        (sent,) = pair.sent(side, kind)
        ours, theirs = side.endpoint.port, other.endpoint.port
        packet = ip_packet("10.9.9.9", f"10.0.0.{theirs}", udp(ours, theirs, sent.datagram))
        assert send.is_own_datagram(packet, side.peer, ours)
        side.device.clear_keys(pair.now)
        assert not send.is_own_datagram(packet, side.peer, ours)


@pytest.mark.requirement("AIP-01")
@pytest.mark.parametrize("kind", [b"", b"\1\0\0\0", b"\2\0\0\0", b"\3\0\0\0", b"\4\0\0\0", b"\4\0\0\1"])
def test_foreign_datagram_between_same_ports_is_not_own(kind: bytes) -> None:
    pair = connected()
    stranger = kind and kind + bytes(28)
    packet = ip_packet("10.9.9.9", "10.0.0.2", udp(1, 2, stranger))
    assert not send.is_own_datagram(packet, pair.a.peer, 1)


@pytest.mark.requirement("AIP-01")
def test_own_message_is_not_recognized_for_other_peer() -> None:
    pair = connected()
    other = pair.a.device.add_peer(bytes(range(32)), pair.now)
    assert other is not None
    other.endpoint = pair.a.peer.endpoint
    pair.a.peer.last_sent_handshake = None
    (data,) = send.keepalive(pair.a.peer, pair.now)
    (initiation,) = send.handshake_initiation(pair.a.peer, pair.now)
    for ours in (data, initiation):
        packet = ip_packet("10.9.9.9", "10.0.0.2", udp(1, 2, ours.datagram))
        assert send.is_own_datagram(packet, pair.a.peer, 1)
        assert not send.is_own_datagram(packet, other, 1)


@pytest.mark.requirement("RT-21", "MSG-17")
def test_cookie_reply_is_sent_to_message_sender() -> None:
    pair = Pair()
    stranger = Endpoint(b"\x0a\0\0\x09", 99)
    (effect,) = send.cookie_reply(pair.a.peer.shared, bytes(148), 5, stranger, 0)
    assert (effect.endpoint, effect.peer, effect.traffic_class, len(effect.datagram)) == (stranger, None, 0, 64)


class Keys:
    """A watcher that records keys and events."""

    def __init__(self) -> None:
        self.handshakes: list[tuple[bytes, bytes, bytes, bytes]] = []
        self.events: list[str] = []

    def note(self, now: int, event: str, peer: bytes, **details: object) -> None:
        del now, peer, details
        self.events.append(event)

    def keys(self, static_private: bytes, remote_static: bytes, ephemeral_private: bytes, preshared: bytes) -> None:
        self.handshakes.append((static_private, remote_static, ephemeral_private, preshared))


def test_watcher_receives_keys_of_initiator_and_responder() -> None:
    pair, keys = Pair(), Keys()
    pair.a.peer.shared.watcher = pair.b.peer.shared.watcher = keys
    pair.connect()
    assert [entry[1] for entry in keys.handshakes] == [pair.b.public_key, pair.a.public_key]
    assert len({entry[2] for entry in keys.handshakes}) == 2
    assert keys.events[0] == "initiation"
