from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from refwg import device as device_module
from refwg.boundary import Endpoint, LocalAddress, Transmit
from refwg.device import Device
from refwg.errors import ConfigError, DropReason
from refwg.ip import unreachable
from refwg.messages import MILLISECOND, SECOND, CookieReply, Initiation, MessageType
from refwg.queueing import LastUnderLoad
from refwg.ratelimiter import RateLimiter
from selftests.support.packets import ip_packet, udp
from selftests.support.pair import FakeSockets, Pair, SeededEnvironment, arrived_at, host_prefix, private_key

if TYPE_CHECKING:
    from selftests.support.pair import Sent

INITIATION, RESPONSE, COOKIE, DATA = MessageType


def connected() -> Pair:
    pair = Pair()
    pair.connect()
    return pair


def times(sent: list[Sent]) -> list[float]:
    return [message.time / SECOND for message in sent]


def keepalives(pair: Pair) -> list[Sent]:
    return [sent for sent in pair.log if sent.type is DATA and len(sent.datagram) == 32]


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


def test_device_works_without_watcher() -> None:
    device = Device(SeededEnvironment(1, int), FakeSockets(), now=0)
    device.set_private_key(private_key("A"), 0)
    device.up(0)
    peer = device.add_peer(bytes(range(32)), 0)
    assert peer is not None
    peer.set_endpoint(Endpoint(b"\x0a\0\0\2", 2), 0)
    (effect,) = device.peer_configured(peer, 0, wants_keepalive=device.set_persistent_keepalive(peer, 25))
    assert isinstance(effect, Transmit)
    assert effect.datagram[0] == INITIATION


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


# Load.


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


@pytest.mark.requirement("RL-01", "RL-02")
def test_source_passes_five_messages_at_once_when_under_load() -> None:
    pair = Pair()
    flood(pair)
    (reply, *_) = pair.b.device.process_handshakes(pair.now)
    assert isinstance(reply, Transmit)
    pair.inject(pair.a, reply.datagram)
    pair.run(6 * SECOND)
    for _ in range(700):
        pair.b.device.receive_datagram(pair.log[-1].datagram, arrived_at(pair.a.endpoint, pair.b), 0, pair.now)
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
    flood(pair)
    (reply, *_) = pair.b.device.process_handshakes(pair.now)
    assert isinstance(reply, Transmit)
    pair.inject(pair.a, reply.datagram)
    pair.run(6 * SECOND)
    retry = pair.log[-1].datagram
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


# Up and down.


@pytest.mark.requirement("IF-04", "CFG-23", "IF-03")
def test_device_opens_port_when_it_goes_up() -> None:
    device = Device(SeededEnvironment(1, lambda: 0), FakeSockets(), now=0)
    assert (device.listen_port, device.fwmark, device.identity, list(device.peers)) == (0, 0, None, [])
    device.up(0)
    assert device.listen_port == 40000
    assert device.up(0) == []


@pytest.mark.requirement("IF-05")
def test_device_stays_down_when_its_port_is_in_use() -> None:
    pair = Pair(up=False)
    pair.a.sockets.taken.add(1)
    with pytest.raises(ConfigError) as error:
        pair.a.device.up(0)
    assert (error.value.errno, pair.a.device.is_up) == (errno.EADDRINUSE, False)


@pytest.mark.requirement("IF-07", "IF-09", "RT-08")
def test_device_down_ends_sessions_and_keeps_configuration() -> None:
    pair = connected()
    endpoint, sent = pair.a.peer.endpoint, pair.a.peer.statistics.tx_bytes
    pair.a.device.down(pair.now)
    pair.run(60 * SECOND)
    assert [sent for sent in pair.log if sent.sender == "A"] == []
    assert (pair.a.sockets.port, pair.a.device.listen_port) == (None, 1)
    assert (pair.a.peer.endpoint, pair.a.peer.statistics.tx_bytes) == (endpoint, sent)
    pair.carry_out(pair.a, pair.a.device.up(pair.now))
    packet = pair.send(pair.a)
    pair.settle()
    assert pair.b.delivered == [packet]


