"""Check that padding follows the MTU of the link and of the route (`loopback`, `direct`)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from harness import DATA, V4_OF_A, V4_OF_B, Capture, Endpoint, differs, must_ping, poll_until, twin, udp_message
from selftests.support.peers import renew

if TYPE_CHECKING:
    from harness import Interface, Manifest, Message, NetNS, Tunnel

DEFAULT = 1420
PORT = 1111
# Seconds: gotatun reads the MTU every three.
NOTICED = 4.0
# IPv4 and UDP around a message.
OUTSIDE = 20 + 8
HEADER_AND_TAG = 32
OF_ROUTE, OF_LINK = 1299, 1300
# An inner packet of 1297 bytes is padded to 1312, or to less by the MTU of the link (1300) or of the route (1299).
PAYLOAD = 1297 - OUTSIDE
PADDED_TO_ROUTE = OF_ROUTE + HEADER_AND_TAG + OUTSIDE
PADDED_TO_LINK = OF_LINK + HEADER_AND_TAG + OUTSIDE
DROP = """
table ip padding {
    chain input {
        type filter hook input priority 0
        ip length 1360 counter drop comment "1360"
    }
}
"""


def set_mtu(tunnel: Tunnel, mtu: int) -> None:
    for side in (tunnel.a, tunnel.b):
        side.place.set_link(side.name, mtu=mtu)


@pytest.mark.scenario("N07")
@pytest.mark.requirement("MTU-01")
def test_default_mtu_is_1420(loopback: Tunnel) -> None:
    assert [side.place.links()["wg0"]["mtu"] for side in (loopback.a, loopback.b)] == [DEFAULT, DEFAULT]
    names = dict.fromkeys(side.manifest.name for side in (loopback.a, loopback.b) if side.manifest.mtu is not None)
    assert not names, f"{' and '.join(names)}: left at the kernel's MTU of 1500; the lab has set {DEFAULT}"


@pytest.mark.scenario("N07")
@pytest.mark.requirement("MTU-12")
def test_packet_as_long_as_new_mtu_passes_in_one_message(loopback: Tunnel) -> None:
    loopback.must_ping("ns1", V4_OF_B)
    set_mtu(loopback, 9000)
    with Capture(loopback.nodes["ns0"], "lo") as wire:
        must_ping(loopback.nodes["ns1"], V4_OF_B, size=9000 - OUTSIDE)
        long = [
            len(message.payload) - HEADER_AND_TAG for message in wire.messages(kind=DATA) if not message.is_keepalive
        ]
    assert long == [9000, 9000], f"the messages of an echo of 9000 bytes and of its reply carry {long} bytes"


@pytest.mark.scenario("N12")
@pytest.mark.requirement("MTU-03", "MTU-04", "MTU-12")
def test_padding_follows_mtu_of_link_and_route_after_move(loopback: Tunnel) -> None:
    underlay = loopback.nodes["ns0"]
    loopback.must_ping("ns2", V4_OF_A)
    with Capture(underlay, "lo") as wire:
        check_padding(loopback, (underlay, underlay), (wire, wire))


@pytest.mark.scenario("N12")
@pytest.mark.requirement("MTU-03", "MTU-04", "MTU-12")
def test_padding_follows_mtu_of_link_and_route_without_move(direct: Tunnel) -> None:
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    ns1.add_address("veth1", "10.0.0.1/24")
    ns2.add_address("veth2", "10.0.0.2/24")
    direct.b.set_peer(direct.pub_a, endpoint=Endpoint.parse("10.0.0.1:1"))
    direct.must_ping("ns2", V4_OF_A)
    with Capture(ns1, "veth1") as of_a, Capture(ns2, "veth2") as of_b:
        check_padding(direct, (ns1, ns2), (of_a, of_b))


def check_padding(tunnel: Tunnel, underlay: tuple[NetNS, NetNS], wires: tuple[Capture, Capture]) -> None:
    """Check the outer length of packets that are padded up to the route's MTU. underlay, wires: A's and B's."""
    set_mtu(tunnel, OF_LINK)
    for side, other in ((tunnel.a, V4_OF_B), (tunnel.b, V4_OF_A)):
        side.place.add_route(f"{other}/32", dev=side.name, mtu=OF_ROUTE)
    for node in set(underlay):
        node.nft(DROP)
    with twin("a packet of 1360 bytes is dropped"):
        for node in set(underlay):
            prove_the_drop_rule(node)
    # A program may notice the new MTU a moment later.
    lengths = poll_until(lambda: outer_lengths(tunnel, wires), lambda seen: max(seen) <= PADDED_TO_LINK, 2.0)
    sides = dict.fromkeys(zip((tunnel.a.manifest, tunnel.b.manifest), lengths, strict=True))
    assert not (wrong := [complaint for side in sides if (complaint := why_wrong(*side))]), "; ".join(wrong)
    for manifest, length in sides:
        if length == PADDED_TO_LINK:
            how = f"{manifest.name} pads by the MTU of the link only: {length} bytes, not {PADDED_TO_ROUTE}"
            differs(how, by=[manifest.name], requirement="MTU-04")
    must_ping(tunnel.nodes["ns2"], V4_OF_A, size=PAYLOAD)


