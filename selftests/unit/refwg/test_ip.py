from __future__ import annotations

from ipaddress import ip_address

import pytest

from refwg import ip
from selftests.support.packets import ip_packet, udp

V4 = ip_packet("10.0.0.1", "10.0.0.2")
V6 = ip_packet("fd00::1", "fd00::2")
ICMP, ICMPV6, FRAGMENT, AH = 1, 58, 44, 51


@pytest.mark.requirement("DT-25", "DT-26", "ERR-05")
@pytest.mark.parametrize(
    ("packet", "version"),
    [(V4, 4), (V6, 6), (b"", 0), (bytes(16), 0), (V4[:19], 0), (V6[:39], 0), (b"\x50" * 40, 0), (b"\xf0" * 40, 0)],
)
def test_ip_version_needs_whole_header_of_version_4_or_6(packet: bytes, version: int) -> None:
    assert ip.version(packet) == version


@pytest.mark.parametrize(("packet", "first", "second"), [(V4, "10.0.0.1", "10.0.0.2"), (V6, "fd00::1", "fd00::2")])
def test_addresses_and_length_are_read_from_header(packet: bytes, first: str, second: str) -> None:
    assert ip.source(packet) == ip_address(first).packed
    assert ip.destination(packet) == ip_address(second).packed
    assert ip.length_and_source(packet) == (len(packet), ip_address(first).packed)


@pytest.mark.requirement("DT-24")
def test_ipv6_length_does_not_wrap() -> None:
    assert ip.length_and_source(V6[:4] + b"\xff\xff" + V6[6:])[0] == 65575


@pytest.mark.requirement("DT-28", "DT-30")
@pytest.mark.parametrize(("inner", "outer"), [(0, 0), (1, 1), (2, 2), (3, 2), (0xB8, 0), (0xBB, 2)])
@pytest.mark.parametrize("source", ["10.0.0.1", "fd00::1"])
def test_outer_header_gets_ecn_bits_only(source: str, inner: int, outer: int) -> None:
    packet = ip_packet(source, source, tos=inner)
    assert ip.encapsulated_ecn(packet) == outer


@pytest.mark.requirement("DT-29")
@pytest.mark.parametrize("outer", range(4))
@pytest.mark.parametrize("inner", range(4))
@pytest.mark.parametrize("source", ["10.0.0.1", "fd00::1"])
def test_decapsulation_sets_ecn_as_in_rfc_6040(source: str, inner: int, outer: int) -> None:
    marked = {(1, 2): 1, (3, 1): 3, (3, 2): 3}.get((outer, inner), inner)
    before, after = (ip_packet(source, source, tos=0xB8 | ecn) for ecn in (inner, marked))
    assert ip.decapsulate_ecn(before, outer) == after


def test_wrong_header_checksum_stays_wrong_when_ecn_changes() -> None:
    packet = ip_packet("10.0.0.1", "10.0.0.2", tos=2)
    broken = packet[:10] + bytes([packet[10] ^ 1]) + packet[11:]
    assert ip.internet_checksum(ip.decapsulate_ecn(packet, ip.CE)[:20]) == 0
    assert ip.internet_checksum(ip.decapsulate_ecn(broken, ip.CE)[:20]) != 0


@pytest.mark.parametrize(
    ("data", "checksum"), [(b"", 0xFFFF), (b"\x01", 0xFEFF), (b"\xff\xff\x00\x01", 0xFFFE), (b"\x12\x34", 0xEDCB)]
)
def test_checksum_is_that_of_rfc_1071(data: bytes, checksum: int) -> None:
    assert ip.internet_checksum(data) == checksum


@pytest.mark.parametrize("source", ["10.0.0.1", "fd00::1"])
def test_udp_ports_are_found(source: str) -> None:
    assert ip.udp_ports(ip_packet(source, source, udp(1, 2))) == (1, 2)


def fragment(offset: int, protocol: int = 17, payload: bytes = b"\0\1\0\2abcd") -> bytes:
    return ip_packet("fd00::1", "fd00::2", bytes([protocol, 0]) + offset.to_bytes(2) + bytes(4) + payload, protocol=44)


