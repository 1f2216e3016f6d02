"""Convert IP addresses between text and bytes by the C library.

The C library is fast enough for configurations with a hundred thousand prefixes. The driver has no such file, because
netlink carries addresses as bytes. `inet_pton` and `inet_ntop` do no I/O, so the core may use them.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from refwg.errors import InvalidArgument
from refwg.ip import IPV4_BYTES


def parse_address(text: str) -> bytes:
    """Return the 4 or 16 bytes of an IPv4 or IPv6 address without scope id; raises InvalidArgument."""
    try:
        return inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except (OSError, ValueError) as error:  # ValueError: the text contains a zero byte
        raise InvalidArgument(f"{text!r} is not an IP address") from error


def format_address(address: bytes) -> str:
    """Return the text of a 4-byte or 16-byte address, IPv6 in the compressed form of inet_ntop(3)."""
    return inet_ntop(AF_INET if len(address) == IPV4_BYTES else AF_INET6, address)
