"""Check which peer an inner packet may come from and goes to while allowed-ips change (`wired`)."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest

from harness import (
    V4_OF_A,
    V4_OF_B,
    V6_OF_A,
    V6_OF_B,
    Capture,
    Datagram,
    DeviceConfig,
    Endpoint,
    PeerConfig,
    allowed_ips,
    poll_until,
    twin,
    udp_message,
    udp_receiver,
    wait_for,
)
from harness.wire.messages import INITIATION
from selftests.support.inner import Inside
from selftests.support.peers import renew
from selftests.support.shapes import datagram, ipv4, ipv6

if TYPE_CHECKING:
    import socket

    from harness import Key, Lab, Manifest, Message, NetNS, Tunnel, Wire

PORT = 1111
DEADLINE = 5.0
# The other peer's endpoint, on B's node: nothing listens there, and an initiation to it shows that it was chosen.
OTHERS_PORT = 9
OTHERS_ENDPOINT = Endpoint("192.168.1.2", OTHERS_PORT)
V4_ALIAS, V6_ALIAS = "192.168.241.3", "fd00::3"
V4_NET, V6_NET = "192.168.241.0/24", "fd00::/112"
FAMILIES = [
    pytest.param((V4_OF_A, V4_OF_B, V4_ALIAS), V4_NET, id="v4"),
    pytest.param((V6_OF_A, V6_OF_B, V6_ALIAS), V6_NET, id="v6"),
]
# From the shortest to the longest prefix, and an address that each one covers and no longer one does.
SHELLS = {
    "v4": (
        ("10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32"),
        ("10.9.9.9", "10.1.9.9", "10.1.2.9", "10.1.2.3"),
    ),
    "v6": (
        ("fd10::/16", "fd10:1::/32", "fd10:1:2::/48", "fd10:1:2::3/128"),
        ("fd10:9::9", "fd10:1:9::9", "fd10:1:2:9::9", "fd10:1:2::3"),
    ),
}


def single(address: str) -> str:
    """Return the prefix of this address alone."""
    return f"{address}/{128 if ':' in address else 32}"


def send(node: NetNS, address: str, data: bytes, *, source: str | None = None) -> None:
    """Send a datagram; the driver returns an error to a local sender whose packet has no peer."""
    with suppress(OSError):
        udp_message(node, address, PORT, data, source=source)


def first(receiver: socket.socket, what: str) -> bytes:
    """Return the datagram that arrives first: datagrams of one peer stay in order."""
    return wait_for(Datagram(receiver), DEADLINE, what)[0]


def ports_of(wire: Wire, word: str) -> list[int]:
    """Return the destination ports of A's messages of a kind."""
    return [s.message.destination[1] for s in wire.sightings(word, sender="ns1")]


def assert_traffic_is_of_peer(
    wired: Tunnel, wire: Wire, addresses: tuple[str, str, str], *, owner: bool, why: str
) -> None:
    """Check both directions of an address of B: with `owner` B owns it at A, else the other peer does.

    addresses: A's, the one in question, and an alias that B always owns, for markers.
    """
    a, asked, alias = addresses
    ns1, ns2 = wired.nodes["ns1"], wired.nodes["ns2"]
    expected = b"asked" if owner else b"marker"
    with udp_receiver(ns1, a, PORT) as at_a, udp_receiver(ns2, "::", PORT) as at_b:
        send(ns1, asked, b"asked")
        send(ns1, alias, b"marker")
        arrived = first(at_b, "A's datagram at B")
        assert arrived == expected, f"{why}: B received {arrived!r} from A first, sent to {asked} and then to {alias}"
        send(ns2, a, b"asked", source=asked)
        send(ns2, a, b"marker", source=alias)
        arrived = first(at_a, "B's datagram at A")
        assert arrived == expected, (
            f"{why}: A delivered {arrived!r} of B first, sent from {asked} and then from {alias}"
        )
    chosen = ports_of(wire, "initiation")
    assert owner or OTHERS_PORT in chosen, f"{why}: A sent the packet for {asked} to neither peer"


@pytest.fixture
def shared(wired: Tunnel, wire: Wire) -> Tunnel:
    """A tunnel in which B owns its network at A, and has an alias in it; with a session."""
    wired.nodes["ns2"].add_address("wg0", f"{V4_ALIAS}/24", f"{V6_ALIAS}/112")
    renew(wired.a, wired.pub_b, allowed_ips=allowed_ips(V4_NET, V6_NET))
    wired.must_ping("ns1", V4_ALIAS)
    wire.apply()
    return wired