@pytest.mark.requirement("HS-10", "DT-34")
def test_greatest_timestamp_survives_down_and_up() -> None:
    pair = Pair()
    pair.send(pair.a)
    initiation = pair.log[0].datagram
    pair.settle()
    pair.b.device.down(pair.now)
    pair.b.device.up(pair.now)
    pair.inject(pair.b, initiation)
    assert pair.b.peer.statistics.drops[DropReason.OLD_TIMESTAMP] == 1


@pytest.mark.requirement("IF-07", "Q-08")
def test_device_that_is_down_takes_no_packets() -> None:
    pair = Pair(up=False)
    pair.send(pair.a)
    assert (pair.log, pair.a.icmp, len(pair.a.peer.staged)) == ([], [], 0)
    assert (pair.a.device.statistics.tx_errors, pair.a.device.statistics.tx_dropped) == (0, 0)


@pytest.mark.requirement("TM-32", "TM-27")
def test_erase_timer_of_forgotten_keys_spares_new_handshake() -> None:
    pair = connected()
    pair.a.device.clear_keys(pair.now)
    pair.run(538 * SECOND)
    pair.wire.filter = lambda _: False
    pair.send(pair.a)
    pair.run(4 * SECOND)
    assert pair.a.peer.handshake.local_index is not None


@pytest.mark.requirement("TM-32")
def test_forgetting_keys_ends_all_sessions() -> None:
    pair = connected()
    pair.a.device.clear_keys(pair.now)
    assert (pair.a.peer.keypairs.current, len(pair.a.peer.shared.indices)) == (None, 0)
    pair.run(5 * SECOND)
    pair.send(pair.a)
    assert pair.log[-1].type is INITIATION


# Configuration.


@pytest.mark.requirement("HS-29", "HS-30")
def test_new_private_key_takes_effect_at_once() -> None:
    pair = connected()
    pair.carry_out(pair.a, pair.a.device.set_private_key(private_key("other"), pair.now))
    old = pair.send(pair.b)
    pair.send(pair.a)
    pair.settle()
    assert pair.a.delivered == [old]
    assert [sent.type for sent in pair.log if sent.sender == "A"] == [INITIATION]
    assert pair.b.device.statistics.drops[DropReason.UNKNOWN_PEER] == 1


@pytest.mark.requirement("HS-29")
def test_new_private_key_abandons_pending_handshake() -> None:
    pair = Pair()
    pair.send(pair.a)
    pair.a.device.set_private_key(private_key("other"), pair.now)
    assert len(pair.a.peer.shared.indices) == 0
    pair.settle()
    assert pair.a.device.statistics.drops[DropReason.INVALID_MAC1] == 1


@pytest.mark.requirement("HS-29", "CK-16")
def test_new_identity_configured_on_other_side_gets_session() -> None:
    pair = connected()
    pair.a.device.set_private_key(private_key("other"), pair.now)
    pair.b.device.remove_all_peers(pair.now)
    pair.b.add_peer(pair.a, pair.now)
    packet = pair.send(pair.a)
    pair.settle()
    assert pair.b.delivered == [packet]


@pytest.mark.requirement("HS-31")
def test_setting_same_private_key_changes_nothing() -> None:
    pair = connected()
    assert pair.a.device.set_private_key(private_key("A"), pair.now) == []
    pair.send(pair.a)
    assert [sent.type for sent in pair.log] == [DATA]


@pytest.mark.requirement("HS-27", "HS-28", "CFG-15")
def test_staged_packets_are_sent_when_private_key_is_set() -> None:
    pair = Pair()
    pair.a.device.set_private_key(bytes(32), 0)
    packet = pair.send(pair.a)
    assert (pair.log, pair.a.device.identity) == ([], None)
    pair.carry_out(pair.a, pair.a.device.set_private_key(private_key("A"), 0))
    pair.settle()
    assert pair.b.delivered == [packet]


@pytest.mark.requirement("HS-32", "HS-33")
def test_device_is_never_its_own_peer() -> None:
    pair = Pair()
    public_b = pair.b.public_key
    pair.a.device.set_private_key(private_key("B"), 0)
    assert list(pair.a.device.peers) == []
    assert pair.a.device.add_peer(public_b, 0) is None


