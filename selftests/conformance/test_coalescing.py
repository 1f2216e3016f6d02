"""Check that packets of one flow are delivered one for one, although a program may join them (GRO)."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from harness import Target, stopped, twin
from harness.net.checksum import checksum
from selftests.support.superframe_traffic import Trace, has_batch_engine, must_have_used, traced

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Lab, Manifest, ScriptedPeer

# Addresses in the tunnel that nobody has, so that nobody answers.
NOWHERE = {4: "192.168.241.250", 6: "fd00::fa"}
TCP, UDP, DESTINATION_OPTIONS = 6, 17, 60
FIN, PSH, ACK, URG = 0x01, 0x08, 0x10, 0x20
MORE_FRAGMENTS, DONT_FRAGMENT = 0x2000, 0x4000
SIZE = 100
# P: a plain packet; V: one that differs in one thing. Neighbours are equal or different, alone and in pairs.
PATTERN = "PPPPVPVVPPVPPPVV"
TIMESTAMPS = b"\1\1\x08\x0a" + struct.pack(">II", 1000, 2000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """An inner packet. flow: its source port. gap: bytes of TCP that are missing before it."""

    family: int
    protocol: int
    flow: int
    number: int = 0
    sequence: int = 1000
    payload: bytes = bytes(SIZE)
    hops: int = 64
    tos: int = 0
    fragment: int = DONT_FRAGMENT
    options: bytes = b""
    label: int = 0
    flags: int = ACK
    window: int = 1000
    urgent: int = 0
    acknowledgment: int = 5000
    tcp_options: bytes = TIMESTAMPS
    gap: int = 0
    checksum_error: int = 0
    has_checksum: bool = True

    def packet(self, source: str) -> bytes:
        """Return the IP packet from an address to nobody."""
        kind = socket.AF_INET if self.family == 4 else socket.AF_INET6
        addresses = socket.inet_pton(kind, source) + socket.inet_pton(kind, NOWHERE[self.family])
        whole = self._transport(addresses)
        if self.family == 6:
            following = DESTINATION_OPTIONS if self.options else self.protocol
            first = 6 << 28 | self.tos << 20 | self.label
            header = struct.pack(">LHBB", first, len(self.options) + len(whole), following, self.hops)
            return header + addresses + self.options + whole
        size = 20 + len(self.options)
        header = struct.pack(
            ">BBHHHBBH",
            0x40 | size // 4,
            self.tos,
            size + len(whole),
            self.number,
            self.fragment,
            self.hops,
            self.protocol,
            0,
        )
        header += addresses + self.options
        return header[:10] + checksum(header).to_bytes(2) + header[12:] + whole

    def _transport(self, addresses: bytes) -> bytes:
        if self.protocol == UDP:
            header, at = struct.pack(">HHHH", self.flow, 9, 8 + len(self.payload), 0), 6
        else:
            offset = (20 + len(self.tcp_options)) // 4 << 4
            fields = (self.flow, 9, self.sequence, self.acknowledgment, offset, self.flags, self.window, 0, self.urgent)
            header, at = struct.pack(">HHIIBBHHH", *fields) + self.tcp_options, 16
        whole = header + self.payload
        value = checksum(addresses + struct.pack(">II", len(whole), self.protocol) + whole) or 0xFFFF
        value = value ^ self.checksum_error if self.has_checksum else 0
        return whole[:at] + value.to_bytes(2) + whole[at + 2 :]


# What differs, by its name; a test has a flow for each.
OF_IPV4: dict[str, dict[str, Any]] = {
    "nothing": {},
    "TTL": {"hops": 63},
    "DSCP": {"tos": 0xB8},
    "ECN": {"tos": 1},
    "DF": {"fragment": 0},
    "MF": {"fragment": MORE_FRAGMENTS},
    "fragment offset": {"fragment": 100},
    "IP options": {"options": b"\1\1\1\1"},
}
OF_IPV6: dict[str, dict[str, Any]] = {
    "nothing": {},
    "hop limit": {"hops": 63},
    "DSCP": {"tos": 0xB8},
    "ECN": {"tos": 1},
    "flow label": {"label": 0x12345},
}
OF_TCP: dict[str, dict[str, Any]] = {
    "PSH": {"flags": ACK | PSH},
    "FIN": {"flags": ACK | FIN},
    "URG": {"flags": ACK | URG, "urgent": 1},
    "no ACK": {"flags": 0},
    "window": {"window": 1001},
    "acknowledgment": {"acknowledgment": 5001},
    "absent TCP options": {"tcp_options": b""},
    "timestamp": {"tcp_options": TIMESTAMPS[:-1] + b"\1"},
    "sequence gap": {"gap": 1},
    "overlap": {"gap": -1},
}
OF_BOTH: dict[str, dict[str, Any]] = {
    "zero payload": {"payload": b""},
    "one byte of payload": {"payload": b"\1"},
    "longer payload": {"payload": bytes(SIZE + 1)},
    "wrong checksum": {"checksum_error": 0x0101},
}


def differences(family: int, protocol: int) -> dict[str, dict[str, Any]]:
    """Return the fields of a differing packet, by the name of what differs."""
    ip = (
        OF_IPV4
        if family == 4
        else OF_IPV6
        | {
            # An option that is skipped: PadN of four bytes.
            "extension header": {"options": bytes([protocol, 0, 1, 4, 0, 0, 0, 0])}
        }
    )
    return ip | OF_BOTH | (OF_TCP if protocol == TCP else {"absent checksum": {"has_checksum": False}})


def burst(plain: Segment, changes: dict[str, Any]) -> list[Segment]:
    """Return packets of a flow as in PATTERN, the TCP sequence of which goes on."""
    segments, sequence = [], plain.sequence
    for number, kind in enumerate(PATTERN):
        made = replace(plain, number=number, **(changes if kind == "V" else {}))
        sequence += made.gap
        segments.append(replace(made, sequence=sequence))
        sequence += len(made.payload)
    return segments


def comparable(packet: bytes) -> bytes:
    """The packet without IPv4 identification and header checksum: whoever joins and splits packets may renumber."""
    return packet if packet[0] >> 4 == 6 else packet[:4] + bytes(2) + packet[6:10] + bytes(2) + packet[12:]


@pytest.mark.bug("IB-57")
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])
@pytest.mark.parametrize("family", [4, 6])
def test_packets_of_one_flow_keep_their_own_headers(target: Target, family: int, protocol: int) -> None:
    peer = target.peer()
    session = peer.connect()

    def send(packets: list[bytes]) -> None:
        with stopped(target.interface.pid):
            for packet in packets:
                peer.send(session.data(packet))

    must_deliver_unchanged(target, peer, family, protocol, send)


@pytest.mark.bug("IB-57")
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])
@pytest.mark.parametrize("family", [4, 6])
def test_packets_of_one_batch_keep_their_own_headers(
    lab: Lab, implementation: Manifest, family: int, protocol: int
) -> None:
    trace = Trace(lab.directory / "device.trace", implementation.name)
    target = Target(lab, traced(implementation, trace.file))
    peer = target.peer()
    session = peer.connect()

    def send(packets: list[bytes]) -> None:
        *burst_of_flow, marker = packets
        peer.send_together([session.data(packet) for packet in burst_of_flow])
        peer.send(session.data(marker))

    must_deliver_unchanged(target, peer, family, protocol, send)
    if has_batch_engine(implementation):
        must_have_used(target.interface, trace, "in", "udp-gro")
        must_have_used(target.interface, trace, "in", f"{'tso' if protocol == TCP else 'uso'}{family}")


def must_deliver_unchanged(
    target: Target, peer: ScriptedPeer, family: int, protocol: int, send: Callable[[list[bytes]], None]
) -> None:
    """Send bursts of packets, in each of which neighbours differ in one thing, and compare what is delivered.

    Plain packets keep their order, and so do those that differ. One kind may overtake the other: GRO passes on at once
    what it does not hold.
    """
    source = peer.inner4 if family == 4 else peer.inner6
    wrong = {}
    cases = differences(family, protocol)
    if target.implementation.kind == "kernel":
        # The driver trusts the tag of the message (IF-18), so that GRO takes a wrong checksum for a right one.
        del cases["wrong checksum"]
    for flow, (name, changes) in enumerate(cases.items(), 2000):
        segments = burst(Segment(family=family, protocol=protocol, flow=flow), changes)
        sent = [segment.packet(source) for segment in segments]
        marker = target.packet(peer, f"after {name}".encode())
        target.inside.forget()
        send([*sent, marker])
        with twin("a packet that was sent afterwards is delivered"):
            target.inside.expect(marker)
        came = [packet for packet in target.inside.packets() if packet != marker]
        plain = {comparable(packet) for packet, kind in zip(sent, PATTERN, strict=True) if kind == "P"}
        for is_plain in (True, False):
            there, here = (
                [packet for packet in map(comparable, packets) if (packet in plain) == is_plain]
                for packets in (sent, came)
            )
            if there != here:
                wrong[name] = how(there, here)
    assert not wrong, (
        f"packets were not delivered as they were sent if neighbours of their flow differ in: {', '.join(wrong)}; "
        f"{next(iter(wrong.items()))}"
    )


def how(sent: list[bytes], came: list[bytes]) -> str:
    """Describe the first packet that was not delivered as it was sent."""
    pairs = enumerate(zip(sent, came, strict=False))
    number = next((number for number, (one, other) in pairs if one != other), min(len(sent), len(came)))
    shown = [packets[number][:80].hex() if number < len(packets) else "nothing" for packets in (sent, came)]
    return f"{len(came)} for {len(sent)} packets; number {number} is {shown[1]} for {shown[0]}"


@pytest.mark.bug("IB-57")
@pytest.mark.requirement("MSG-14")
@pytest.mark.parametrize("family", [4, 6])
def test_padding_does_not_count_in_checksums_of_batch(lab: Lab, implementation: Manifest, family: int) -> None:
    if implementation.kind == "kernel":
        pytest.skip("the driver verifies no inner checksum (IF-18)")
    trace = Trace(lab.directory / "device.trace", implementation.name)
    target = Target(lab, traced(implementation, trace.file))
    peer = target.peer()
    session = peer.connect()
    source = peer.inner4 if family == 4 else peer.inner6
    # Two bytes of padding: the word that would make the wrong checksum right.
    payload = bytes(SIZE - 2)
    right = Segment(family=family, protocol=UDP, flow=2000, payload=payload)
    wrong = replace(right, checksum_error=0x0101)
    messages, sent = [], []
    for number in range(len(PATTERN)):
        packet = replace(wrong, number=number).packet(source)
        at = (20 if family == 4 else 40) + 6
        given, needed = (int.from_bytes(one.packet(source)[at : at + 2]) for one in (wrong, right))
        padding = ((needed - given) % 0xFFFF).to_bytes(2)
        messages.append(session.data(plaintext=packet + padding))
        sent.append(comparable(packet))
    peer.send_together(messages)
    marker = target.packet(peer, b"the last")
    peer.send(session.data(marker))
    with twin("a packet that was sent afterwards is delivered"):
        target.inside.expect(marker)
    came = [comparable(packet) for packet in target.inside.packets() if packet != marker]
    changed = [packet for packet in came if packet not in sent]
    assert not changed, (
        f"{len(changed)} packets with a wrong UDP checksum were delivered with a right one, which counts padding: "
        f"{changed[0].hex()} for {sent[0].hex()}"
    )
    if has_batch_engine(implementation):
        must_have_used(target.interface, trace, "in", "udp-gro")
