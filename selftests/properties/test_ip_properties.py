"""Check the reader of IP packets against built packets, plain sums and truncated bytes."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from struct import pack
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refwg import ip
from selftests.support.packets import ip_packet, udp
from selftests.support.strategies import exactly

if TYPE_CHECKING:
    from collections.abc import Sequence

# Protocol numbers of RFC 8200 (hop-by-hop, routing, fragment, destination options), RFC 4302 and others.
HOP_BY_HOP, ROUTING, FRAGMENT, AH, DESTINATION_OPTIONS = 0, 43, 44, 51, 60
EXTENSIONS: Final = (HOP_BY_HOP, ROUTING, FRAGMENT, AH, DESTINATION_OPTIONS)
UDP, ICMP, ICMPV6 = 17, 1, 58
# RFC 1122, 3.2.2.1 to 3.2.2.5, and RFC 4443, 2.1: destination unreachable, source quench, redirect, time exceeded,
# parameter problem; in ICMPv6 all types below 128.
ICMP_ERRORS: Final = {3, 4, 5, 11, 12}
ICMP_QUERIES: Final = {0, 8, 13, 14, 15, 16, 17, 18}

Address = IPv4Address | IPv6Address
# Also those that are not one host (unspecified, multicast, reserved, broadcast), and their neighbours.
EDGES_V4: Final = ("0.0.0.0", "0.0.0.1", "223.255.255.255", "224.0.0.0", "240.0.0.1", "255.255.255.255")  # noqa: S104 - not bound to
EDGES_V6: Final = ("::", "::1", "fe80::1", "feff::1", "ff00::", "ff02::1")
addresses_v4 = st.one_of(exactly(4).map(IPv4Address), st.sampled_from(EDGES_V4).map(IPv4Address))
addresses_v6 = st.one_of(exactly(16).map(IPv6Address), st.sampled_from(EDGES_V6).map(IPv6Address))
address_pairs = st.one_of(st.tuples(addresses_v4, addresses_v4), st.tuples(addresses_v6, addresses_v6))
hosts_v6 = exactly(15).map(lambda tail: IPv6Address(b"\xfd" + tail))
octets = st.integers(0, 255)
# Often an ECN that decapsulation may change: ECT(0) or ECT(1).
tos_values = st.one_of(st.sampled_from([1, 2]), octets)
payloads = st.binary(max_size=60)
ports = st.integers(0, 65535)


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    source, destination = draw(address_pairs)
    payload, tos, protocol = (
        draw(payloads),
        draw(tos_values),
        draw(st.one_of(octets, st.sampled_from([UDP, *EXTENSIONS]))),
    )
    return ip_packet(str(source), str(destination), payload, tos=tos, protocol=protocol)


def plain_sum(data: bytes) -> int:
    """RFC 1071: the ones' complement sum, word by word, with each carry added at the low end."""
    total = 0
    for high, low in zip(data[::2], data[1::2] + bytes(len(data) % 2), strict=True):
        total += high << 8 | low
        if total > 0xFFFF:
            total -= 0xFFFF
    return total


def is_one_host(address: Address) -> bool:
    is_any_host = address.is_unspecified or address.is_multicast
    return not is_any_host and not (address.version == 4 and address.is_reserved)


@given(address_pairs, payloads, octets, st.sampled_from([UDP, ICMP, ICMPV6, 6, 59]))
def test_header_fields_are_those_that_packet_was_built_from(
    addresses: tuple[Address, Address], payload: bytes, tos: int, protocol: int
) -> None:
    source, destination = addresses
    packet = ip_packet(str(source), str(destination), payload, tos=tos, protocol=protocol)
    assert ip.version(packet) == source.version
    assert (ip.source(packet), ip.destination(packet)) == (source.packed, destination.packed)
    assert ip.length_and_source(packet) == (len(packet), source.packed)
    assert ip.ecn(packet) == tos % 4
    assert ip.upper_layer(packet) == (protocol, payload)


@given(address_pairs, ports, ports, payloads)
def test_udp_ports_are_those_that_packet_was_built_from(
    addresses: tuple[Address, Address], source_port: int, destination_port: int, payload: bytes
) -> None:
    source, destination = addresses
    datagram = udp(source_port, destination_port, payload)
    packet = ip_packet(str(source), str(destination), datagram)
    assert ip.udp_ports(packet) == (source_port, destination_port)


def extended(chain: Sequence[tuple[int, int]], protocol: int, payload: bytes) -> tuple[int, bytes]:
    """Prepend extension headers to a payload; return the first protocol and all bytes."""
    for extension, units in reversed(chain):
        if extension == FRAGMENT:
            header = bytes([protocol, 0]) + bytes(6)
        elif extension == AH:
            # RFC 4302, 2.2: in words of 4 bytes, minus 2.
            header = bytes([protocol, units]).ljust((units + 2) * 4, b"\xee")
        else:
            # RFC 8200, 4.3: in 8 bytes, not counting the first 8.
            header = bytes([protocol, units]).ljust((units + 1) * 8, b"\xee")
        protocol, payload = extension, header + payload
    return protocol, payload


# Extension headers: protocol, and length in the header's own units.
chains = st.lists(st.tuples(st.sampled_from(EXTENSIONS), st.integers(1, 5)), max_size=5)


@st.composite
def extended_packets(draw: st.DrawFn) -> bytes:
    first, content = extended(draw(chains), draw(st.sampled_from([UDP, ICMPV6])), draw(payloads))
    host = str(draw(hosts_v6))
    return ip_packet(host, host, content, protocol=first)


