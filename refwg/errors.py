"""Define the exceptions, and the reasons for which a packet is dropped.

A caller's mistake raises; what a peer or a local program sends is dropped and counted under its DropReason.
"""

from __future__ import annotations

from enum import Enum


class RefwgError(Exception):
    """Anything this package raises on purpose.

    RefwgError
    |- ConfigError         a request that cannot be carried out, with the errno to answer
    |- OptionError         an option or environment variable that makes no sense here
    |- InterfaceGoneError  the interface was deleted, or is out of reach
    |- MalformedMessage    bytes that are none of the four messages
    |- NotAuthentic        a tag that does not verify
    |- LowOrderPoint       a Diffie-Hellman result of 32 zero bytes
    |- Refused             a packet that must be dropped, with the DropReason
    `- CheckFailed         a wrong result in `refwg selftest`
    """


class ConfigError(RefwgError):
    """A configuration request that cannot be carried out.

    errno: the error number (errno(3), positive) for whoever asked.
    """

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class OptionError(RefwgError):
    """The program was started with something that makes no sense here; the message names it and says what is wrong."""


class InterfaceGoneError(RefwgError):
    """The interface or its namespace was deleted (no message), or its namespace cannot be entered (with a message)."""


class MalformedMessage(RefwgError):
    """The bytes are none of the four messages: unknown type, reserved bytes not zero, or wrong length."""


class NotAuthentic(RefwgError):
    """A tag does not verify: wrong key, wrong associated data, or bytes changed on the way."""


class LowOrderPoint(RefwgError):
    """The other side's point has low order, so the shared secret would be 32 zero bytes."""


class DropReason(Enum):
    """Why a packet went no further; the value is what logs and traces say."""

    # From either side.
    INTERFACE_DOWN = "the interface is down"

    # Datagrams from the network, before anything is decrypted.
    MALFORMED = "not a message: unknown type, reserved bytes set, or wrong length"
    HANDSHAKE_QUEUE_FULL = "too many handshake messages are waiting"
    INVALID_MAC1 = "mac1 is wrong: the sender does not know our public key"
    COOKIE_REQUIRED = "under load, and mac2 is wrong: a cookie was sent instead"
    RATE_LIMITED = "under load, and this source sends too many handshake messages"

    # Handshake messages.
    NO_IDENTITY = "we have no private key"
    LOW_ORDER_POINT = "a key is a point of low order"
    INVALID_TAG = "a tag does not verify"
    UNKNOWN_PEER = "the static key inside belongs to no peer"
    OLD_TIMESTAMP = "the timestamp is not newer than the last one: a replay"
    INITIATION_FLOOD = "less than 20 ms after the peer's last initiation"
    UNKNOWN_INDEX = "the receiver index names no handshake and no session"
    UNEXPECTED_RESPONSE = "the handshake named is not waiting for a response"
    UNEXPECTED_COOKIE = "no mac1 of ours waits for a cookie"

    # Transport data from the network.
    SESSION_EXPIRED = "the session is too old or has seen its last counter"
    COUNTER_LIMIT = "the counter is at or beyond REJECT_AFTER_MESSAGES"
    REPLAY = "the counter was seen before or is behind the window"
    INNER_PROTOCOL = "the packet inside is neither IPv4 nor IPv6, or too short to be one"
    INNER_LENGTH = "the packet inside claims more bytes than there are, or fewer than its header"
    SOURCE_NOT_ALLOWED = "the source address inside belongs to another peer or to none"

    NOT_DELIVERED = "the interface did not take the packet"

    # Packets from the interface.
    NOT_IP = "a packet from the interface is neither IPv4 nor IPv6"
    NO_PEER = "no peer owns the destination address"
    NO_ENDPOINT = "the peer has no endpoint"
    ROUTING_LOOP = "our own datagram came back to us to be sent once more"
    QUEUE_OVERFLOW = "newer packets pushed it out of the staging queue"
    QUEUE_PURGED = "it waited for a session that did not come"
    SEND_FAILED = "the network stack did not take the datagram"


class Refused(RefwgError):
    """A packet must be dropped; `reason` says why."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class CheckFailed(RefwgError):
    """A check of `refwg selftest` got a wrong result; the message says which."""