@pytest.fixture
def other(wired: Tunnel) -> Key:
    """The public key of a peer of A that never answers."""
    return wired.lab.key("key3").public()


@pytest.mark.requirement("AIP-01")
@pytest.mark.parametrize("family", ["v4", "v6"])
def test_longest_of_four_prefixes_selects_peer(lab: Lab, implementation: Manifest, family: str) -> None:
    ns1 = lab.node("ns1")
    wg0 = lab.interface("wg0", implementation, ns1)
    prefixes, addresses = SHELLS[family]
    ports = [9001 + number for number in range(len(prefixes))]
    # The longest one first: the order in which they were added must not matter.
    peers = [
        PeerConfig(
            public_key=lab.key(f"peer of {prefix}").public(),
            endpoint=Endpoint("127.0.0.1", port),
            allowed_ips=allowed_ips(prefix),
        )
        for prefix, port in zip(prefixes, ports, strict=True)
    ]
    wg0.set(DeviceConfig(private_key=lab.key("own"), listen_port=1, peers=tuple(reversed(peers))))
    wg0.up("10.0.0.1/8", "fd10::1/16")
    with Capture(ns1, "lo") as wire:
        for number, address in enumerate(addresses):
            udp_message(ns1, address, PORT, b"who gets this?")
            # Each peer gets one initiation, for its first packet.
            wire.wait_for(
                partial(is_later_initiation, wire, number), DEADLINE, f"an initiation for the packet to {address}"
            )
            seen = [message.destination[1] for message in wire.messages(kind=INITIATION)]
            chosen = [prefixes[port - ports[0]] for port in seen[number:]]
            assert chosen == [prefixes[number]], (
                f"the packet for {address} goes to the peer of {chosen}, expected {prefixes[number]}"
            )


# A shorter prefix, and two longer ones in it: one in its lower half, one in its upper half.
HALVES = {
    "v4": ("10.0.0.0/8", "10.1.0.0/16", "10.201.0.0/16"),
    "v6": ("fd10::/16", "fd10:1::/32", "fd10:c001::/32"),
}
LOOPBACK_PORTS = 9001, 9002


@pytest.mark.requirement("AIP-01", "AIP-11")
@pytest.mark.parametrize("half", [1, 2], ids=["lower", "upper"])
@pytest.mark.parametrize("family", ["v4", "v6"])
def test_longer_prefix_outlives_shorter_one(lab: Lab, implementation: Manifest, family: str, half: int) -> None:
    ns1 = lab.node("ns1")
    wg0 = lab.interface("wg0", implementation, ns1)
    shorter, longer = HALVES[family][0], HALVES[family][half]
    outer, inner = (lab.key(f"peer of {prefix}").public() for prefix in (shorter, longer))
    peers = tuple(
        PeerConfig(public_key=key, endpoint=Endpoint("127.0.0.1", port), allowed_ips=allowed_ips(prefix))
        for key, port, prefix in zip((outer, inner), LOOPBACK_PORTS, (shorter, longer), strict=True)
    )
    wg0.set(DeviceConfig(private_key=lab.key("own"), listen_port=1, peers=peers))
    wg0.up("10.0.0.1/8", "fd10::1/16")
    wg0.set_peer(outer, remove=True)
    assert [peer.allowed_ips for peer in wg0.get().peers] == [allowed_ips(longer)]
    address = str(ip_network(longer)[1])
    with Capture(ns1, "lo") as wire:
        udp_message(ns1, address, PORT, b"who gets this?")
        why = f"an initiation for a packet to {address}, after the peer of {shorter} was removed"
        chosen = wire.wait_for(lambda message: message.kind == INITIATION, DEADLINE, why)
    assert chosen.destination[1] == LOOPBACK_PORTS[1], f"the packet for {address} goes to port {chosen.destination[1]}"


def is_later_initiation(wire: Capture, number: int, _: Message) -> bool:
    """Return whether there are more initiations than this number."""
    return len(wire.messages(kind=INITIATION)) > number


