"""Define the four messages, and the lengths, limits and times of the protocol.

Mirrors messages.h of the driver; sections 5.4 and 6.1 of the paper. Times are in nanoseconds. Integers on the wire are
little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, Self

from refwg.errors import MalformedMessage

if TYPE_CHECKING:
    from collections.abc import Callable

MILLISECOND: Final = 1_000_000
SECOND: Final = 1_000 * MILLISECOND

KEY_LENGTH: Final = 32
TAG_LENGTH: Final = 16
COOKIE_LENGTH: Final = 16
COOKIE_NONCE_LENGTH: Final = 24
TIMESTAMP_LENGTH: Final = 12
ZERO_KEY: Final = bytes(KEY_LENGTH)
ZERO_MAC: Final = bytes(COOKIE_LENGTH)

# RFC 6479: the window is one 64-bit word smaller than the bitmap, because the newest word is cleared as a whole.
COUNTER_BITS_TOTAL: Final = 8192
COUNTER_BITS_PER_WORD: Final = 64
COUNTER_WINDOW_SIZE: Final = COUNTER_BITS_TOTAL - COUNTER_BITS_PER_WORD

REKEY_AFTER_MESSAGES: Final = 2**60
# 6.1: the paper has 2^64 - 2^13 - 1; this is the driver's value on 64-bit machines, 63 more.
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
# tai64n_now: the largest power of two not above the spacing; a larger one could give two initiations equal timestamps.
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
# DSCP AF41, ECN 00: routers may prefer handshakes to data.
HANDSHAKE_DSCP: Final = 0x88


class MessageType(IntEnum):
    """The type of a message: the first byte; the three reserved bytes after it are zero (5.4)."""

    INITIATION = 1
    RESPONSE = 2
    COOKIE_REPLY = 3
    DATA = 4


class _FixedLength:
    """Base of the messages of fixed length: the type word, then the fields in the order of the record."""

    __slots__: ClassVar[tuple[str, ...]] = ()
    TYPE: ClassVar[MessageType]
    LAYOUT: ClassVar[Struct]

    def to_bytes(self) -> bytes:
        """Return the message as it is sent, with the type word in front."""
        return self.LAYOUT.pack(self.TYPE, *(getattr(self, name) for name in self.__slots__))

    @classmethod
    def parse(cls, datagram: bytes) -> Self:
        """Read a whole datagram; raises MalformedMessage if its type, reserved bytes or length are wrong."""
        if len(datagram) != cls.LAYOUT.size:
            raise MalformedMessage(f"{cls.TYPE.name} of {len(datagram)} bytes: expected {cls.LAYOUT.size}")
        kind, *values = cls.LAYOUT.unpack(datagram)
        if kind != cls.TYPE:
            raise MalformedMessage(f"type and reserved bytes 0x{kind:08x}: expected {cls.TYPE.name}")
        return cls(**dict(zip(cls.__slots__, values, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Initiation(_FixedLength):
    """First message of a handshake, 148 bytes: the initiator's static key and a timestamp, both encrypted (5.4.2)."""

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
    """Second message of a handshake, 92 bytes: the responder's ephemeral key and an empty payload (5.4.3)."""

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
    """Reply to a handshake message under load, 64 bytes: the encrypted cookie for the next message (5.4.7)."""

    TYPE = MessageType.COOKIE_REPLY
    LAYOUT = Struct("<L L 24s 32s")

    receiver_index: int
    nonce: bytes
    encrypted_cookie: bytes


# Of data: the type word, the receiver index and the counter. The rest of the message is the ciphertext.
DATA_HEADER: Final = Struct("<L L Q")


class Data(NamedTuple):
    """Transport data: a header of 16 bytes, then the encrypted packet with its 16-byte tag (5.4.6)."""

    receiver_index: int
    counter: int
    ciphertext: bytes

    def to_bytes(self) -> bytes:
        """Return the message as it is sent: header, then ciphertext and tag."""
        return DATA_HEADER.pack(MessageType.DATA, self.receiver_index, self.counter) + self.ciphertext

    @classmethod
    def parse(cls, datagram: bytes) -> Self:
        """Read a whole datagram; raises MalformedMessage if its type is wrong or it is shorter than 32 bytes."""
        if len(datagram) < MINIMUM_DATA_LENGTH:
            raise MalformedMessage(f"data message of {len(datagram)} bytes: expected at least {MINIMUM_DATA_LENGTH}")
        kind, receiver, counter = DATA_HEADER.unpack_from(datagram)
        if kind != MessageType.DATA:
            raise MalformedMessage(f"type and reserved bytes 0x{kind:08x}: expected a data message")
        return cls(receiver, counter, datagram[DATA_HEADER_LENGTH:])


_TYPE_WORD: Final = Struct("<L")
INITIATION_LENGTH: Final = Initiation.LAYOUT.size
RESPONSE_LENGTH: Final = Response.LAYOUT.size
COOKIE_REPLY_LENGTH: Final = CookieReply.LAYOUT.size
DATA_HEADER_LENGTH: Final = DATA_HEADER.size
# message_data_len(0) of the driver: the length of a keepalive, and what a data message adds to its packet.
MINIMUM_DATA_LENGTH: Final = DATA_HEADER_LENGTH + TAG_LENGTH

Message = Initiation | Response | CookieReply | Data
_PARSERS: Final[dict[int, Callable[[bytes], Message]]] = {
    MessageType.INITIATION.value: Initiation.parse,
    MessageType.RESPONSE.value: Response.parse,
    MessageType.COOKIE_REPLY.value: CookieReply.parse,
    MessageType.DATA.value: Data.parse,
}


def parse(datagram: bytes) -> Message:
    """Return the message in a datagram; raises MalformedMessage if there is none.

    The reserved bytes are part of the type word, so a datagram with one of them set has an unknown type.
    """
    # validate_header_len: an unknown type, or a length that does not fit the type, is dropped
    if len(datagram) < _TYPE_WORD.size:
        raise MalformedMessage(f"datagram of {len(datagram)} bytes: expected at least 4")
    (kind,) = _TYPE_WORD.unpack_from(datagram)
    parser = _PARSERS.get(kind)
    if parser is None:
        raise MalformedMessage(f"type and reserved bytes 0x{kind:08x}: not a known message")
    return parser(datagram)


_LENGTHS_WITH_MACS: Final = {_TYPE_WORD.pack(kind.TYPE): kind.LAYOUT.size for kind in (Initiation, Response)}


def has_macs(datagram: bytes) -> bool:
    """Return True for an initiation or a response, by type word and length alone: the macs are not checked here."""
    return _LENGTHS_WITH_MACS.get(datagram[: _TYPE_WORD.size]) == len(datagram)


def parse_with_macs(datagram: bytes) -> Initiation | Response:
    """Return the message in a datagram for which `has_macs` is True."""
    return Initiation.parse(datagram) if len(datagram) == INITIATION_LENGTH else Response.parse(datagram)


def padded_length(length: int, mtu: int) -> int:
    """Return the length of a packet after padding to a multiple of 16 bytes, but not beyond `mtu` (0: no limit).

    A packet longer than the MTU is treated as units of MTU bytes; only the last unit is padded.
    """
    # 5.4.6: padding must not make the datagram larger than the MTU (calculate_skb_padding)
    last_unit = length % mtu if mtu and length > mtu else length
    padded = -(-last_unit // MESSAGE_PADDING_MULTIPLE) * MESSAGE_PADDING_MULTIPLE
    return length - last_unit + (min(padded, mtu) if mtu else padded)
