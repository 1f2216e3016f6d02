"""Check frames: find the datagram, change it with its checksum, split it into segments."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.net.checksum import checksum
from harness.wire import frames
from harness.wire.messages import Message, kind_of, tally, with_mac1
from refwg.cookie import compute_mac1, mac1_key_of
from refwg.ip import internet_checksum
from selftests.support.packets import ip_packet, udp

ADDRESSES = {0x0800: ("192.0.2.1", "192.0.2.2"), 0x86DD: ("fd00::1", "fd00::2")}
PAYLOADS = st.binary(min_size=1, max_size=60)
KEEPALIVE = b"\4\0\0\0".ljust(32, b"k")
ARP = bytes(12) + b"\x08\x06" + bytes(28)


def frame(ethertype: int, payload: bytes, tags: bytes = b"") -> bytes:
    packet = ip_packet(*ADDRESSES[ethertype], udp(1, 2, payload))
    return bytes(12) + tags + struct.pack(">H", ethertype) + packet


def data(counter: int, size: int = 16, receiver: bytes = b"abcd") -> bytes:
    return b"\4\0\0\0" + receiver + struct.pack("<Q", counter) + bytes([counter % 256]) * (size + 16)


def is_summed(whole: bytes) -> bool:
    """Whether the UDP checksum of a frame is right, by refwg's code."""
    datagram = frames.udp(whole)
    assert datagram is not None
    segment = whole[datagram.start : datagram.end]
    pseudo = datagram.addresses + struct.pack(">II", len(segment), 17)
    return segment[6:8] != bytes(2) and internet_checksum(pseudo + segment) == 0


@pytest.mark.parametrize("ethertype", ADDRESSES)
@pytest.mark.parametrize("tags", [b"", b"\x81\x00\x00\x05", b"\x88\xa8\x00\x05\x81\x00\x00\x06"])
def test_datagram_is_found_behind_vlan_tags_and_ip_header(ethertype: int, tags: bytes) -> None:
    whole = frame(ethertype, b"payload", tags)
    datagram = frames.udp(whole + bytes(20))
    assert datagram is not None
    source, destination = ADDRESSES[ethertype]
    assert (datagram.source(whole), datagram.destination(whole)) == ((source, 1), (destination, 2))
    assert datagram.payload(whole) == b"payload"


@pytest.mark.parametrize("ethertype", ADDRESSES)
def test_truncated_frame_has_no_datagram(ethertype: int) -> None:
    whole = frame(ethertype, b"payload")
    assert [size for size in range(len(whole)) if frames.udp(whole[:size])] == []


def test_fragment_or_other_protocol_has_no_datagram() -> None:
    whole = bytearray(frame(0x0800, b"payload"))
    for place, value in ((20, 0x20), (21, 0x01), (23, 6), (12, 0x90)):
        changed = whole.copy()
        changed[place] = value
        assert frames.udp(bytes(changed)) is None


# Extension headers of IPv6: their protocol, then the bytes after "next header" (RFC 8200, section 4; RFC 4302).
HOP_BY_HOP, DESTINATION = (0, b"\0\1\4\0\0\0\0"), (60, b"\1\1\14" + bytes(12))
ROUTED, ATOMIC, AUTHENTICATION = (43, b"\0\4\0\0\0\0\0"), (44, b"\0\0\0abcd"), (51, b"\4\0\0" + bytes(20))


def extended(*headers: tuple[int, bytes], payload: bytes = b"payload") -> bytes:
    """An IPv6 frame with extension headers before its UDP header."""
    content, following = udp(1, 2, payload), 17
    for protocol, rest in reversed(headers):
        content, following = bytes([following]) + rest + content, protocol
    return bytes(12) + b"\x86\xdd" + ip_packet(*ADDRESSES[0x86DD], content, protocol=following)


@pytest.mark.parametrize(
    "headers",
    [
        [HOP_BY_HOP], [DESTINATION], [ROUTED], [ATOMIC], [AUTHENTICATION],
        [HOP_BY_HOP, ROUTED, ATOMIC, AUTHENTICATION, DESTINATION],
    ],
)  # fmt: skip
def test_datagram_is_found_behind_ipv6_extension_headers(headers: list[tuple[int, bytes]]) -> None:
    whole = extended(*headers)
    datagram = frames.udp(whole)
    assert datagram is not None
    assert (datagram.source(whole), datagram.payload(whole)) == (("fd00::1", 1), b"payload")
    assert is_summed(frames.changed(whole, datagram, b"another"))
    assert [size for size in range(len(whole)) if frames.udp(whole[:size])] == []
    cut = frames.segments(whole, superframe(VIRTIO_NET_HDR_GSO_UDP_L4, 4))
    assert [part.payload(segment) for segment in cut if (part := frames.udp(segment))] == [b"payl", b"oad"]