@pytest.mark.requirement("AIP-07")
@pytest.mark.parametrize(
    ("owned", "covered", "not_covered"),
    [
        pytest.param(("::/0", "::ffff:c0a8:0/96", "::c0a8:f102/128"), (V6_OF_A, V6_OF_B), (V4_OF_A, V4_OF_B), id="v6"),
        pytest.param(("0.0.0.0/0", "253.0.0.0/8"), (V4_OF_A, V4_OF_B), (V6_OF_A, V6_OF_B), id="v4"),
    ],
)
def test_prefix_of_one_family_covers_no_other(
    wired: Tunnel, owned: tuple[str, ...], covered: tuple[str, str], not_covered: tuple[str, str]
) -> None:
    ns1, ns2 = wired.nodes["ns1"], wired.nodes["ns2"]
    with twin("both families pass while B owns addresses of both"):
        wired.must_ping("ns1", not_covered[1])
        wired.must_ping("ns1", covered[1])
    renew(wired.a, wired.pub_b, allowed_ips=allowed_ips(*owned))
    wired.must_ping("ns1", covered[1])
    with udp_receiver(ns1, "::", PORT) as at_a, udp_receiver(ns2, "::", PORT) as at_b:
        for node, receiver, side in ((ns1, at_b, 1), (ns2, at_a, 0)):
            send(node, not_covered[side], b"not covered")
            send(node, covered[side], b"covered")
            arrived = first(receiver, "the datagram that is covered")
            how = f"sent from {node.name} to {not_covered[side]}, which {' and '.join(owned)} do not cover"
            assert arrived == b"covered", f"{arrived!r} was delivered, {how}"


@pytest.mark.requirement("AIP-08")
def test_peer_without_allowed_ips_has_session_but_no_data(wired: Tunnel, wire: Wire) -> None:
    ns1, ns2 = wired.nodes["ns1"], wired.nodes["ns2"]
    owned = wired.seen_by_a().allowed_ips
    # Without an endpoint too: A must learn it from B.
    renew(wired.a, wired.pub_b, allowed_ips=(), endpoint=None)
    with udp_receiver(ns1, V4_OF_A, PORT) as at_a:
        send(ns2, V4_OF_A, b"refused", source=V4_OF_B)
        handshake = poll_until(lambda: wired.seen_by_a().latest_handshake, bool, DEADLINE)
        assert handshake, "a peer without allowed-ips got no session"
        assert str(wired.seen_by_a().endpoint) == "192.168.1.2:2"
        send(ns1, V4_OF_B, b"to nobody")
        renew(wired.a, wired.pub_b, allowed_ips=owned)
        with twin("datagrams pass both ways with allowed-ips"):
            wired.must_ping("ns1", V4_OF_B)
            send(ns2, V4_OF_A, b"allowed")
            arrived = first(at_a, "B's datagram at A")
    assert arrived == b"allowed", f"A delivered {arrived!r} of a peer without allowed-ips"
    begun = wire.sightings("handshake").index(wire.sightings("initiation", sender="ns1")[0])
    sent = [
        str(s)
        for s in wire.sightings("data", sender="ns1")
        if s.message.time < wire.sightings("handshake")[begun].message.time
    ]
    assert not sent, f"A sent data to a peer without allowed-ips: {sent}"


@pytest.mark.requirement("AIP-09")
@pytest.mark.parametrize(("addresses", "network"), FAMILIES)
def test_removed_peer_frees_its_prefix(
    shared: Tunnel, wire: Wire, other: Key, addresses: tuple[str, str, str], network: str
) -> None:
    shared.a.set_peer(other, endpoint=OTHERS_ENDPOINT, allowed_ips=allowed_ips(single(addresses[1])))
    assert_traffic_is_of_peer(shared, wire, addresses, owner=False, why=f"another peer owns a part of {network}")
    shared.a.set_peer(other, remove=True)
    wire.apply()
    assert_traffic_is_of_peer(shared, wire, addresses, owner=True, why=f"the other peer is gone, B owns {network}")
    assert ports_of(wire, "handshake") == [], "the removal of another peer began a handshake"


@pytest.mark.requirement("AIP-19", "AIP-03")
@pytest.mark.bug("IB-41")
@pytest.mark.parametrize(("addresses", "network"), FAMILIES)
def test_prefix_given_to_new_peer_is_taken_from_old_one(
    shared: Tunnel, wire: Wire, other: Key, addresses: tuple[str, str, str], network: str
) -> None:
    prefix = allowed_ips(network)
    renew(shared.a, shared.pub_b, allowed_ips=(*prefix, *allowed_ips(single(addresses[2]))))
    shared.must_ping("ns1", addresses[2])
    with twin("the prefix is B's"):
        assert_traffic_is_of_peer(shared, wire, addresses, owner=True, why="the prefix has not moved yet")
    wire.apply()
    shared.a.set_peer(other, endpoint=OTHERS_ENDPOINT, allowed_ips=prefix)
    assert_traffic_is_of_peer(shared, wire, addresses, owner=False, why=f"{network} has moved to another peer")
    assert 2 not in ports_of(wire, "handshake"), "a moved prefix began a handshake with B"
    listed = [peer.public_key for peer in shared.a.get().peers if prefix[0] in peer.allowed_ips]
    assert listed == [other], f"{network} is listed by {listed}, expected {other!r} alone"


