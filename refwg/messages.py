"""Define the four messages, and the lengths, limits and times of the protocol.

Mirrors messages.h of the driver; sections 5.4 and 6.1 of the paper. All times are nanoseconds, all integers on the
wire little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import ClassVar, Final, Self

from refwg.errors import MalformedMessage

MILLISECOND: Final = 1_000_000
SECOND: Final = 1_000 * MILLISECOND

KEY_LENGTH: Final = 32
TAG_LENGTH: Final = 16
COOKIE_LENGTH: Final = 16
COOKIE_NONCE_LENGTH: Final = 24
TIMESTAMP_LENGTH: Final = 12
ZERO_KEY: Final = bytes(KEY_LENGTH)
ZERO_MAC: Final = bytes(COOKIE_LENGTH)

# The window is one 64-bit word smaller than the bitmap, because the newest word is cleared as a whole.
COUNTER_BITS_TOTAL: Final = 8192
COUNTER_BITS_PER_WORD: Final = 64
COUNTER_WINDOW_SIZE: Final = COUNTER_BITS_TOTAL - COUNTER_BITS_PER_WORD

REKEY_AFTER_MESSAGES: Final = 2**60
REJECT_AFTER_MESSAGES: Final = 2**64 - 1 - COUNTER_WINDOW_SIZE - 1
REKEY_TIMEOUT: Final = 5 * SECOND
REKEY_TIMEOUT_JITTER_MAX: Final = 333 * MILLISECOND
REKEY_AFTER_TIME: Final = 120 * SECOND
REJECT_AFTER_TIME: Final = 180 * SECOND
KEEPALIVE_TIMEOUT: Final = 10 * SECOND
MAX_TIMER_HANDSHAKES: Final = 90 * SECOND // REKEY_TIMEOUT
ZERO_KEYS_AFTER: Final = 3 * REJECT_AFTER_TIME
LAST_MINUTE_REKEY: Final = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT

INITIATIONS_PER_SECOND: Final = 50
INITIATION_SPACING: Final = SECOND // INITIATIONS_PER_SECOND
# The largest power of two not above the spacing: coarser would cost initiations, finer would leak the clock.
TIMESTAMP_WHITENING: Final = 1 << (INITIATION_SPACING.bit_length() - 1)

COOKIE_SECRET_MAX_AGE: Final = 120 * SECOND
COOKIE_SECRET_LATENCY: Final = 5 * SECOND

MAX_PEERS_PER_DEVICE: Final = 1 << 20
MAX_STAGED_PACKETS: Final = 128
MAX_QUEUED_INCOMING_HANDSHAKES: Final = 4096
UNDER_LOAD_THRESHOLD: Final = MAX_QUEUED_INCOMING_HANDSHAKES // 8
UNDER_LOAD_MEMORY: Final = SECOND

MESSAGE_PADDING_MULTIPLE: Final = 16
DEFAULT_MTU: Final = 1420
# AF41 with ECN 00: handshakes matter more than what they make way for.
HANDSHAKE_DSCP: Final = 0x88


class MessageType(IntEnum):
    """The first byte of a message; three zero bytes follow it."""

    INITIATION = 1
    RESPONSE = 2
    COOKIE_REPLY = 3
    DATA = 4


class _FixedLength:
    """Messages of which every byte has its place: behind the type stand the fields, in the order of the record."""

    __slots__: ClassVar[tuple[str, ...]] = ()
    TYPE: ClassVar[MessageType]
    LAYOUT: ClassVar[Struct]

    def to_bytes(self) -> bytes:
        return self.LAYOUT.pack(self.TYPE, *(getattr(self, name) for name in self.__slots__))

    @classmethod
    def parse(cls, datagram: bytes) -> Self:
        if len(datagram) != cls.LAYOUT.size:
            raise MalformedMessage(f"{cls.TYPE.name} of {len(datagram)} bytes: exactly {cls.LAYOUT.size} are needed")
        kind, *values = cls.LAYOUT.unpack(datagram)
        if kind != cls.TYPE:
            raise MalformedMessage(f"type and reserved bytes 0x{kind:08x}: not {cls.TYPE.name}")
        return cls(**dict(zip(cls.__slots__, values, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Initiation(_FixedLength):
    """First message of a handshake: "here is who I am, sealed for you, and the time"."""

    TYPE = MessageType.INITIATION
    LAYOUT = Struct("<L L 32s 48s 28s 16s 16s")

    sender_index: int
    ephemeral: bytes
    encrypted_static: bytes
    encrypted_timestamp: bytes
    mac1: bytes = ZERO_MAC
    mac2: bytes = ZERO_MAC


@dataclass(frozen=True, slots=True, kw_only=True)
class Response(_FixedLength):
    """Second message of a handshake: "so it is you; here is my half of the keys"."""

    TYPE = MessageType.RESPONSE
    LAYOUT = Struct("<L L L 32s 16s 16s 16s")

    sender_index: int
    receiver_index: int
    ephemeral: bytes
    encrypted_nothing: bytes
    mac1: bytes = ZERO_MAC
    mac2: bytes = ZERO_MAC


@dataclass(frozen=True, slots=True, kw_only=True)
class CookieReply(_FixedLength):
    """Answer of a responder under load: "prove first that you receive at your address"."""

    TYPE = MessageType.COOKIE_REPLY
    LAYOUT = Struct("<L L 24s 32s")

    receiver_index: int
    nonce: bytes
    encrypted_cookie: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Transport data: a header of 16 bytes, then the sealed packet with its tag."""

    TYPE: ClassVar = MessageType.DATA
    HEADER: ClassVar = Struct("<L L Q")

    receiver_index: int
    counter: int
    ciphertext: bytes

    def to_bytes(self) -> bytes:
        return self.HEADER.pack(self.TYPE, self.receiver_index, self.counter) + self.ciphertext

    @classmethod
    def parse(cls, datagram: bytes) -> Self:
        if len(datagram) < MINIMUM_DATA_LENGTH:
            raise MalformedMessage(f"data message of {len(datagram)} bytes: at least {MINIMUM_DATA_LENGTH} are needed")
        kind, receiver, counter = cls.HEADER.unpack_from(datagram)
        if kind != cls.TYPE:
            raise MalformedMessage(f"type and reserved bytes 0x{kind:08x}: not a data message")
        return cls(receiver_index=receiver, counter=counter, ciphertext=datagram[cls.HEADER.size :])


