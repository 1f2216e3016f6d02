"""Define the exceptions, and the reasons for which a packet is dropped.

A caller's mistake raises an error. A packet of a peer or a local program is dropped and counted under its DropReason.
"""

from __future__ import annotations

from enum import Enum


class RefwgError(Exception):
    """Base of every error that this package raises on purpose; failed system calls raise OSError.

    RefwgError
    |- ConfigError          a request that cannot be carried out, with the errno of the reply
    |- OptionError          an option or environment variable with a value that cannot be used
    |- InterfaceGoneError   the interface or its namespace was deleted
    |- ForbiddenNamespace   the interface is in a network namespace that this process must not enter
    |- UnsuitableMachine    the CPU lacks instructions that an engine needs
    |- Shortage             the system lacks descriptors, memory or buffers at the moment
    |- InvalidArgument      an argument that no caller may pass; also a ValueError
    |- MalformedMessage     bytes that are none of the four messages
    |- MalformedSuperframe  a superframe of the interface whose headers do not fit its type or length
    |- NotAuthentic         a tag that does not verify
    |- LowOrderPoint        a Diffie-Hellman result of 32 zero bytes
    |- Refused              a packet that must be dropped, with the DropReason
    `- CheckFailed          a wrong result in `refwg selftest`
    """


class ConfigError(RefwgError):
    """A configuration request that cannot be carried out.

    errno: the error number (errno(3), positive) that the answer to the request carries.
    """

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class OptionError(RefwgError):
    """An option or environment variable cannot be used; the message names it and the reason."""


class InterfaceGoneError(RefwgError):
    """The interface or its namespace was deleted."""


class ForbiddenNamespace(RefwgError):
    """The interface is in a network namespace that this process must not enter; the message has the remedy."""


class UnsuitableMachine(RefwgError):
    """The CPU lacks instructions that an engine needs; the message names them. Another engine goes on."""


class MalformedSuperframe(RefwgError):
    """The headers of a superframe do not fit its type or length. A kernel makes none; who passes WG_TUN_FD might."""


class Shortage(RefwgError):
    """The system lacks descriptors, memory or buffers; nothing has changed, and the caller may try again later.

    errno: the error number (errno(3), positive). The message names what failed, the shortage and the remedy.
    """

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class InvalidArgument(RefwgError, ValueError):
    """An argument has a wrong form or length: text that is not an address, a prefix length, a nonce."""


class MalformedMessage(RefwgError):
    """The bytes are none of the four messages: unknown type, reserved bytes not zero, or wrong length."""


class NotAuthentic(RefwgError):
    """A Poly1305 tag does not verify: wrong key, wrong associated data, or changed bytes."""


class LowOrderPoint(RefwgError):
    """The public key is a point of low order, so the shared secret would be 32 zero bytes."""


class DropReason(Enum):
    """Why a packet was dropped; logs and traces print the name, `Refused` has the value as its message."""

    # In both directions.
    INTERFACE_DOWN = "the interface is down"
    WORKER_DIED = "the worker that encrypted or decrypted the packet died, or did not answer"

    # Datagrams from the network, before anything is decrypted.
    MALFORMED = "not a message: unknown type, reserved bytes set, or wrong length"
    HANDSHAKE_QUEUE_FULL = "the queue of handshake messages is full"
    INVALID_MAC1 = "mac1 does not verify: it was not made with our public key"
    COOKIE_REQUIRED = "under load and mac2 does not verify: a cookie reply was sent"
    RATE_LIMITED = "under load and the source address sends too many handshake messages"

    # Handshake messages.
    NO_IDENTITY = "the device has no private key"
    LOW_ORDER_POINT = "a public key is a point of low order"
    INVALID_TAG = "a tag does not verify"
    UNKNOWN_PEER = "no peer has the static key of the initiation"
    OLD_TIMESTAMP = "the timestamp is not greater than the last one: a replay"
    INITIATION_FLOOD = "less than 20 ms after the last initiation of this peer"
    UNKNOWN_INDEX = "no handshake or session has the receiver index"
    UNEXPECTED_RESPONSE = "the handshake does not wait for a response"
    UNEXPECTED_COOKIE = "no handshake message was sent since the last cookie"

    # Transport data from the network.
    SESSION_EXPIRED = "the session is too old, or its last counter was received"
    COUNTER_LIMIT = "the counter is at or beyond REJECT_AFTER_MESSAGES"
    REPLAY = "the counter was received before, or is behind the replay window"
    INNER_PROTOCOL = "the inner packet is not IPv4 or IPv6, or is shorter than its header"
    INNER_LENGTH = "the length field of the inner packet is larger than the packet, or smaller than its header"
    SOURCE_NOT_ALLOWED = "the inner source address belongs to another peer or to none"

    NOT_DELIVERED = "the interface refused the packet"

    # Packets from the interface.
    NOT_IP = "the packet from the interface is not IPv4 or IPv6"
    MALFORMED_SUPERFRAME = "the headers of the superframe do not fit its type or length"
    NO_PEER = "no peer owns the destination address"
    NO_ENDPOINT = "the peer has no endpoint"
    ROUTING_LOOP = "the packet is our own datagram to the same peer"
    QUEUE_OVERFLOW = "the staging queue was full: its oldest packet was dropped"
    QUEUE_PURGED = "the staging queue was purged: no session in time, interface down, or peer removed"
    SEND_FAILED = "the network stack refused the datagram"


class Refused(RefwgError):
    """A packet must be dropped; reason: the counter under which it is counted."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class CheckFailed(RefwgError):
    """A check of `refwg selftest` got a wrong result; the message names the check, the result and the expected one."""