@given(hosts_v6, chains, st.sampled_from([UDP, 6, 59]), payloads)
def test_payload_is_found_behind_any_chain_of_extensions(
    host: IPv6Address, chain: list[tuple[int, int]], protocol: int, payload: bytes
) -> None:
    first, content = extended(chain, protocol, payload)
    packet = ip_packet(str(host), str(host), content, protocol=first)
    assert ip.upper_layer(packet) == (protocol, payload)
    # A later fragment has no header of the payload.
    if FRAGMENT in dict(chain):
        place = 40 + sum(size for _, size in sizes_before_fragment(chain))
        later = packet[: place + 2] + pack(">H", 8) + packet[place + 4 :]
        assert ip.upper_layer(later) == (None, b"")


def sizes_before_fragment(chain: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The extension headers before the first fragment header, with their sizes in bytes."""
    before = chain[: [extension for extension, _ in chain].index(FRAGMENT)]
    return [(extension, (units + 2) * 4 if extension == AH else (units + 1) * 8) for extension, units in before]


@example(b"\xff\xff\xff\xff")
@given(st.binary(max_size=200))
def test_checksum_is_complement_of_plain_sum(data: bytes) -> None:
    checksum = ip.internet_checksum(data)
    assert checksum == plain_sum(data) ^ 0xFFFF
    # RFC 1071, 1: the sum over data and checksum is all ones.
    assert plain_sum(data + bytes(len(data) % 2) + pack(">H", checksum)) in {0xFFFF, 0}


@pytest.mark.requirement("DT-29")
@given(packets(), st.integers(0, 3), st.booleans())
def test_decapsulation_changes_only_ecn_and_keeps_checksum_right(packet: bytes, outer: int, is_damaged: bool) -> None:
    is_v4 = packet[0] >> 4 == 4
    if is_damaged and is_v4:
        packet = packet[:8] + bytes([packet[8] ^ 1]) + packet[9:]
    marked = ip.decapsulate_ecn(packet, outer)
    # RFC 6040, 4.2, figure 4.
    table = {(3, 1): 3, (3, 2): 3, (1, 2): 1}
    assert ip.ecn(marked) == table.get((outer, ip.ecn(packet)), ip.ecn(packet))
    place, mask, checksum = (1, 0x03, slice(10, 12)) if is_v4 else (1, 0x30, slice(0))
    before, after = bytearray(packet), bytearray(marked)
    for header in (before, after):
        header[place] &= ~mask
        header[checksum] = bytes(len(header[checksum]))
    assert before == after
    if is_v4:
        assert (plain_sum(marked[:20]) == 0xFFFF) is (plain_sum(packet[:20]) == 0xFFFF) is not is_damaged
    assert ip.decapsulate_ecn(marked, outer) == marked


@pytest.mark.requirement("ERR-02")
@example((IPv6Address("fd00::1"), IPv6Address("fd00::2")), 127)
@example((IPv6Address("fd00::1"), IPv6Address("fd00::2")), 128)
@given(address_pairs, st.one_of(st.none(), st.sampled_from(sorted(ICMP_ERRORS | ICMP_QUERIES)), octets))
def test_unreachable_answers_hosts_but_never_icmp_errors(
    addresses: tuple[Address, Address], icmp_type: int | None
) -> None:
    source, destination = addresses
    is_v4 = source.version == 4
    payload = udp(1, 2) if icmp_type is None else bytes([icmp_type]).ljust(8, b"\0")
    protocol = UDP if icmp_type is None else ICMP if is_v4 else ICMPV6
    packet = ip_packet(str(source), str(destination), payload, protocol=protocol)
    error = ip.unreachable(packet)
    is_error = icmp_type is not None and (icmp_type not in ICMP_QUERIES if is_v4 else icmp_type < 128)
    if is_error or not is_one_host(source) or not is_one_host(destination):
        assert error is None
        return
    assert error is not None
    assert error.destination == source.packed
    assert error.message[8:] == packet
    assert error.message[:2] == (b"\3\1" if is_v4 else b"\1\3")
    assert not is_v4 or plain_sum(error.message) == 0xFFFF


@pytest.mark.requirement("ROB-02")
@given(st.one_of(packets(), extended_packets()), st.integers(0, 100), st.binary(max_size=4), st.integers(0, 3))
def test_truncated_packet_of_either_version_raises_no_error(packet: bytes, kept: int, junk: bytes, outer: int) -> None:
    damaged = packet[:kept] + junk
    length, source = ip.length_and_source(damaged)
    assert bool(source) == bool(ip.version(damaged)) == bool(ip.destination(damaged))
    if not source:
        return
    size = 4 if damaged[0] >> 4 == 4 else 16
    assert source == ip.source(damaged)
    assert len(source) == len(ip.destination(damaged)) == size
    assert 0 <= length <= 65575
    assert len(ip.decapsulate_ecn(damaged, outer)) == len(damaged)
    protocol, payload = ip.upper_layer(damaged)
    assert damaged.endswith(payload)
    ports, error = ip.udp_ports(damaged), ip.unreachable(damaged)
    assert ports is None or protocol == UDP
    # RFC 1812, 4.3.2.3, and RFC 4443, 2.4: with its IP header an error has at most 576 or 1280 bytes.
    assert error is None or len(error.message) <= (576 - 20 if size == 4 else 1280 - 40)