_TYPE_WORD: Final = Struct("<L")
INITIATION_LENGTH: Final = Initiation.LAYOUT.size
RESPONSE_LENGTH: Final = Response.LAYOUT.size
COOKIE_REPLY_LENGTH: Final = CookieReply.LAYOUT.size
DATA_HEADER_LENGTH: Final = Data.HEADER.size
# What a message adds to the packet inside it; also the length of a keepalive.
MINIMUM_DATA_LENGTH: Final = DATA_HEADER_LENGTH + TAG_LENGTH

Message = Initiation | Response | CookieReply | Data
_PARSERS: Final = {kind.TYPE.value: kind.parse for kind in (Initiation, Response, CookieReply, Data)}


def parse(datagram: bytes) -> Message:
    """Read a datagram as the one message it can be.

    The reserved bytes need no check of their own: with one of them set the first word is no known type.
    """
    if len(datagram) < _TYPE_WORD.size:
        raise MalformedMessage(f"datagram of {len(datagram)} bytes: too short for a type")
    (kind,) = _TYPE_WORD.unpack_from(datagram)
    parser = _PARSERS.get(kind)
    if parser is None:
        raise MalformedMessage(f"type and reserved bytes 0x{kind:08x}: no such message")
    return parser(datagram)


def padded_length(length: int, mtu: int) -> int:
    """How long a packet of `length` bytes is once padded with zeros to 16, but never beyond `mtu` (0: no limit).

    A packet longer than the MTU will be cut into units; only its last unit is padded.
    """
    last_unit = length % mtu if mtu and length > mtu else length
    padded = -(-last_unit // MESSAGE_PADDING_MULTIPLE) * MESSAGE_PADDING_MULTIPLE
    return length - last_unit + (min(padded, mtu) if mtu else padded)
