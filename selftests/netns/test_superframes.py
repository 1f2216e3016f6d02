"""Send superframes by each offload of the kernel: every byte arrives, with offloads and without (`direct`)."""

from __future__ import annotations

import socket
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from harness import (
    DIRECT,
    V4_OF_A,
    V4_OF_B,
    V6_OF_A,
    V6_OF_B,
    Endpoint,
    HarnessError,
    Registry,
    Tunnel,
    effort,
    not_reached,
    set_offloads,
)
from harness.net.checksum import checksum
from harness.scripted.inside import Inside
from harness.wire.capture import take, tap
from selftests.support.recorded import superframe
from selftests.support.superframe_traffic import (
    OFFLOADS,
    PATIENCE,
    Trace,
    has_batch_engine,
    must_have_used,
    must_pass_superframes,
    of_kernel,
    off_with,
    refusal_of_batch,
    send_batch,
    send_tcp,
    send_udp,
    sends_batches,
    traced,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Lab, Manifest, NetNS, Pair

MIB = 1 << 20
# MTUs of the tunnel, and of the link: Ethernet's and the largest.
SMALLEST, DEFAULT, JUMBO, LONGEST = 1280, 1420, 9000, 34736
ETHERNET, WIDEST = 1500, 65535
# Offloads, MTUs and directions: what a pair sends 1 GiB in by night.
MEASUREMENTS = 6 * 4 * 2
# The largest payload of a UDP datagram over IPv4, and what a data message adds to its packet.
LARGEST_BATCH, MESSAGE = 65507, 32
# The most bytes in a segment of each TCP connection: as the MTU allows, and so few that one superframe is more than a
# batch of datagrams can hold.
SEGMENTS = (None, None, None, 88)
# A batch of datagrams of which the last is shorter, and the bytes of UDP and IPv4 headers before each.
BATCH, HEADERS = (*(1300,) * 9, 300), 28
# Seconds for a datagram that must not arrive.
UNANSWERED = 0.2
REFUSING = """\
table inet refusing {
    chain output {
        type filter hook output priority 0
        udp sport 1 counter drop comment "refused"
    }
}
"""
# A path on which congestion marks one batch in sixteen.
CONGESTED = """\
table inet congested {
    chain output {
        type filter hook output priority 0
        udp sport 1 meta length > 2000 numgen inc mod 16 == 0 ip ecn set ce
    }
}
"""
# The most TCP connections until a superframe says that its sender has reduced its window.
CONNECTIONS = 50
# Bytes of a segment of a superframe that the test makes, and the last number before the identification begins again.
SEGMENT, LAST_IDENTIFICATION = 1000, 0xFFFF
# A flag of TCP, and that of the virtio header which says that only the first segment has it.
CWR, GSO_ECN = 0x80, 0x80
OVER_V4, OVER_V6 = ("10.0.0.1", "10.0.0.2"), ("fd00:aa::1", "fd00:aa::2")


@dataclass(frozen=True, slots=True)
class Way:
    """How an offload is used: by TCP or UDP, over this inner family and these outer addresses."""

    protocol: str
    inner: tuple[str, str]
    outer: tuple[str, str]


WAYS = {
    "tso4": Way("tcp", (V4_OF_A, V4_OF_B), OVER_V4),
    "tso6": Way("tcp", (V6_OF_A, V6_OF_B), OVER_V4),
    "uso4": Way("udp", (V4_OF_A, V4_OF_B), OVER_V4),
    "uso6": Way("udp", (V6_OF_A, V6_OF_B), OVER_V4),
    "udp-segment": Way("tcp", (V4_OF_A, V4_OF_B), OVER_V6),
    "udp-gro": Way("udp", (V6_OF_A, V6_OF_B), OVER_V6),
}


@dataclass(frozen=True, slots=True)
class Connected:
    """A tunnel with a session over a link that passes superframes; traces: of A and B, if they are refwg."""

    tunnel: Tunnel
    mtu: int
    traces: tuple[Trace, Trace]

    @property
    def ends(self) -> tuple[NetNS, NetNS]:
        """The nodes of A and B."""
        return self.tunnel.nodes["ns1"], self.tunnel.nodes["ns2"]

    def send(self, way: Way, size: int) -> None:
        """Send bytes in both directions, and check all that arrive."""
        chance = self.tunnel.lab.random
        # refwg keeps the order, as the driver does. wireguard-go may number packets that waited out of their order.
        is_ordered = all("refwg" in {side.manifest.name, side.manifest.base} for side in (self.tunnel.a, self.tunnel.b))
        for ends, address in ((self.ends, way.inner[1]), (self.ends[::-1], way.inner[0])):
            if way.protocol == "udp":
                send_udp(ends, address, size, self.mtu, chance, is_ordered=is_ordered)
                continue
            for segment in SEGMENTS:
                send_tcp(ends, address, chance.randint(1, 2 * size // len(SEGMENTS)), chance, segment=segment)

    def send_batch(self, patience: float = PATIENCE) -> None:
        """Send BATCH from A to B, and check that just these datagrams arrive; patience: seconds for each."""
        sender, receiver = (node.socket(socket.AF_INET, socket.SOCK_DGRAM) for node in self.ends)
        with closing(sender), closing(receiver):
            receiver.bind((V4_OF_B, 0))
            sender.connect(receiver.getsockname())
            send_batch((sender, receiver), 0, BATCH, what="the batch", patience=patience)

    def must_have_used(self, offload: str) -> None:
        """Check that each side with the batch engine has used an offload in each direction that it has.

        From a peer that sends its messages one by one no superframe need come in: the stack joins them by chance.
        """
        sides = (self.tunnel.a, self.tunnel.b)
        for side, other, trace in zip(sides, sides[::-1], self.traces, strict=True):
            directions = {"udp-segment": ("out",), "udp-gro": ("in",)}.get(offload, ("out", "in"))
            for direction in directions if has_batch_engine(side.manifest) else ():
                if direction == "out" or sends_batches(other.manifest):
                    must_have_used(side, trace, direction, offload)


def connect(
    lab: Lab,
    sides: tuple[Manifest, Manifest],
    outer: tuple[str, str],
    *,
    mtu: int = DEFAULT,
    options: tuple[str, ...] = (),
) -> Connected:
    """Make a tunnel over these addresses, and a session; options: further ones of refwg."""
    a, b = (
        Trace(lab.directory / f"{name}.trace", f"{name} ({side.name})") for name, side in zip("AB", sides, strict=True)
    )
    tunnel = Tunnel(lab, DIRECT, traced(sides[0], a.file, *options), traced(sides[1], b.file, *options))
    for node, device, number in ((tunnel.nodes["ns1"], "veth1", 0), (tunnel.nodes["ns2"], "veth2", 1)):
        node.add_address(device, f"{OVER_V4[number]}/24", f"{OVER_V6[number]}/96")
        # Messages of larger packets would be fragmented, and the stack takes no batch of those.
        node.set_link(device, mtu=ETHERNET if mtu <= DEFAULT else WIDEST)
        node.set_link("wg0", mtu=mtu)
        must_pass_superframes(node, device)
    tunnel.a.set_peer(tunnel.pub_b, endpoint=Endpoint(outer[1], 2))
    tunnel.must_ping("ns1", V4_OF_B)
    return Connected(tunnel, mtu, (a, b))


@pytest.mark.long_in_guest
@pytest.mark.bug("IB-57", "IB-58")
@pytest.mark.requirement("Q-11", "Q-04", "DT-31")
@pytest.mark.capability("ipv6-underlay", "update-peer")
@pytest.mark.parametrize(
    "mtu", [DEFAULT, *(pytest.param(mtu, marks=pytest.mark.nightly) for mtu in (SMALLEST, JUMBO, LONGEST))]
)
@pytest.mark.parametrize("offload", WAYS)
def test_superframes_arrive_unchanged(lab: Lab, pair: Pair, offload: str, mtu: int) -> None:
    way = WAYS[offload]
    connected = connect(lab, pair, way.outer, mtu=mtu)
    connected.send(way, effort(MIB, 1024 * MIB // MEASUREMENTS))
    if 2 * (mtu + MESSAGE) <= LARGEST_BATCH:
        connected.must_have_used(offload)


@pytest.fixture
def refwg() -> tuple[Manifest, Manifest]:
    """A and B: refwg with the batch engine."""
    if find_spec("numpy") is None:
        pytest.skip("refwg has no batch engine without numpy, which a guest does not have")
    manifest = Registry().get("refwg+batch")
    return manifest, manifest


@pytest.mark.long_in_guest
@pytest.mark.bug("IB-58")
@pytest.mark.requirement("Q-11", "Q-04", "DT-31")
@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.nightly) for name in OFFLOADS), "all"])
def test_same_data_arrives_without_offload(lab: Lab, refwg: tuple[Manifest, Manifest], name: str) -> None:
    connected = connect(lab, refwg, OVER_V4, options=("--no-offload", name))
    for way in (WAYS["tso4"], WAYS["tso6"], WAYS["uso4"], WAYS["uso6"]):
        connected.send(way, effort(MIB // 4, 8 * MIB))
    for trace, node in zip(connected.traces, connected.ends, strict=True):
        on = of_kernel(node) - off_with(name)
        assert trace.switched_on() == on, f"{trace.name} without {name}: {trace.switched_on()} are on, expected {on}"
        used = {offload for _, offload in trace.used()}
        assert used <= on, f"{trace.name} used {', '.join(used - on)}, which is switched off"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the stack refuses a batch that it takes one by one, and over which addresses.

    link: the MTU of the link. tx: whether the link's device computes checksums. errno: the answer to a batch.
    """

    errno: str
    outer: tuple[str, str]
    mtu: int = ETHERNET
    tx: bool = True

    def apply(self, connected: Connected) -> None:
        """Make the stack refuse batches of both sides."""
        for node, device in zip(connected.ends, ("veth1", "veth2"), strict=True):
            node.set_link(device, mtu=self.mtu)
            set_offloads(node, device, tx=self.tx)


@pytest.mark.long_in_guest
@pytest.mark.bug("IB-58", "IB-71")
@pytest.mark.requirement("MTU-08", "Q-04", "IF-11")
@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(Refusal("EMSGSIZE", OVER_V4, mtu=SMALLEST), id="longer-than-path-v4"),
        pytest.param(Refusal("EMSGSIZE", OVER_V6, mtu=SMALLEST), id="longer-than-path-v6"),
        pytest.param(Refusal("EIO", OVER_V4, tx=False), id="no-checksum-offload"),
    ],
)
def test_refused_batch_is_sent_one_by_one(lab: Lab, refwg: tuple[Manifest, Manifest], refusal: Refusal) -> None:
    connected = connect(lab, refwg, refusal.outer)
    a, trace = connected.tunnel.a, connected.traces[0]
    refusal.apply(connected)
    answer = refusal_of_batch(connected.ends[0], refusal.outer[1], BATCH[0] + HEADERS + MESSAGE)
    if answer != refusal.errno:
        pytest.skip(f"this kernel answers a batch with {answer or 'no error'}, not {refusal.errno}")
    connected.send_batch()
    assert ("out", "udp-segment") not in trace.used(), "a batch was sent that the stack refuses"
    must_have_used(a, trace, "out", "uso4")
    seen_by_a, seen_by_b = connected.tunnel.counted()
    assert seen_by_a.tx_bytes == seen_by_b.rx_bytes, "A counts other bytes than B if its batches are refused"
    replace(refusal, mtu=ETHERNET, tx=True).apply(connected)
    connected.send_batch()
    must_have_used(a, trace, "out", "udp-segment")


@pytest.mark.long_in_guest
@pytest.mark.bug("IB-58", "IB-83")
@pytest.mark.requirement("ERR-07", "IF-11")
def test_batch_that_firewall_drops_is_counted_and_lost(lab: Lab, refwg: tuple[Manifest, Manifest]) -> None:
    connected = connect(lab, refwg, OVER_V4)
    connected.send_batch()
    must_have_used(connected.tunnel.a, connected.traces[0], "out", "udp-segment")
    before = connected.tunnel.counted()[0].tx_bytes
    connected.ends[0].nft(REFUSING)
    with pytest.raises(HarnessError, match="datagram 0 did not arrive"):
        connected.send_batch(patience=UNANSWERED)
    assert connected.ends[0].nft_counters()["refused"], "no datagram met the firewall"
    # As the driver does: what a firewall drops was routed (send4).
    sent = connected.tunnel.seen_by_a().tx_bytes - before
    wanted = sum(MESSAGE + -(-(length + HEADERS) // 16) * 16 for length in BATCH)
    assert sent == wanted, f"A counts {sent} bytes as sent for a batch that a firewall dropped, expected {wanted}"
    connected.ends[0].nft("delete table inet refusing")
    connected.send_batch()


@pytest.mark.long_in_guest
@pytest.mark.bug("IB-57")
@pytest.mark.requirement("Q-11", "DT-29")
def test_cwr_is_in_first_segment_of_superframe_only(lab: Lab, implementation: Manifest) -> None:
    if not has_batch_engine(implementation):
        pytest.skip(f"{implementation.name} does not take superframes with CWR from its start on (TUN_F_TSO_ECN)")
    connected = connect(lab, (implementation, implementation), OVER_V4)
    for node in connected.ends:
        node.sysctl("net.ipv4.tcp_ecn", 1)
    connected.ends[0].nft(CONGESTED)
    reduced: list[tuple[bytes, bytes]] = []
    with closing(tap(connected.ends[0], "wg0")) as outside, closing(Inside(connected.ends[1], "wg0")) as inside:
        # Without a superframe that says so, it is not the engine that has to leave the flag out. Whether the segment
        # after a mark is one is up to TCP's window: a connection on a busy machine may have none.
        for _ in range(CONNECTIONS):
            send_tcp(connected.ends, V4_OF_B, MIB, lab.random)
            reduced += [(header, packet) for header, packet in outbound(outside) if has_cwr(packet)]
            if any(header[1] & GSO_ECN for header, _ in reduced):
                break
        else:
            not_reached(
                f"{CONNECTIONS} connections of A sent {len(reduced)} packets with CWR, none of them a superframe"
            )
        arrived = [packet for packet in inside.packets() if has_cwr(packet)]
    assert len(arrived) == len(reduced), (
        f"B received {len(arrived)} segments with CWR for {len(reduced)} packets and superframes that A's TCP sent"
    )


@pytest.mark.long_in_guest
@pytest.mark.bug("IB-57")
@pytest.mark.requirement("Q-11")
@pytest.mark.parametrize("first", [1, LAST_IDENTIFICATION - 2, LAST_IDENTIFICATION], ids="from-{:#06x}".format)
def test_segments_have_following_identifications(lab: Lab, implementation: Manifest, first: int) -> None:
    if not has_batch_engine(implementation):
        pytest.skip(f"{implementation.name} does not tell which superframes it has cut")
    connected = connect(lab, (implementation, Registry().get("refwg+simple")), OVER_V4)
    frame = superframe(V4_OF_A, V4_OF_B, bytes(5 * SEGMENT), size=SEGMENT, identification=first)
    with closing(tap(connected.ends[0], "wg0")) as inside, closing(Inside(connected.ends[1], "wg0")) as delivered:
        inside.sendmsg([frame])
        arrived = [delivered.expect(is_of(number)) for number in range(5)]
    must_have_used(connected.tunnel.a, connected.traces[0], "out", "tso4")
    numbers = [int.from_bytes(packet[4:6]) for packet in arrived]
    wanted = [(first + number) % (LAST_IDENTIFICATION + 1) for number in range(5)]
    assert numbers == wanted, f"the segments of a superframe have the identifications {numbers}, expected {wanted}"
    wrong = [number for number, packet in enumerate(arrived) if checksum(packet[:20])]
    assert not wrong, f"of the segments with identifications {numbers}, {wrong} have a wrong checksum of the IP header"


def is_of(number: int) -> Callable[[bytes], bool]:
    """Return a condition that a packet is this segment of the superframe, by its TCP sequence number."""
    return lambda packet: packet[9] == socket.IPPROTO_TCP and packet[24:28] == (1 + number * SEGMENT).to_bytes(4)


def outbound(tapped: socket.socket) -> list[tuple[bytes, bytes]]:
    """Return the packets that the node has sent into the tunnel, with their virtio headers."""
    packets: list[tuple[bytes, bytes]] = []
    while True:
        try:
            header, (packet, _, _, address) = take(tapped)
        except BlockingIOError:
            return packets
        if address[2] == socket.PACKET_OUTGOING:
            packets.append((header or bytes(10), packet))


def has_cwr(packet: bytes) -> bool:
    """Return whether this is a TCP segment over IPv4 without options whose sender has reduced its window (RFC 3168)."""
    return packet[0] == 0x45 and packet[9] == socket.IPPROTO_TCP and bool(packet[33] & CWR)
