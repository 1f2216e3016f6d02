"""Configure a live session and take its link down: what ends it, and what must not (`wired`, `direct`)."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from harness import (
    V4_OF_A,
    V4_OF_B,
    DeviceConfig,
    Endpoint,
    UdpStream,
    allowed_ips,
    differs,
    let_pass,
    poll_until,
    udp_message,
)
from selftests.support.peers import SPACING, renew

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import DeviceState, Tunnel, Wire

SECOND = 1_000_000_000
# ns: a program may compute the time of a handshake from its age at each request.
PRECISION = 1_000_000
PORT = 1111
AT_ONCE = 5.0
BURST = 20
ENDPOINT_OF_B = Endpoint("192.168.1.2", 2)
# Old allowed-ips are removed before new ones are added (`set_peer` in netlink.c): a packet may arrive between the two.
REPLACES = "fewer allowed-ips"
# Changes of A's peer B that leave the session alone, in this order.
CHANGES: dict[str, Callable[[Tunnel], None]] = {
    "the same preshared key": lambda wired: wired.a.set_peer(wired.pub_b, preshared_key=wired.psk),
    "a new preshared key": lambda wired: wired.a.set_peer(wired.pub_b, preshared_key=wired.lab.key("psk2")),
    "a keepalive of 25 s": lambda wired: wired.a.set_peer(wired.pub_b, persistent_keepalive=25),
    "no keepalive": lambda wired: wired.a.set_peer(wired.pub_b, persistent_keepalive=0),
    "one more allowed ip": lambda wired: wired.a.set_peer(wired.pub_b, allowed_ips=allowed_ips("10.7.7.0/24")),
    REPLACES: lambda wired: wired.a.set_peer(
        wired.pub_b, replace_allowed_ips=True, allowed_ips=allowed_ips(f"{V4_OF_B}/32")
    ),
    "the same endpoint": lambda wired: wired.a.set_peer(wired.pub_b, endpoint=ENDPOINT_OF_B),
}


@pytest.fixture
def streams(wired: Tunnel, wire: Wire) -> Iterator[tuple[UdpStream, UdpStream]]:
    """Datagrams both ways on a session that A initiated."""
    wired.must_ping("ns1", V4_OF_B)
    with (
        UdpStream(wired.nodes["ns1"], wired.nodes["ns2"], V4_OF_B) as to_b,
        UdpStream(wired.nodes["ns2"], wired.nodes["ns1"], V4_OF_A) as to_a,
    ):
        wire.apply()
        yield to_b, to_a


def carry(streams: tuple[UdpStream, UdpStream], why: str) -> None:
    """Send a burst both ways; every datagram since the streams began must arrive."""
    for stream in streams:
        stream.send(BURST)
    for stream, name in zip(streams, ("B", "A"), strict=True):
        arrived = poll_until(stream.arrivals, lambda so_far: so_far.lost == 0, AT_ONCE)
        assert arrived.lost == 0, f"{why}: to {name}, {arrived}"


def indices(wire: Wire) -> dict[str, set[str]]:
    """Return the receiver indices that each side has used since the last `apply`."""
    used: dict[str, set[str]] = {"ns1": set(), "ns2": set()}
    for sighting in wire.sightings("transport"):
        used[sighting.sender].add(sighting.message.payload[4:8].hex())
    return used


def assert_same_session(wire: Wire, before: dict[str, set[str]], why: str) -> None:
    assert not wire.sightings("handshake"), f"{why} began a handshake"
    assert indices(wire) == before, f"{why}: the indices were {before}, and then {indices(wire)}"


@pytest.mark.requirement("HS-31")
@pytest.mark.bug("IB-21")
@pytest.mark.parametrize("side", ["a", "b"])
def test_same_private_key_keeps_session(
    wired: Tunnel, wire: Wire, streams: tuple[UdpStream, UdpStream], side: str
) -> None:
    carry(streams, "before the key is set")
    before = indices(wire)
    wire.apply()
    for stream in streams:
        stream.send(BURST)
    interface, key = (wired.a, wired.key_a) if side == "a" else (wired.b, wired.key_b)
    for _ in range(3):
        interface.set(DeviceConfig(private_key=key))
    carry(streams, "after its own private key was set again")
    assert_same_session(wire, before, "the private key that it has")


@pytest.mark.requirement("HS-21")
@pytest.mark.bug("IB-24")
@pytest.mark.capability("update-peer")
def test_peer_settings_change_without_end_of_session(
    wired: Tunnel, wire: Wire, streams: tuple[UdpStream, UdpStream]
) -> None:
    carry(streams, "before any change")
    before = indices(wire)
    for name, change in CHANGES.items():
        wire.apply()
        if name != REPLACES:
            for stream in streams:
                stream.send(BURST)
        change(wired)
        carry(streams, f"after the peer got {name}")
        assert_same_session(wire, before, name)
    # The next handshake has the new key: B's alone would refuse that of A.
    wired.b.set_peer(wired.pub_a, preshared_key=wired.lab.key("psk2"))
    carry(streams, "after B got the new preshared key too")
    assert_same_session(wire, before, "the new preshared key at B")
    renew(wired.a, wired.pub_b)
    wired.must_ping("ns1", V4_OF_B)


@pytest.mark.requirement("HS-25")
@pytest.mark.bug("IB-63")
def test_latest_handshake_is_unix_time_of_handshake(wired: Tunnel, wire: Wire) -> None:
    sides = {"A": wired.seen_by_a, "B": wired.seen_by_b}
    for name, look in sides.items():
        assert look().latest_handshake == 0, (
            f"{name} had no handshake, and reports {look().latest_handshake / SECOND:.1f} s"
        )
    reported = []
    for nth in (1, 2):
        begun = time.time_ns()
        wired.must_ping("ns1", V4_OF_B)
        ended = time.time_ns()
        for name, look in sides.items():
            seen = look().latest_handshake
            assert begun - SECOND <= seen <= ended + SECOND, (
                f"the handshake was at {begun / SECOND:.1f} s, and {name} reports {seen / SECOND:.1f} s"
            )
        reported.append([look().latest_handshake for look in sides.values()])
        if nth == 1:
            let_pass(1.1, "a report without fractions of a second changes too")
            wired.must_ping("ns1", V4_OF_B)
            unchanged = [look().latest_handshake for look in sides.values()]
            moved = [abs(new - old) for new, old in zip(unchanged, reported[0], strict=True)]
            assert max(moved) < PRECISION, f"without a handshake the time went from {reported[0]} to {unchanged}"
            # The peer of A keeps its identity, and B's time must grow.
            renew(wired.a, wired.pub_b)
    assert reported[1][1] > reported[0][1], (
        f"B's time after another handshake is {reported[1][1]}, before {reported[0][1]}"
    )
    assert len(wire.sightings("initiation")) == 2


# Down and up


def settings(state: DeviceState) -> DeviceState:
    """Return the state with its peers and allowed-ips in a fixed order."""
    peers = [replace(peer, allowed_ips=tuple(sorted(peer.allowed_ips))) for peer in state.peers]
    return replace(state, peers=tuple(sorted(peers, key=lambda peer: peer.public_key.raw)))


@pytest.mark.requirement("IF-09")
@pytest.mark.parametrize("port", [1, 0], ids=["given-port", "random-port"])
def test_configuration_and_counters_survive_down_and_up(wired: Tunnel, wire: Wire, port: int) -> None:
    if port == 0:
        wired.a.set(DeviceConfig(listen_port=0))
    other = wired.lab.key("key3").public()
    wired.a.set_peer(other, persistent_keepalive=0, preshared_key=wired.psk, allowed_ips=allowed_ips("10.9.0.0/16"))
    wired.must_ping("ns1", V4_OF_B, count=3)
    before = settled(wired)
    assert before.listen_port, "A reports no listen port"
    for up in (False, True):
        wired.nodes["ns1"].set_link("wg0", up=up)
        if up:
            wired.a.up()
        now = with_times_of(settled(wired), before)
        assert now == before, f"with the link {'up again' if up else 'down'}: {difference(before, now)}"
    let_pass(SPACING, "B refuses a second initiation within 20 ms, and timestamps are coarse")
    wired.must_ping("ns1", V4_OF_B)
    old = before.peer(wired.pub_b)
    # A program counts a moment after it has sent.
    grown = poll_until(wired.seen_by_a, lambda seen: seen.rx_bytes > old.rx_bytes and seen.tx_bytes > old.tx_bytes, 2.0)
    assert (grown.rx_bytes > old.rx_bytes, grown.tx_bytes > old.tx_bytes) == (True, True), "the counters began again"
    (used,) = {s.message.source[1] for s in wire.sightings(sender="ns1")}
    assert used == before.listen_port, f"A reports port {before.listen_port} and sends from {used}"


def settled(wired: Tunnel) -> DeviceState:
    """Return A's state once its counters agree with B's: a program counts a moment after it has sent."""
    wired.counted()
    return settings(wired.a.get())


def with_times_of(now: DeviceState, before: DeviceState) -> DeviceState:
    """Return a state whose latest handshakes are those of an earlier one where they differ by less than PRECISION."""
    old = {peer.public_key: peer.latest_handshake for peer in before.peers}
    peers = []
    for peer in now.peers:
        time_before = old.get(peer.public_key, 0)
        is_same = abs(peer.latest_handshake - time_before) < PRECISION
        peers.append(replace(peer, latest_handshake=time_before) if is_same else peer)
    return replace(now, peers=tuple(peers))


def difference(before: DeviceState, now: DeviceState) -> str:
    """Name what differs, in the words of the records."""
    changed = [f"{a!r} became {b!r}" for a, b in zip(before.peers, now.peers, strict=False) if a != b]
    if (before.listen_port, before.fwmark) != (now.listen_port, now.fwmark):
        changed.append(f"port and mark {before.listen_port}, {before.fwmark} became {now.listen_port}, {now.fwmark}")
    if len(before.peers) != len(now.peers):
        changed.append(f"{len(before.peers)} peers became {len(now.peers)}")
    return "; ".join(changed) or f"{before!r} became {now!r}"


# Persistent keepalives


@pytest.mark.requirement("TM-22")
@pytest.mark.bug("IB-14")
@pytest.mark.capability("persistent-keepalive")
def test_peer_added_with_keepalive_is_sent_initiation_at_once(wired: Tunnel, wire: Wire) -> None:
    renew(wired.a, wired.pub_b, persistent_keepalive=600)
    wire.wait_for("initiation", "A's initiation for its new persistent keepalive", sender="ns1", deadline=2.0)
    wire.wait_for("transport", "A to confirm the session", sender="ns1", deadline=2.0)


@pytest.mark.requirement("TM-22")
@pytest.mark.bug("IB-14")
@pytest.mark.capability("persistent-keepalive", "update-peer")
def test_change_of_interval_sends_keepalive_only_from_zero(wired: Tunnel, wire: Wire) -> None:
    wired.must_ping("ns1", V4_OF_B)
    wire.apply()
    wired.a.set_peer(wired.pub_b, persistent_keepalive=600)
    first = wire.wait_for("transport", "a keepalive when the interval changes from 0", sender="ns1", deadline=2.0)
    assert first.message.is_keepalive
    wire.apply()
    wired.a.set_peer(wired.pub_b, persistent_keepalive=500)
    wired.a.set_peer(wired.pub_b, persistent_keepalive=0)
    # A session keeps order: a keepalive for these changes would leave before this datagram.
    udp_message(wired.nodes["ns1"], V4_OF_B, PORT, b"marker")
    wire.wait_for("data", "A's datagram", sender="ns1")
    sent = [s.message.name for s in wire.sightings("transport", sender="ns1")]
    assert sent == ["data"], f"at a change of the interval from 600 s to 500 s and to 0 A sent {sent}"


@pytest.mark.requirement("TM-22", "TM-20")
@pytest.mark.capability("persistent-keepalive", "update-peer")
def test_keepalives_end_when_interval_is_zero(wired: Tunnel, wire: Wire) -> None:
    wired.a.set_peer(wired.pub_b, persistent_keepalive=1)
    wire.wait_for("keepalive", "two keepalives at an interval of 1 s", sender="ns1", nth=2)
    wired.a.set_peer(wired.pub_b, persistent_keepalive=0)
    let_pass(0.1, "a keepalive that was due before the change may be on its way")
    wire.apply()
    let_pass(2.5, "two more keepalives would be due")
    late = wire.sightings("any", sender="ns1")
    assert not late, f"A sends {late[0].message.name} without a persistent keepalive"


@pytest.mark.requirement("TM-23")
@pytest.mark.bug("IB-14")
@pytest.mark.capability("persistent-keepalive")
def test_link_up_starts_handshake_of_peer_with_keepalive(wired: Tunnel, wire: Wire) -> None:
    wired.nodes["ns1"].set_link("wg0", up=False)
    let_pass(SPACING, "a program is informed that its link is down")
    # A program that does not notice that initiates now (IF-08).
    wired.keep_alive(600)
    wired.a.up()
    wire.wait_for("initiation", "A's initiation when its link is up", sender="ns1", deadline=2.0)
    wire.wait_for("transport", "A to confirm the session", sender="ns1", deadline=2.0)


@pytest.mark.requirement("TM-26")
@pytest.mark.capability("persistent-keepalive")
def test_nothing_is_sent_to_peer_without_endpoint(wired: Tunnel, wire: Wire) -> None:
    renew(wired.a, wired.pub_b, endpoint=None, persistent_keepalive=1)
    # The timers of another peer run at the same time, and those of its initiation.
    let_pass(3.5, "three persistent keepalives would be due")
    seen = wire.sightings("any", sender="ns1")
    assert not seen, f"A has no endpoint for B, and sent {seen[0].message.name} to {seen[0].message.destination}"
    sent = wired.seen_by_a().tx_bytes
    assert sent == 0, f"A has no endpoint for B, and counts {sent} bytes as sent"
    wired.must_ping("ns2", V4_OF_A)
    wire.wait_for("keepalive", "A's keepalive now that B has initiated", sender="ns1", deadline=3.0)


# A link that is down


@pytest.mark.requirement("IF-06")
def test_port_is_closed_while_link_is_down(wired: Tunnel) -> None:
    wired.must_ping("ns1", V4_OF_B)
    wired.nodes["ns1"].set_link("wg0", up=False)
    with wired.nodes["ns2"].socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("192.168.1.1", 1))

        def look() -> bool:
            try:
                sender.send(b"is anybody there?")
            except ConnectionRefusedError:
                return True
            return False

        refused = poll_until(look, bool, 1.0)
    wired.a.up()
    let_pass(SPACING, "B refuses a second initiation within 20 ms, and timestamps are coarse")
    wired.must_ping("ns1", V4_OF_B)
    if not refused:
        differs("its port stays open while its link is down", by=[wired.a.manifest.name])


@pytest.mark.requirement("TM-28")
@pytest.mark.capability("persistent-keepalive")
def test_nothing_is_sent_while_link_is_down(wired: Tunnel, wire: Wire) -> None:
    wired.keep_alive(1)
    wire.wait_for("keepalive", "two keepalives at an interval of 1 s", sender="ns1", nth=2)
    wired.nodes["ns1"].set_link("wg0", up=False)
    let_pass(SPACING, "a program is informed that its link is down")
    wire.apply()
    let_pass(2.5, "two more keepalives would be due")
    sent = wire.sightings("any", sender="ns1")
    wired.a.up()
    wire.wait_for("transport", "A's keepalives with the link up again", sender="ns1", nth=len(sent) + 1)
    if sent:
        differs(f"with its link down it sends {len(sent)} messages in 2.5 s", by=[wired.a.manifest.name])