def why_wrong(manifest: Manifest, length: int) -> str | None:
    if length > PADDED_TO_LINK:
        return f"{manifest.name} padded to {length} bytes outside, and the link's MTU allows {PADDED_TO_LINK}"
    if manifest.kind == "kernel" and length != PADDED_TO_ROUTE:
        return f"the driver padded to {length} bytes outside, not to {PADDED_TO_ROUTE}"
    return None


def prove_the_drop_rule(node: NetNS) -> None:
    """Send a packet of the dropped length from the node to itself, and check that the rule counts it."""
    udp_message(node, "127.0.0.1", PORT, bytes(PADDED_TO_LINK - OUTSIDE))
    assert node.nft_counters()["1360"] == 1


def outer_lengths(tunnel: Tunnel, wires: tuple[Capture, Capture]) -> list[int]:
    """Return the lengths of the outer packets in which A and B send PAYLOAD now."""
    senders = zip((tunnel.a, tunnel.b), (V4_OF_B, V4_OF_A), wires, strict=True)
    return [outer_length(side, other, wire) for side, other, wire in senders]


def outer_length(side: Interface, other: str, wire: Capture) -> int:
    port = side.get().listen_port
    before = len(wire.messages(port=port))
    udp_message(side.place, other, PORT, bytes(PAYLOAD))

    def carries_payload(message: Message) -> bool:
        return message in wire.messages(port=port)[before:] and message.kind == DATA and len(message.payload) > PAYLOAD

    return len(wire.wait_for(carries_payload, 5.0, f"{side.manifest.name} to send {PAYLOAD} bytes").payload) + OUTSIDE


@pytest.mark.requirement("MTU-03", "MSG-12")
@pytest.mark.bug("IB-51")
def test_plaintext_is_never_longer_than_mtu(direct: Tunnel) -> None:
    ns1 = direct.nodes["ns1"]
    ns1.add_address("veth1", "10.0.0.1/24")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24")
    renew(direct.a, direct.pub_b, endpoint=Endpoint("10.0.0.2", 2))
    direct.must_ping("ns1", V4_OF_B)
    seen: dict[tuple[int, int], int] = {}
    # They differ by no multiple of 16, and each is lower than the one before.
    for mtu in (DEFAULT, 1281, 1280):
        set_mtu(direct, mtu)
        with Capture(ns1, "veth1") as wire:
            # A program may notice the new MTU a moment later.
            poll_until(partial(excess, ns1, wire, mtu), lambda bytes_over: bytes_over <= 0, NOTICED)
        with Capture(ns1, "veth1") as wire:
            sizes = list(range(mtu - 16, mtu + 1))
            seen |= {(mtu, size): length for size, length in zip(sizes, plaintexts(ns1, wire, sizes), strict=True)}
    wrong = [
        f"{length} for {size} at an MTU of {mtu}" for (mtu, size), length in seen.items() if not size <= length <= mtu
    ]
    assert not wrong, f"bytes of plaintext longer than the MTU, or shorter than the packet: {', '.join(wrong)}"
    expected = {(mtu, size): min(mtu, -(-size // 16) * 16) for mtu, size in seen}
    unlike = [
        f"{seen[key]} for {key[1]} at an MTU of {key[0]}, not {expected[key]}"
        for key in seen
        if seen[key] != expected[key]
    ]
    if unlike:
        differs(f"bytes of plaintext: {unlike[0]}, and {len(unlike) - 1} more", by=[direct.a.manifest.name])


def excess(node: NetNS, wire: Capture, mtu: int) -> int:
    """Send a packet as long as the MTU; return by how many bytes its plaintext is longer."""
    return plaintexts(node, wire, [mtu])[0] - mtu


def plaintexts(node: NetNS, wire: Capture, sizes: list[int]) -> list[int]:
    """Send inner packets of these lengths to B, in order; return how long their plaintext is, padding included."""
    before = len(data_of_a(wire))
    for size in sizes:
        udp_message(node, V4_OF_B, PORT, bytes(size - OUTSIDE))
    wire.wait_for(lambda _: len(data_of_a(wire)) >= before + len(sizes), 5.0, f"{len(sizes)} messages of A")
    return [len(message.payload) - HEADER_AND_TAG for message in data_of_a(wire)[before:]]


def data_of_a(wire: Capture) -> list[Message]:
    """Return A's data messages; answers to them may make it send more than the keepalives that are left out."""
    return [message for message in wire.messages(kind=DATA, port=1) if not message.is_keepalive]
