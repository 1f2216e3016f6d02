"""Read WireGuard's messages from outside: their types and where their fields lie.

Source: the whitepaper, section 5.4. Nothing here decrypts.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

INITIATION, RESPONSE, COOKIE_REPLY, DATA = 1, 2, 3, 4
NAMES: Final = {INITIATION: "initiation", RESPONSE: "response", COOKIE_REPLY: "cookie reply", DATA: "data"}
SIZES: Final = {INITIATION: 148, RESPONSE: 92, COOKIE_REPLY: 64}
KEEPALIVE_SIZE: Final = 32
NANOSECONDS: Final = 1_000_000_000

_TRANSPORT_HEADER: Final = 16
_MAC: Final = 16
# First and last byte (not included) of each field; a negative one counts from the end of the message.
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
    """The type of message that a UDP payload is by its first bytes and its length; 0 if it is none."""
    if payload[1:4] != bytes(3):
        return 0
    kind = payload[0]
    if kind == DATA:
        return DATA if len(payload) >= KEEPALIVE_SIZE else 0
    return kind if SIZES.get(kind) == len(payload) else 0


def counter_of(payload: bytes) -> int:
    """The counter of a transport message."""
    (counter,) = struct.unpack_from("<Q", payload, 8)
    return int(counter)


def with_mac1(payload: bytes, recipient: bytes) -> bytes:
    """The same with the right mac1 before its last 16 bytes, as in both handshake messages, whatever else it may be.

    Anyone can make it who knows the recipient's public key.
    """
    covered, mac2 = payload[: -2 * _MAC], payload[-_MAC:]
    key = hashlib.blake2s(b"mac1----" + recipient).digest()
    return covered + hashlib.blake2s(covered, key=key, digest_size=_MAC).digest() + mac2


def split(payload: bytes) -> list[bytes]:
    """The datagrams of a payload that a program has sent at once by UDP_SEGMENT, if it is one of transport messages.

    How long a segment is stands nowhere in the frame. But the second one begins as the first does, with a counter that
    is one higher.
    """
    if kind_of(payload) != DATA:
        return [payload]
    second = payload[:8] + struct.pack("<Q", (counter_of(payload) + 1) % (1 << 64))
    size = payload.find(second, KEEPALIVE_SIZE)
    if size < 0:
        return [payload]
    return [payload[start : start + size] for start in range(0, len(payload), size)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One datagram: when it left (ns of wall time), from and to which address and port, and its UDP payload."""

    time: int
    source: tuple[str, int]
    destination: tuple[str, int]
    payload: bytes

    @property
    def kind(self) -> int:
        """Its message type; 0 if it is no WireGuard message."""
        return kind_of(self.payload)

    @property
    def is_keepalive(self) -> bool:
        return self.kind == DATA and len(self.payload) == KEEPALIVE_SIZE

    @property
    def counter(self) -> int | None:
        """The counter of a transport message."""
        return counter_of(self.payload) if self.kind == DATA else None

    @property
    def name(self) -> str:
        return "keepalive" if self.is_keepalive else NAMES.get(self.kind, "no message of WireGuard's")

    def __str__(self) -> str:
        seconds = self.time / NANOSECONDS
        counter = "" if self.counter is None else f" {self.counter}"
        return f"{seconds:.3f} {self.source[1]}>{self.destination[1]} {self.name}{counter} ({len(self.payload)})"