def behind(extension: int, length: int, payload: bytes) -> bytes:
    """An extension header in front of an ICMPv6 message; length: in the header's own units."""
    size = (length + 2) * 4 if extension == AH else (length + 1) * 8
    return bytes([ICMPV6, length]).ljust(size, b"\0") + payload


LATER_V4 = V4[:6] + b"\x00\x01" + V4[8:]


@pytest.mark.parametrize(
    "packet",
    [
        ip_packet("10.0.0.1", "10.0.0.2", udp(1, 2), protocol=6),
        V4[:22],
        LATER_V4,
        fragment(8),
        V6[:6] + b"\x2c" + V6[7:40],
        ip_packet("fd00::1", "fd00::2", behind(0, 0, udp(1, 2)), protocol=0),
    ],
)
def test_packet_other_than_first_udp_fragment_has_no_ports(packet: bytes) -> None:
    assert ip.udp_ports(packet) is None


def test_first_fragment_has_ports() -> None:
    assert ip.udp_ports(fragment(1)) == (1, 2)


@pytest.mark.requirement("ERR-02")
def test_icmp_host_unreachable_is_limited_to_556_bytes() -> None:
    packet = ip_packet("10.0.0.1", "10.0.0.2", bytes(range(250)) * 4)
    error = ip.unreachable(packet)
    assert error is not None
    assert error.destination == ip_address("10.0.0.1").packed
    assert error.message[:2] == bytes([3, 1])
    assert ip.internet_checksum(error.message) == 0
    assert error.message[4:] == bytes(4) + packet[:548]


@pytest.mark.requirement("ERR-02")
def test_icmpv6_address_unreachable_is_limited_to_1240_bytes() -> None:
    packet = ip_packet("fd00::1", "fd00::2", bytes(range(250)) * 8)
    error = ip.unreachable(packet)
    assert error is not None
    assert error.destination == ip_address("fd00::1").packed
    assert error.message == bytes([1, 3]) + bytes(6) + packet[:1232]


@pytest.mark.requirement("ERR-02")
@pytest.mark.parametrize(
    "packet",
    [
        ip_packet("10.0.0.1", "224.0.0.1"),
        ip_packet("10.0.0.1", "255.255.255.255"),
        ip_packet("0.0.0.0", "10.0.0.2"),  # noqa: S104 - not bound to
        ip_packet("10.0.0.1", "10.0.0.2", bytes([3, 1]), protocol=ICMP),
        ip_packet("10.0.0.1", "10.0.0.2", b"", protocol=ICMP),
        LATER_V4,
        ip_packet("fd00::1", "ff02::1"),
        ip_packet("::", "fd00::2"),
        ip_packet("fd00::1", "fd00::2", bytes([1, 3]), protocol=ICMPV6),
        ip_packet("fd00::1", "fd00::2", b"", protocol=ICMPV6),
        fragment(1, ICMPV6, bytes([1, 3])),
        ip_packet("fd00::1", "fd00::2", behind(0, 1, bytes([1, 3])), protocol=0),
        ip_packet("fd00::1", "fd00::2", bytes([60, 0]) + bytes(6) + behind(60, 0, bytes([1, 3])), protocol=43),
        ip_packet("fd00::1", "fd00::2", behind(51, 2, bytes([1, 3])), protocol=51),
    ],
)
def test_icmp_errors_multicast_and_ipv4_fragments_get_no_answer(packet: bytes) -> None:
    assert ip.unreachable(packet) is None


@pytest.mark.parametrize(
    "packet",
    [
        ip_packet("10.0.0.1", "10.0.0.2", bytes([8, 0]), protocol=ICMP),
        ip_packet("fd00::1", "fd00::2", bytes([128, 0]), protocol=ICMPV6),
        *(ip_packet("10.0.0.1", "10.0.0.2", bytes([query, 0]), protocol=ICMP) for query in (13, 14, 15, 16, 17, 18)),
        fragment(8),
        fragment(8, ICMPV6, bytes([1, 3])),
        ip_packet("fd00::1", "fd00::2", bytes([ICMPV6, 0]), protocol=0),
    ],
)
def test_icmp_queries_and_later_ipv6_fragments_are_answered(packet: bytes) -> None:
    assert ip.unreachable(packet) is not None
