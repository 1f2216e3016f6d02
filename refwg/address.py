"""Convert IP addresses between text and bytes by the C library.

A configuration may hold a hundred thousand of them. No kernel file has this; netlink carries addresses as bytes. Of the
module `socket` only the two functions are used that depend on nothing but their argument.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from refwg.ip import IPV4_BYTES


def parse_address(text: str) -> bytes:
    """4 or 16 bytes; raises ValueError unless it is an address of either family, without scope."""
    try:
        return inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except OSError as error:
        raise ValueError(f"{text!r} is no IP address") from error


def format_address(address: bytes) -> str:
    return inet_ntop(AF_INET if len(address) == IPV4_BYTES else AF_INET6, address)
