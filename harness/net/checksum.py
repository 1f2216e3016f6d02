"""Compute the internet checksum (RFC 1071)."""

from __future__ import annotations

from typing import Final

_16_BITS: Final = 0xFFFF


def checksum(data: bytes) -> int:
    """Return the internet checksum of `data`; an odd last byte is the high byte of the last 16-bit word."""
    # 65536 is 1 modulo 65535: the data as one number has the same remainder as the sum of its 16-bit words.
    padded = data if len(data) % 2 == 0 else data + b"\0"
    number = int.from_bytes(padded)
    remainder = number % _16_BITS
    return _16_BITS - (_16_BITS if number and not remainder else remainder)
