"""Read WireGuard's messages from outside: their types and the offsets of their fields.

Source: the whitepaper, section 5.4. Nothing here decrypts.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

INITIATION, RESPONSE, COOKIE_REPLY, DATA = 1, 2, 3, 4
NAMES: Final = {INITIATION: "initiation", RESPONSE: "response", COOKIE_REPLY: "cookie reply", DATA: "data"}
SIZES: Final = {INITIATION: 148, RESPONSE: 92, COOKIE_REPLY: 64}
KEEPALIVE_SIZE: Final = 32
NANOSECONDS: Final = 1_000_000_000
# The sorts of what passes a wire: a UDP datagram, a fragment of a datagram that is not complete, any other frame.
DATAGRAM, FRAGMENT, OTHER = "datagram", "fragment", "other"
# The word for a UDP datagram that is not a WireGuard message.
UNKNOWN: Final = "unknown"

_TRANSPORT_HEADER: Final = 16
_MAC: Final = 16
# (start, end) of each field in bytes, end not included; a negative number counts from the end of the message.
FIELDS: Final[dict[int, dict[str, tuple[int, int | None]]]] = {
    INITIATION: {
        "sender": (4, 8), "ephemeral": (8, 40), "static": (40, 88), "timestamp": (88, 116), "mac1": (116, 132),
        "mac2": (132, 148),
    },
    RESPONSE: {
        "sender": (4, 8), "receiver": (8, 12), "ephemeral": (12, 44), "nothing": (44, 60), "mac1": (60, 76),
        "mac2": (76, 92),
    },
    COOKIE_REPLY: {"receiver": (4, 8), "nonce": (8, 32), "cookie": (32, 64)},
    DATA: {"receiver": (4, 8), "counter": (8, 16), "packet": (16, -16), "tag": (-16, None)},
}  # fmt: skip


def kind_of(payload: bytes) -> int:
    """Return the message type of a UDP payload, by its type word and its length; 0 if it is not a WireGuard message."""
    if payload[1:4] != bytes(3):
        return 0
    kind = payload[0]
    if kind == DATA:
        return DATA if len(payload) >= KEEPALIVE_SIZE else 0
    return kind if SIZES.get(kind) == len(payload) else 0


def counter_of(payload: bytes) -> int:
    """Return the counter of a transport message (5.4.6); the payload must be one."""
    (counter,) = struct.unpack_from("<Q", payload, 8)
    return int(counter)


def with_mac1(payload: bytes, recipient: bytes) -> bytes:
    """Return the payload with a correct mac1 in place of the 16 bytes before its last 16 (5.4.4).

    That is where an initiation and a response have it; nothing else of the payload is checked. recipient: the public
    key of the receiver, which is all that mac1 needs.
    """
    covered, mac2 = payload[: -2 * _MAC], payload[-_MAC:]
    key = hashlib.blake2s(b"mac1----" + recipient).digest()
    return covered + hashlib.blake2s(covered, key=key, digest_size=_MAC).digest() + mac2


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One UDP datagram, or a frame that is not understood as one.

    time: when it passed, ns of wall time. source, destination: (address, port). sort: DATAGRAM, FRAGMENT or OTHER.
    detail: what a FRAGMENT or OTHER is, such as "ARP"; its payload is what follows the Ethernet header, and its source
    and destination are empty.
    """

    time: int
    source: tuple[str, int]
    destination: tuple[str, int]
    payload: bytes
    sort: str = DATAGRAM
    detail: str = ""

    @property
    def kind(self) -> int:
        """The message type; 0 if it is not a WireGuard message."""
        return kind_of(self.payload) if self.sort == DATAGRAM else 0

    @property
    def is_keepalive(self) -> bool:
        """True for a transport message with an empty packet, recognized by its length."""
        return self.kind == DATA and len(self.payload) == KEEPALIVE_SIZE

    @property
    def counter(self) -> int | None:
        """The counter of a transport message; None for any other."""
        return counter_of(self.payload) if self.kind == DATA else None

    @property
    def name(self) -> str:
        """The kind in words, for logs and packet comments."""
        if self.sort != DATAGRAM:
            return f"{self.sort} ({self.detail})"
        return "keepalive" if self.is_keepalive else NAMES.get(self.kind, UNKNOWN)

    def __str__(self) -> str:
        seconds = self.time / NANOSECONDS
        if self.sort != DATAGRAM:
            return f"{seconds:.3f} {self.name} ({len(self.payload)})"
        counter = "" if self.counter is None else f" {self.counter}"
        return f"{seconds:.3f} {self.source[1]}>{self.destination[1]} {self.name}{counter} ({len(self.payload)})"

    def __repr__(self) -> str:
        return f"Message({self})"


def tally(names: Iterable[str]) -> str:
    """Count names: "3 data, 1 unknown", in the order of their first appearance; "nothing" if there are none."""
    return ", ".join(f"{number} {name}" for name, number in Counter(names).items()) or "nothing"