def ipv4(protocol: int, payload: bytes = bytes(8)) -> bytes:
    return bytes(12) + b"\x08\x00" + ip_packet(*ADDRESSES[0x0800], payload, protocol=protocol)


def ipv6(protocol: int, payload: bytes = bytes(8)) -> bytes:
    return bytes(12) + b"\x86\xdd" + ip_packet(*ADDRESSES[0x86DD], payload, protocol=protocol)


UNREADABLE = {
    "arp": (ARP, "ARP"),
    "vlan": (bytes(12) + b"\x81\x00\x00\x05\x88\xb5" + bytes(46), "ethertype 0x88b5"),
    "short-ethernet": (bytes(13), "truncated"),
    "short-vlan": (bytes(12) + b"\x81\x00\x00", "truncated"),
    "short-ipv4": (ipv4(17)[:20], "truncated"),
    "cut-ipv4": (ipv4(17)[:-1], "truncated"),
    "short-udp": (ipv4(17, bytes(7)), "truncated"),
    "short-header-length": (ipv4(17).replace(b"\x45", b"\x44", 1), "truncated"),
    "short-ipv6": (ipv6(17)[:20], "truncated"),
    "cut-ipv6": (ipv6(17)[:-1], "truncated"),
    "short-extension": (ipv6(60, bytes(4)), "truncated"),
    "routing-header": (ipv6(43, b"\x11\0\4\1" + bytes(4)), "IPv6 on its way through a routing header"),
    "icmp": (ipv4(1), "ICMP"),
    "tcp": (ipv4(6), "TCP"),
    "icmpv6": (ipv6(58), "ICMPv6"),
    "protocol-59": (ipv6(59), "IP protocol 59"),
}


