"""Compute the internet checksum (RFC 1071)."""

from __future__ import annotations

from typing import Final

_16_BITS: Final = 0xFFFF


def checksum(data: bytes) -> int:
    """The ones' complement of the ones' complement sum of all 16-bit words; an odd last byte counts as a high one."""
    # All words at once: 65536 is 1 modulo 65535, so the whole number leaves the same rest as their sum.
    padded = data if len(data) % 2 == 0 else data + b"\0"
    number = int.from_bytes(padded)
    rest = number % _16_BITS
    return _16_BITS - (_16_BITS if number and not rest else rest)
