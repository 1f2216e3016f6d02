"""Check a device that goes up and down, and whose keys, peers and ports are configured."""

from __future__ import annotations

import errno

import pytest

from refwg import device as device_module
from refwg.boundary import Endpoint, Transmit
from refwg.device import Device
from refwg.errors import ConfigError, DropReason
from refwg.messages import SECOND, MessageType
from selftests.support.pair import FakeSockets, Pair, SeededEnvironment, connected, host_prefix, private_key

INITIATION, DATA = MessageType.INITIATION, MessageType.DATA


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