@pytest.mark.parametrize(("whole", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_frame_without_datagram_is_named(whole: bytes, words: str) -> None:
    message = frames.message(whole, frames.read(whole), 1_500_000_000)
    assert (frames.udp(whole), message.kind, message.sort, message.detail) == (None, 0, "other", words)
    assert str(message) == f"1.500 other ({words}) ({max(0, len(whole) - 14)})"


def test_names_are_counted_in_order_of_appearance() -> None:
    assert tally(["data", "other (ARP)", "data"]) == "2 data, 1 other (ARP)"
    assert tally([]) == "nothing"


@pytest.mark.parametrize("ethertype", ADDRESSES)
@given(before=PAYLOADS, after=PAYLOADS, port=st.integers(1, 65535))
def test_changed_datagram_has_valid_checksum(ethertype: int, before: bytes, after: bytes, port: int) -> None:
    size = min(len(before), len(after))
    whole = frame(ethertype, before[:size])
    datagram = frames.udp(whole)
    assert datagram is not None
    changed = frames.changed(whole, datagram, after[:size], port=port)
    assert is_summed(changed)
    assert (datagram.payload(changed), datagram.source(changed)[1]) == (after[:size], port)


@pytest.mark.parametrize("ethertype", ADDRESSES)
@pytest.mark.parametrize("tags", [b"", b"\x81\x00\x00\x05"])
def test_reflected_datagram_goes_back_with_valid_checksum(ethertype: int, tags: bytes) -> None:
    whole = frame(ethertype, b"payload", tags)
    whole = b"to-mac" + b"by-mac" + whole[12:]
    datagram = frames.udp(whole)
    assert datagram is not None
    whole = frames.changed(whole, datagram, b"payload")
    back = frames.reflected(whole, datagram)
    again = frames.udp(back)
    assert again is not None
    assert (again.source(back), again.destination(back)) == (datagram.destination(whole), datagram.source(whole))
    assert (back[:12], back[12 : 12 + len(tags)], again.payload(back)) == (b"by-mac" + b"to-mac", tags, b"payload")
    assert is_summed(back)
    assert frames.reflected(back, again) == whole


@pytest.mark.parametrize("ethertype", ADDRESSES)
def test_udp_checksum_of_zero_is_sent_as_all_ones(ethertype: int) -> None:
    """RFC 768: zero means that there is no checksum."""
    blank = frame(ethertype, bytes(2))
    datagram = frames.udp(blank)
    assert datagram is not None
    sum_without = frames.changed(blank, datagram, bytes(2))[datagram.start + 6 : datagram.start + 8]
    # A payload of the checksum itself makes the sum all ones, of which the complement is zero.
    changed = frames.changed(blank, datagram, sum_without)
    assert changed[datagram.start + 6 : datagram.start + 8] == b"\xff\xff"
    assert is_summed(changed)


def auxdata(status: int, tci: int = 0, tpid: int = 0) -> tuple[int, int, bytes]:
    """The control message of packet(7): struct tpacket_auxdata."""
    return frames.SOL_PACKET, frames.PACKET_AUXDATA, struct.pack("IIIHHHH", status, 0, 0, 0, 0, tci, tpid)


# Source: include/uapi/linux/if_packet.h.
TP_STATUS_CSUMNOTREADY, TP_STATUS_VLAN_VALID, TP_STATUS_VLAN_TPID_VALID = 1 << 3, 1 << 4, 1 << 6


@pytest.mark.parametrize("ethertype", ADDRESSES)
def test_checksum_left_to_card_is_filled_in(ethertype: int) -> None:
    captured = frame(ethertype, b"payload")
    assert not is_summed(captured)
    assert is_summed(frames.finished(captured, [auxdata(TP_STATUS_CSUMNOTREADY)]))
    assert frames.finished(captured, [auxdata(0)]) == captured
    assert frames.finished(captured, [(1, 2, b"another control message")]) == captured


def test_frame_without_transport_checksum_is_left_as_it_is() -> None:
    unknown_protocol = bytes(12) + b"\x08\x00" + ip_packet("192.0.2.1", "192.0.2.2", bytes(20), protocol=59)
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    for captured in (unknown_protocol, arp):
        assert frames.finished(captured, [auxdata(TP_STATUS_CSUMNOTREADY)]) == captured


@pytest.mark.parametrize(
    ("status", "ethertype"),
    [(TP_STATUS_VLAN_VALID, 0x8100), (TP_STATUS_VLAN_VALID | TP_STATUS_VLAN_TPID_VALID, 0x88A8)],
)
def test_vlan_tag_kept_beside_frame_is_put_back(status: int, ethertype: int) -> None:
    captured = frame(0x0800, b"payload")
    tagged = frames.finished(captured, [auxdata(status, tci=5, tpid=0x88A8)])
    assert tagged == captured[:12] + struct.pack(">HH", ethertype, 5) + captured[12:]


@given(st.binary(min_size=32, max_size=200), st.binary(min_size=32, max_size=32))
def test_mac1_is_put_before_mac2_by_key_of_recipient(payload: bytes, recipient: bytes) -> None:
    key = mac1_key_of(recipient)
    assert with_mac1(payload, recipient) == payload[:-32] + compute_mac1(payload, key) + payload[-16:]


@given(st.binary(max_size=80))
@example(b"\0\0")
@example(b"\xff\xff")
@example(b"\0\0\xff\xff")
def test_checksum_equals_internet_checksum_of_refwg(data: bytes) -> None:
    assert checksum(data) == internet_checksum(data)


# Source: include/uapi/linux/virtio_net.h.
VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6 = 1, 4
VIRTIO_NET_HDR_GSO_UDP_L4, VIRTIO_NET_HDR_GSO_ECN = 5, 0x80


def vnet_header(kind: int, size: int) -> bytes:
    """The struct virtio_net_hdr of a superframe: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""
    return struct.pack("=BBHHHH", 1, kind, 42, size, 34, 6)


def superframe(kind: int, size: int) -> frames.Offload:
    offload = frames.Offload.read(vnet_header(kind, size))
    assert offload is not None
    return offload


# The last segment of a superframe may be shorter. Counters and receivers of the segments may be any.
@pytest.mark.parametrize("ethertype", ADDRESSES)
@pytest.mark.parametrize(
    "sent",
    [
        [data(7), data(8), data(9)],
        [data(7), data(8), data(9, 1)],
        [data(7), data(8), data(9, 0)],
        [data(5), data(7), data(9)],
        [data(5), data(5), data(5)],
        [data(1), data(2, receiver=b"efgh")],
        [b"\1\0\0\0".ljust(148), b"\1\0\0\0".ljust(148)],
        [b"not", b"WG?"],
    ],
    ids=["equal", "short", "empty", "odd-counters", "one-counter", "two-receivers", "handshakes", "unknown"],
)
def test_superframe_is_split_by_its_segment_size(ethertype: int, sent: list[bytes]) -> None:
    whole, offload = frame(ethertype, b"".join(sent)), superframe(VIRTIO_NET_HDR_GSO_UDP_L4, len(sent[0]))
    cut = frames.segments(whole, offload)
    assert [datagram.payload(part) for part in cut if (datagram := frames.udp(part))] == sent
    assert frames.segment_count(whole, offload) == len(sent)
    assert all(is_summed(part) and len(part) - 14 == _ip_length(part) for part in cut)
    assert ethertype == 0x86DD or all(internet_checksum(part[14:34]) == 0 for part in cut)
    # The kernel gives each segment the next identification.
    assert ethertype == 0x86DD or [int.from_bytes(part[18:20]) for part in cut] == [*range(1, 1 + len(sent))]


def _ip_length(whole: bytes) -> int:
    if whole[14] >> 4 == 4:
        return int.from_bytes(whole[16:18])
    return int.from_bytes(whole[18:20]) + 40


def test_frame_that_is_no_superframe_of_udp_is_not_split() -> None:
    assert frames.Offload.read(vnet_header(0, 0)) is None
    assert frames.Offload.read(vnet_header(VIRTIO_NET_HDR_GSO_ECN, 0)) is None
    whole = frame(0x0800, data(1) + data(2))
    for offload in (superframe(VIRTIO_NET_HDR_GSO_TCPV4, 48), superframe(VIRTIO_NET_HDR_GSO_UDP_L4, 0)):
        assert frames.segments(whole, offload) == [whole]
    assert frames.segments(ARP, superframe(VIRTIO_NET_HDR_GSO_UDP_L4, 48)) == [ARP]
    assert frames.segment_count(ARP, superframe(VIRTIO_NET_HDR_GSO_UDP_L4, 48)) == 1


def test_segments_of_tcp_superframe_are_counted() -> None:
    header = bytes(12) + bytes([8 << 4]) + bytes(19)
    whole = bytes(12) + b"\x08\x00" + ip_packet(*ADDRESSES[0x0800], header + bytes(2001), protocol=6)
    kind = VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN
    assert frames.segment_count(whole, superframe(kind, 1000)) == 3
    assert frames.segments(whole, superframe(kind, 1000)) == [whole]


@pytest.mark.parametrize(
    ("ethertype", "kind"), [(0x0800, VIRTIO_NET_HDR_GSO_TCPV4), (0x86DD, VIRTIO_NET_HDR_GSO_TCPV6)]
)
def test_tcp_superframe_without_link_header_is_split(ethertype: int, kind: int) -> None:
    payload = bytes(range(250))
    # Near the end of the sequence numbers; ACK, PSH, FIN and CWR are set.
    header = struct.pack(">HHIIBBHHH", 1, 2, 2**32 - 100, 7, 8 << 4, 0x99, 1000, 0, 0) + b"\1" * 12
    packet = ip_packet(*ADDRESSES[ethertype], header + payload, protocol=6)
    start = len(packet) - len(payload) - len(header)
    cut = frames.inner_segments(vnet_header(kind | VIRTIO_NET_HDR_GSO_ECN, 100), packet)
    transports = [part[start:] for part in cut]
    assert [part[32:] for part in transports] == [payload[:100], payload[100:200], payload[200:]]
    assert [int.from_bytes(part[4:8]) for part in transports] == [2**32 - 100, 0, 100]
    # tcp_gso_segment: CWR on the first segment only, FIN and PSH on the last one.
    assert [part[13] for part in transports] == [0x90, 0x10, 0x19]
    assert {part[20:32] for part in transports} == {b"\1" * 12}
    addresses = packet[12:20] if ethertype == 0x0800 else packet[8:40]
    pseudos = [addresses + struct.pack(">II", len(part), 6) for part in transports]
    assert {internet_checksum(pseudo + part) for pseudo, part in zip(pseudos, transports, strict=True)} == {0}
    assert [len(part) for part in cut] == [_ip_length(bytes(14) + part) for part in cut]


def test_packet_without_link_header_gets_missing_checksum() -> None:
    bare = frame(0x0800, b"payload")[14:]
    (packet,) = frames.inner_segments(struct.pack("=BBHHHH", 1, 0, 0, 0, 20, 6), bare)
    assert is_summed(bytes(12) + b"\x08\x00" + packet)
    assert packet[:26] + bytes(2) + packet[28:] == bare
    assert frames.inner_segments(bytes(10), bare) == [bare]
    assert frames.inner_segments(bytes(10), b"") == [b""]


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"\1\0\0\0".ljust(148), 1), (b"\1\0\0\0".ljust(147), 0), (b"\1\0\0\0".ljust(149), 0),
        (b"\2\0\0\0".ljust(92), 2), (b"\2\0\0\0".ljust(148), 0), (b"\3\0\0\0".ljust(64), 3),
        (b"\4\0\0\0".ljust(31), 0), (KEEPALIVE, 4), (b"\4\0\0\1".ljust(32), 0), (b"\5\0\0\0".ljust(64), 0), (b"", 0),
    ],
)  # fmt: skip
def test_message_kind_is_found_by_type_and_length(payload: bytes, kind: int) -> None:
    assert kind_of(payload) == kind


@pytest.mark.parametrize(
    ("payload", "printed"),
    [
        (KEEPALIVE, "keepalive 7740398493674204011 (32)"),
        (data(5), "data 5 (48)"),
        (b"\3\0\0\0".ljust(64), "cookie reply (64)"),
        (b"hello", "unknown (5)"),
    ],
)
def test_message_is_printed_with_its_kind_and_length(payload: bytes, printed: str) -> None:
    message = Message(time=1_500_000_000, source=("a", 1), destination=("b", 2), payload=payload)
    assert str(message) == f"1.500 1>2 {printed}"