@pytest.mark.requirement("AIP-19", "AIP-04")
@pytest.mark.bug("IB-41")
@pytest.mark.capability("update-peer")
@pytest.mark.parametrize(("addresses", "network"), FAMILIES)
def test_prefix_changes_apply_to_next_packet(
    shared: Tunnel, wire: Wire, other: Key, addresses: tuple[str, str, str], network: str
) -> None:
    _, asked, alias = addresses
    mine, marker = allowed_ips(single(asked)), allowed_ips(single(alias))
    shared.a.set_peer(other, endpoint=OTHERS_ENDPOINT, allowed_ips=mine)
    assert_traffic_is_of_peer(shared, wire, addresses, owner=False, why=f"another peer owns a part of {network}")
    wire.apply()
    shared.a.set_peer(shared.pub_b, allowed_ips=mine)
    assert_traffic_is_of_peer(shared, wire, addresses, owner=True, why=f"{asked} has moved to B")
    wire.apply()
    shared.a.set_peer(other, allowed_ips=allowed_ips(network))
    shared.a.set_peer(shared.pub_b, replace_allowed_ips=True, allowed_ips=marker)
    shared.a.set_peer(other, endpoint=Endpoint("192.168.1.2", OTHERS_PORT))
    listed = {peer.public_key: peer.allowed_ips for peer in shared.a.get().peers}
    assert listed[shared.pub_b] == marker, f"B lists {listed[shared.pub_b]} after they were replaced by {marker}"
    ns1, ns2 = shared.nodes["ns1"], shared.nodes["ns2"]
    with udp_receiver(ns2, "::", PORT) as at_b:
        send(ns1, asked, b"asked")
        send(ns1, alias, b"marker")
        assert first(at_b, "A's datagram at B") == b"marker", (
            f"B received the packet for {asked}, which B owns no longer"
        )
    with udp_receiver(ns1, addresses[0], PORT) as at_a:
        send(ns2, addresses[0], b"asked", source=asked)
        send(ns2, addresses[0], b"marker", source=alias)
        assert first(at_a, "B's datagram at A") == b"marker", (
            f"A delivered a packet from {asked}, which B owns no longer"
        )
    assert 2 not in ports_of(wire, "handshake"), "a change of allowed-ips began a handshake with B"


@pytest.mark.requirement("AIP-18")
@pytest.mark.parametrize("owner", ["B", "other"])
def test_multicast_goes_to_owner_of_prefix_only(shared: Tunnel, wire: Wire, other: Key, owner: str) -> None:
    everyone = allowed_ips("224.0.0.0/4", "255.255.255.255/32", "ff00::/8")
    of_b, of_other = (everyone, ()) if owner == "B" else ((), everyone)
    renew(shared.a, shared.pub_b, allowed_ips=(*allowed_ips(V4_NET, V6_NET), *of_b))
    shared.must_ping("ns1", V4_ALIAS)
    shared.a.set_peer(other, endpoint=OTHERS_ENDPOINT, allowed_ips=(*allowed_ips("10.0.0.0/8", "fd10::/16"), *of_other))
    packets = [
        *(
            ipv4(datagram(V4_OF_A, to), to=to)
            for to in ("224.0.0.1", "224.1.2.3", "239.255.255.250", "255.255.255.255")
        ),
        *(ipv6(datagram(V6_OF_A, to), to=to) for to in ("ff02::1", "ff05::1:3")),
    ]
    marker = ipv4(datagram(V4_OF_A, V4_ALIAS, b"the last"), to=V4_ALIAS)
    wire.apply()
    with Inside(shared.nodes["ns1"]) as at_a, Inside(shared.nodes["ns2"]) as at_b:
        for packet in (*packets, marker):
            at_a.send(packet)
        arrived = at_b.wait_for(marker, DEADLINE, "the last packet at B")
    expected = packets if owner == "B" else []
    copies = [arrived.count(packet) for packet in packets]
    assert copies == [int(owner == "B")] * len(packets), f"B received {copies} copies of packets that are of {owner}"
    assert len(arrived) == len(expected), "B received a packet that nobody sent"
    chosen = ports_of(wire, "initiation")
    assert chosen == ([] if owner == "B" else [OTHERS_PORT]), (
        f"{owner} owns them, and A initiates to the ports {chosen}"
    )
    counted = len(ports_of(wire, "data"))
    assert counted == len(expected) + 1, f"A sent {counted} data messages for {len(expected) + 1} packets"
