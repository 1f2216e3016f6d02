"""Generate messages, prefixes, counters and configurations for hypothesis."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from hypothesis import strategies as st

from refwg.allowedips import Prefix
from refwg.messages import CookieReply, Data, Initiation, Response

indices = st.integers(0, 2**32 - 1)


def exactly(length: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=length, max_size=length)


messages = st.one_of(
    st.builds(
        Initiation,
        sender_index=indices,
        ephemeral=exactly(32),
        encrypted_static=exactly(48),
        encrypted_timestamp=exactly(28),
        mac1=exactly(16),
        mac2=exactly(16),
    ),
    st.builds(
        Response,
        sender_index=indices,
        receiver_index=indices,
        ephemeral=exactly(32),
        encrypted_nothing=exactly(16),
        mac1=exactly(16),
        mac2=exactly(16),
    ),
    st.builds(CookieReply, receiver_index=indices, nonce=exactly(24), encrypted_cookie=exactly(32)),
    st.builds(
        Data,
        receiver_index=indices,
        counter=st.integers(0, 2**64 - 1),
        ciphertext=st.binary(min_size=16, max_size=100),
    ),
)

# Few distinct bits, so that prefixes nest, touch and repeat.
addresses_v4 = st.sampled_from([0x0A000000, 0x0A000001, 0x0A0000FF, 0x0A800000, 0x0B000000, 0xFFFFFFFF, 0])
addresses = st.one_of(
    addresses_v4.map(lambda number: number.to_bytes(4)),
    addresses_v4.map(lambda number: (number << 96 | number).to_bytes(16)),
    exactly(4),
    exactly(16),
)
prefixes = addresses.flatmap(
    lambda address: st.integers(0, 8 * len(address)).map(lambda length: Prefix(address, length))
)

keys = exactly(32)
ipv4_endpoints = st.tuples(exactly(4).map(IPv4Address), st.integers(0, 65535)).map(lambda pair: f"{pair[0]}:{pair[1]}")
ipv6_endpoints = st.tuples(exactly(16).map(IPv6Address), st.integers(0, 65535)).map(
    lambda pair: f"[{pair[0]}]:{pair[1]}"
)
endpoints = st.one_of(ipv4_endpoints, ipv6_endpoints)


def flip(data: bytes, bit: int) -> bytes:
    """Change one bit; 0 is the lowest of the first byte."""
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]