@pytest.mark.requirement("HS-36", "AIP-09", "CFG-14")
def test_removed_peer_is_forgotten_and_can_be_added_again() -> None:
    pair = connected()
    pair.b.device.remove_peer(pair.b.peer, pair.now)
    pair.send(pair.a)
    pair.settle()
    assert pair.b.device.statistics.drops[DropReason.UNKNOWN_INDEX] == 1
    pair.b.add_peer(pair.a, pair.now)
    assert pair.b.peer.statistics.rx_bytes == 0
    pair.run(30 * SECOND)
    pair.send(pair.a)
    pair.settle()
    assert pair.b.peer.latest_handshake > 0


@pytest.mark.requirement("CFG-24")
def test_peer_beyond_limit_is_refused_with_enomem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "MAX_PEERS_PER_DEVICE", 1)
    with pytest.raises(ConfigError) as error:
        Pair().a.device.add_peer(bytes(32), 0)
    assert error.value.errno == errno.ENOMEM


@pytest.mark.requirement("CFG-19", "CFG-20", "CFG-21")
def test_old_port_stays_open_when_new_port_is_in_use() -> None:
    pair = Pair()
    pair.a.sockets.taken.add(7)
    with pytest.raises(ConfigError):
        pair.a.device.set_listen_port(7)
    assert (pair.a.device.listen_port, pair.a.sockets.port) == (1, 1)
    pair.a.device.set_listen_port(0)
    assert (pair.a.device.listen_port, pair.a.sockets.port) == (40000, 40000)


@pytest.mark.requirement("CFG-21")
def test_setting_same_port_changes_nothing() -> None:
    pair = connected()
    endpoint = pair.a.peer.endpoint
    pair.a.sockets.taken.add(1)
    pair.a.device.set_listen_port(1)
    assert pair.a.peer.endpoint is endpoint


@pytest.mark.requirement("RT-16", "CFG-22")
@pytest.mark.parametrize("setting", ["port", "mark"])
def test_setting_port_or_fwmark_clears_source_of_endpoint(setting: str) -> None:
    pair = connected()
    assert pair.a.peer.endpoint is not None
    assert pair.a.peer.endpoint.source is not None
    if setting == "port":
        pair.a.device.set_listen_port(9)
    else:
        pair.a.device.set_fwmark(0)
    assert pair.a.peer.endpoint == pair.b.endpoint
    pair.send(pair.a)
    assert [sent.type for sent in pair.log] == [DATA]


@pytest.mark.requirement("RT-09")
def test_configured_endpoint_is_used_for_next_datagram() -> None:
    pair = connected()
    elsewhere = Endpoint(b"\x0a\0\0\x63", 99)
    pair.a.peer.set_endpoint(elsewhere, pair.now)
    pair.send(pair.a)
    assert pair.log[-1].endpoint == elsewhere


@pytest.mark.requirement("TM-22")
@pytest.mark.parametrize(("before", "after", "sends"), [(0, 1, True), (2, 5, False), (2, 0, False)])
def test_turning_on_persistent_keepalive_sends_datagram(before: int, after: int, sends: bool) -> None:
    pair = connected()
    pair.a.peer.timers.persistent_keepalive_interval = before
    is_turned_on = pair.a.device.set_persistent_keepalive(pair.a.peer, after)
    assert bool(pair.a.device.peer_configured(pair.a.peer, pair.now, wants_keepalive=is_turned_on)) is sends


@pytest.mark.requirement("HS-21")
def test_staged_packets_are_sent_when_peer_is_configured() -> None:
    pair = Pair()
    pair.wire.filter = lambda _: False
    pair.send(pair.a)
    pair.wire.filter = lambda _: True
    pair.a.peer.last_sent_handshake = None
    pair.carry_out(pair.a, pair.a.device.peer_configured(pair.a.peer, pair.now))
    pair.settle()
    assert len(pair.b.delivered) == 1
    pair.a.device.down(pair.now)
    assert pair.a.device.peer_configured(pair.a.peer, pair.now) == []


def test_prefixes_of_peer_are_listed_until_removed() -> None:
    pair = Pair()
    device, peer = pair.a.device, pair.a.peer
    assert [str(prefix) for prefix in device.allowed_ips(peer)] == ["192.168.241.2/32", "fd00::2/128"]
    device.remove_allowed_ip(peer, host_prefix("fd00::2"))
    assert [str(prefix) for prefix in device.allowed_ips(peer)] == ["192.168.241.2/32"]
    device.remove_allowed_ips(peer)
    assert (list(device.allowed_ips(peer)), device.peer(peer.public_key)) == ([], peer)


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
