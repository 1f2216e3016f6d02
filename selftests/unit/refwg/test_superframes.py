"""Superframes: cut into the packets that they stand for, and made of packets that may be joined, and no others."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from refwg.engine.cut import Superframe, complete_checksums
from refwg.engine.join import Joiner
from refwg.engine.rows import Arena, Nonces
from refwg.engine.virtio import HEADER_LENGTH, VirtioHeader, parse
from refwg.errors import MalformedSuperframe
from selftests.support import flows
from selftests.support.flows import ACK, CWR, ECE, FIN, PSH, RST, SYN, UDP, URG, Flow
from selftests.support.superframes import EVERYTHING, cut, delivered, joined, laid_out

OPTIONS = bytes.fromhex("0101080a0000000100000002")
PAYLOAD = bytes(number * 7 % 251 for number in range(9000))
DATAGRAM = Flow(protocol=UDP)
FLOWS = {
    "tcp4": Flow(),
    "tcp6": Flow(version=6),
    "udp4": DATAGRAM,
    "udp6": replace(DATAGRAM, version=6),
    "options": Flow(options=OPTIONS),
    "ip-options": Flow(ip_options=b"\x94\x04\0\0"),
    "ecn": Flow(version=6, tos=0x2A, flow_label=0x12345),
    "push": Flow(flags=ACK | PSH),
    "fin": Flow(flags=ACK | FIN | PSH),
    "cwr": Flow(flags=ACK | CWR),
    "ece": Flow(flags=ACK | ECE),
    "wraps": Flow(sequence=2**32 - 1000, identification=2**16 - 1),
}


# Cut.


@pytest.mark.parametrize("size", [1, 2, 3, 7, 536, 1367, 1368])
@pytest.mark.parametrize("flow", FLOWS.values(), ids=list(FLOWS))
def test_cut_packets_are_those_of_plain_segmentation(flow: Flow, size: int) -> None:
    for count, last in ((2, size), (5, 1), (3, size - size // 2)):
        payload = PAYLOAD[: (count - 1) * size + last]
        expected = flow.segments(payload, size)
        assert cut(flow.frame(payload, size)) == expected
        assert cut(flow.frame(payload, size), step=2) == expected


@pytest.mark.parametrize("mtu", [0, 1280, 1421, 1422, 1423])
def test_cut_packets_are_padded_with_zeros_up_to_mtu(mtu: int) -> None:
    flow = Flow(options=OPTIONS)
    assert cut(flow.frame(PAYLOAD[:4000], 1001), mtu) == flow.segments(PAYLOAD[:4000], 1001)


def test_superframe_of_one_segment_is_one_packet() -> None:
    flow = Flow(flags=ACK | PSH | CWR)
    assert cut(flow.frame(b"abc", 100)) == [flow.packet(b"abc")]


def test_payload_with_sum_of_zero_has_checksum_of_ones_in_udp() -> None:
    for flow in (DATAGRAM, replace(DATAGRAM, version=6), Flow(), Flow(version=6)):
        [packet] = flow.segments(bytes(4), 4)
        place = flow.header_length - (2 if flow.protocol == UDP else 4)
        rest = int.from_bytes(packet[place : place + 2])
        payload = rest.to_bytes(2) + bytes(2)
        expected = flow.segments(payload * 2, 4)
        assert flows.is_sound(expected[0])
        assert cut(flow.frame(payload * 2, 4)) == expected


BROKEN = {
    "type": {"gso_type": 3},
    "version": {"gso_type": 4},
    "size": {"gso_size": 0},
    "start-odd": {"checksum_start": 21},
    "start-early": {"checksum_start": 16},
    "start-late": {"checksum_start": 60},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=list(BROKEN))
def test_superframe_whose_headers_do_not_fit_is_refused(change: dict[str, int]) -> None:
    frame = Flow().frame(b"payload", 4)
    header = parse(frame)._replace(**change)
    with pytest.raises(MalformedSuperframe):
        Superframe(np.frombuffer(frame, np.uint8)[HEADER_LENGTH:], header)


@pytest.mark.parametrize("packet", [b"", Flow().packet(b""), Flow().packet(b"x")[:32] + b"\x10" + bytes(20)])
def test_superframe_without_payload_or_header_is_refused(packet: bytes) -> None:
    header = VirtioHeader(1, 1, 40, 10, 20, 16)
    with pytest.raises(MalformedSuperframe):
        Superframe(np.frombuffer(packet, np.uint8), header)


@pytest.mark.parametrize("flow", [Flow(), DATAGRAM, Flow(version=6), replace(DATAGRAM, version=6)])
def test_partial_checksums_are_completed(flow: Flow) -> None:
    payloads = [b"abc", b"xyz", b"\0\0\0"]
    partial = [flow.packet(payload, is_partial=True) for payload in payloads]
    rows = laid_out(partial)
    complete_checksums(rows, 3, parse(flow.frame(b"abc", 3)))
    whole = [bytes(rows.plaintexts[row][: len(partial[0])]) for row in range(3)]
    assert whole == [flow.packet(payload) for payload in payloads]


# Join.


@pytest.mark.parametrize("name", ["tcp4", "tcp6", "udp4", "udp6", "options", "ecn", "push", "wraps"])
def test_packets_of_flow_are_joined_and_come_out_as_they_were(name: str) -> None:
    flow = FLOWS[name]
    for payload in (PAYLOAD, PAYLOAD[:1402], PAYLOAD[:2800]):
        packets = flow.segments(payload, 1400)
        assert [(run.first, run.end) for run in joined(packets)] == [(0, len(packets))]
        [back] = delivered(packets)
        assert [*map(flows.without_identification, back)] == [*map(flows.without_identification, packets)]
        assert all(map(flows.is_sound, back))


def test_superframe_is_not_larger_than_ip_packet() -> None:
    for flow in (Flow(), replace(DATAGRAM, version=6)):
        packets = flow.segments(bytes(72 * 1400), 1400)
        runs = joined(packets)
        assert [run.end - run.first for run in runs] == [46, 26]


def test_each_kind_is_joined_only_if_interface_takes_it() -> None:
    for name in EVERYTHING:
        packets = FLOWS[name].segments(PAYLOAD[:30], 10)
        assert len(joined(packets, **{name: False})) == 3
        assert len(joined(packets)) == 1


def changed(packet: bytes, offset: int, value: int) -> bytes:
    return packet[:offset] + bytes([value]) + packet[offset + 1 :]


TCP_CHANGES: dict[str, dict[str, Any]] = {
    "tos": {"tos": 2},
    "ttl": {"ttl": 63},
    "fragment": {"fragment": 0x2000},
    "offset": {"fragment": 0x0001},
    "may-fragment": {"fragment": 0},
    "ip-options": {"ip_options": b"\x94\x04\0\0"},
    "port": {"source_port": 1001},
    "other-port": {"destination_port": 2001},
    "acknowledgment": {"acknowledgment": 8},
    "window": {"window": 501},
    "urgent-pointer": {"urgent": 1},
    "options": {"options": OPTIONS[:11] + b"\x03"},
    "no-options": {"options": b""},
    "gap": {"sequence": 102},
    "repeated": {"sequence": 91},
    "syn": {"flags": ACK | SYN},
    "fin": {"flags": ACK | FIN},
    "rst": {"flags": ACK | RST},
    "urg": {"flags": ACK | URG},
    "ece": {"flags": ACK | ECE},
    "cwr": {"flags": ACK | CWR},
    "no-ack": {"flags": 0},
}


@pytest.mark.parametrize("change", TCP_CHANGES.values(), ids=list(TCP_CHANGES))
def test_tcp_packet_that_differs_is_not_joined(change: dict[str, Any]) -> None:
    flow = Flow(options=OPTIONS)
    assert_stands_alone(flow, replace(flow, **{"sequence": 101} | change), 100)


@pytest.mark.parametrize("change", [{"flow_label": 9}, {"tos": 2}, {"ttl": 1}], ids=["label", "class", "hops"])
@pytest.mark.parametrize("protocol", [flows.TCP, UDP])
def test_ipv6_packet_that_differs_is_not_joined(change: dict[str, Any], protocol: int) -> None:
    flow = Flow(version=6, protocol=protocol)
    assert_stands_alone(flow, replace(flow, sequence=101, **change), 100)


UDP_CHANGES: dict[str, dict[str, Any]] = {
    "tos": {"tos": 1},
    "port": {"source_port": 9},
    "no-checksum": {"has_checksum": False},
}


@pytest.mark.parametrize("change", UDP_CHANGES.values(), ids=list(UDP_CHANGES))
def test_udp_packet_that_differs_is_not_joined(change: dict[str, Any]) -> None:
    assert_stands_alone(DATAGRAM, replace(DATAGRAM, **change), 100)


def assert_stands_alone(flow: Flow, other: Flow, size: int) -> None:
    """A packet of `other` is joined with no packet of `flow`, wherever it comes; nothing else is changed."""
    packets = [flow.packet(PAYLOAD[:size]), other.packet(PAYLOAD[:size])]
    third = replace(other, sequence=other.sequence + size).packet(PAYLOAD[:size])
    for one in (packets, packets[::-1], [*packets, third]):
        frames = delivered(one)
        assert frames[0] == one[:1]
        assert [packet for frame in frames for packet in frame][:2] == one[:2]


def corrupted(flow: Flow) -> dict[str, bytes]:
    """Return the second packet of a flow with one thing wrong."""
    packet = flow.segments(PAYLOAD[:200], 100)[1]
    wrong = {"payload": changed(packet, len(packet) - 1, packet[-1] ^ 1)}
    if flow.version == 4:
        wrong["header-checksum"] = changed(packet, 10, packet[10] ^ 1)
    if flow.protocol == UDP:
        start = flow.header_length - 8
        wrong["udp-length"] = changed(packet, start + 5, packet[start + 5] ^ 1)
    else:
        start = flow.header_length - 20
        wrong["data-offset"] = changed(packet, start + 12, 0x40)
    return wrong


@pytest.mark.parametrize("name", ["tcp4", "tcp6", "udp4", "udp6"])
def test_packet_with_wrong_checksum_or_length_is_not_joined(name: str) -> None:
    first, good = FLOWS[name].segments(PAYLOAD[:200], 100)
    for what, wrong in corrupted(FLOWS[name]).items():
        for packets in ([first, wrong], [wrong, first], [first, wrong, good]):
            assert all(run.end == run.first + 1 for run in joined(packets)[:1]), what
            assert [packet for frame in delivered(packets) for packet in frame] == packets, what


def test_push_ends_superframe() -> None:
    flow = Flow()
    first = replace(flow, flags=ACK | PSH).packet(PAYLOAD[:100])
    second = replace(flow, sequence=101).packet(PAYLOAD[:100])
    third = replace(flow, sequence=201, flags=ACK | PSH).packet(PAYLOAD[:100])
    assert [(run.first, run.end) for run in joined([first, second, third])] == [(0, 1), (1, 3)]


def test_shorter_packet_ends_superframe_and_longer_begins_one() -> None:
    flow = Flow()
    sizes = [100, 100, 50, 100, 100, 120]
    starts = [1 + sum(sizes[:number]) for number in range(len(sizes))]
    packets = [replace(flow, sequence=at).packet(PAYLOAD[:size]) for at, size in zip(starts, sizes, strict=True)]
    assert [(run.first, run.end) for run in joined(packets)] == [(0, 3), (3, 5), (5, 6)]


def test_packets_of_two_flows_in_turn_are_not_joined() -> None:
    flow, other = Flow(), Flow(source_port=1001)
    packets = [
        replace(one, sequence=1 + 10 * number).packet(b"0123456789") for number in (0, 1) for one in (flow, other)
    ]
    assert [(run.first, run.end) for run in joined(packets)] == [(row, row + 1) for row in range(4)]


@pytest.mark.parametrize(
    "packet",
    [
        Flow().packet(b""),
        replace(DATAGRAM, version=6).packet(b""),
        replace(DATAGRAM).packet(b"")[:20],
        Flow(version=6).packet(b"")[:40],
        Flow().packet(b"")[:30],
        changed(Flow().packet(b"payload"), 9, 1),
        changed(Flow(version=6).packet(b"payload"), 6, 0),
        changed(Flow().packet(b"payload"), 0, 0x55),
    ],
    ids=["pure-ack", "empty-udp", "no-udp", "no-header6", "half-tcp", "icmp", "extension", "version-5"],
)
def test_packets_without_payload_or_transport_are_not_joined(packet: bytes) -> None:
    assert [(run.first, run.end) for run in joined([packet, packet], 80)] == [(0, 1), (1, 2)]


def test_nonzero_padding_keeps_packets_apart() -> None:
    packets = Flow().segments(PAYLOAD[:200], 100)
    rows = laid_out(packets, 160)
    rows.plaintexts[0][159:] = b"\1"
    runs = Joiner(**EVERYTHING).runs(rows, [140, 140])
    assert [(run.first, run.end) for run in runs] == [(0, 2)], "the checksum covers the packet, not its padding"


# Rows.


def test_sums_are_those_of_plain_addition() -> None:
    for length in (60, 61, 62, 63):
        packets = [PAYLOAD[start : start + length] for start in (0, 100, 200)]
        rows = laid_out(packets)
        for start, end in ((0, 0), (20, 0), (40, 0), (0, 20)):
            for packet, total in zip(packets, rows.sums(start, 3, end).tolist(), strict=True):
                expected = flows.internet_sum(packet[start : end or length]) % 0xFFFF
                assert int.from_bytes(int(total).to_bytes(2, "little")) == expected


def test_layouts_and_slices_are_kept_up_to_limit() -> None:
    arena = Arena(20000)
    first = arena.rows(100)
    assert arena.rows(100) is first
    for length in range(101, 170):
        arena.rows(length)
    assert arena.rows(100) is not first
    for end in range(1, 68):
        assert len(first.slices(0, end)[0]) == end
    assert first.slices(0, 67) is first.slices(0, 67)
    assert bytes(first.messages(2, 40)) == bytes(140)
    assert len(first.message(1, 30)) == 30


def test_nonces_are_counters_behind_four_zero_bytes() -> None:
    nonces = Nonces()
    nonces.counters[:2] = [2**63, 5]
    assert [bytes(view) for view in nonces.views[:2]] == [bytes(11) + b"\x80", bytes(4) + b"\5" + bytes(7)]
    assert all(len(before) == len(after) == 12 for before, after in pairwise(nonces.views))
