"""Compute and check mac1, mac2 and cookie replies, which keep handshake floods cheap.

Mirrors cookie.c of the driver; sections 5.3, 5.4.4 and 5.4.7 of the paper. A `CookieChecker` belongs to a device and
looks at what comes in; a `CookieJar` belongs to a peer and completes what goes out.
"""

from __future__ import annotations

from enum import Enum, auto
from struct import Struct
from typing import TYPE_CHECKING, Final

from refwg.crypto import blake2s_hash, mac, same, xopen, xseal
from refwg.errors import DropReason, NotAuthentic, Refused
from refwg.messages import (
    COOKIE_LENGTH,
    COOKIE_NONCE_LENGTH,
    COOKIE_SECRET_LATENCY,
    COOKIE_SECRET_MAX_AGE,
    KEY_LENGTH,
    ZERO_KEY,
    ZERO_MAC,
    CookieReply,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MAC1_LABEL: Final = b"mac1----"
COOKIE_LABEL: Final = b"cookie--"

_MACS_LENGTH: Final = 2 * COOKIE_LENGTH
_PORT: Final = Struct(">H")


class MacState(Enum):
    """What the two macs of a message are worth."""

    INVALID_MAC = auto()
    VALID_MAC_BUT_NO_COOKIE = auto()
    VALID_MAC_WITH_COOKIE_BUT_RATELIMITED = auto()
    VALID_MAC_WITH_COOKIE = auto()


def mac1_key_of(public_key: bytes) -> bytes:
    return blake2s_hash(MAC1_LABEL, public_key)


def cookie_key_of(public_key: bytes) -> bytes:
    return blake2s_hash(COOKIE_LABEL, public_key)


def compute_mac1(message: bytes, key: bytes) -> bytes:
    """mac1 of a handshake message whose last 32 bytes are the place of both macs."""
    return mac(key, message[:-_MACS_LENGTH])


def compute_mac2(message: bytes, cookie: bytes) -> bytes:
    """mac2 of a handshake message that has its mac1."""
    return mac(cookie, message[:-COOKIE_LENGTH])


class CookieChecker:
    """Of a device: checks what comes in, and makes cookies out of a secret that lives for two minutes."""

    def __init__(self, random_bytes: Callable[[int], bytes], now: int) -> None:
        self._random_bytes = random_bytes
        self._secret = random_bytes(KEY_LENGTH)
        self._secret_birthdate = now
        self._mac1_key = self._cookie_key = ZERO_KEY

    def set_public_key(self, public_key: bytes | None) -> None:
        """The device has a new identity, or none: from now on only messages to that one are let in."""
        if public_key is None:
            self._mac1_key = self._cookie_key = ZERO_KEY
            return
        self._mac1_key = mac1_key_of(public_key)
        self._cookie_key = cookie_key_of(public_key)

    def validate(
        self, message: bytes, address: bytes, port: int, *, now: int, allow: Callable[[bytes, int], bool] | None
    ) -> MacState:
        """Check mac1 and, if `allow` is given, mac2 and the rate limit of the source.

        The order matters: nobody pays with a token for a message that could not have come from there.
        """
        mac1, mac2 = message[-_MACS_LENGTH:-COOKIE_LENGTH], message[-COOKIE_LENGTH:]
        if not same(mac1, compute_mac1(message, self._mac1_key)):
            return MacState.INVALID_MAC
        if allow is None or not same(mac2, compute_mac2(message, self._make_cookie(address, port, now))):
            return MacState.VALID_MAC_BUT_NO_COOKIE
        if not allow(address, now):
            return MacState.VALID_MAC_WITH_COOKIE_BUT_RATELIMITED
        return MacState.VALID_MAC_WITH_COOKIE

    def create_reply(self, message: bytes, sender_index: int, address: bytes, port: int, now: int) -> CookieReply:
        """Answer a message with the cookie of its source; only who has seen its mac1 can read it."""
        nonce = self._random_bytes(COOKIE_NONCE_LENGTH)
        mac1 = message[-_MACS_LENGTH:-COOKIE_LENGTH]
        sealed = xseal(self._cookie_key, nonce, self._make_cookie(address, port, now), mac1)
        return CookieReply(receiver_index=sender_index, nonce=nonce, encrypted_cookie=sealed)

    def _make_cookie(self, address: bytes, port: int, now: int) -> bytes:
        if now >= self._secret_birthdate + COOKIE_SECRET_MAX_AGE:
            self._secret = self._random_bytes(KEY_LENGTH)
            self._secret_birthdate = now
        return mac(self._secret, address, _PORT.pack(port))


class CookieJar:
    """Of a peer: adds the macs to what goes to it, and keeps the last cookie it gave us."""

    def __init__(self, remote_static: bytes) -> None:
        self._mac1_key = mac1_key_of(remote_static)
        self._cookie_key = cookie_key_of(remote_static)
        self._last_mac1_sent: bytes | None = None
        self._cookie: bytes | None = None
        self._cookie_birthdate = 0

    def add_macs(self, message: bytes, now: int) -> bytes:
        """Complete a handshake message whose last 32 bytes are the place of both macs."""
        mac1 = compute_mac1(message, self._mac1_key)
        self._last_mac1_sent = mac1
        message = message[:-_MACS_LENGTH] + mac1 + ZERO_MAC
        if self._cookie is None or now >= self._cookie_birthdate + COOKIE_SECRET_MAX_AGE - COOKIE_SECRET_LATENCY:
            return message
        return message[:-COOKIE_LENGTH] + compute_mac2(message, self._cookie)

    def consume_reply(self, reply: CookieReply, now: int) -> None:
        """Keep the cookie for the messages to come; nothing is sent now. One reply counts for each mac1 sent."""
        if self._last_mac1_sent is None:
            raise Refused(DropReason.UNEXPECTED_COOKIE)
        try:
            cookie = xopen(self._cookie_key, reply.nonce, reply.encrypted_cookie, self._last_mac1_sent)
        except NotAuthentic as error:
            raise Refused(DropReason.INVALID_TAG) from error
        self._cookie, self._cookie_birthdate, self._last_mac1_sent = cookie, now, None
