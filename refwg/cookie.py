"""Compute and check mac1, mac2 and cookie replies, so that a handshake flood costs little.

Mirrors cookie.c of the driver; sections 5.3, 5.4.4 and 5.4.7 of the paper. A `CookieChecker` belongs to a device and
checks received messages. A `CookieJar` belongs to a peer and completes the messages to it.
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
    """Result of checking both macs of a handshake message (`enum cookie_mac_state` of the driver)."""

    INVALID_MAC = auto()
    VALID_MAC_BUT_NO_COOKIE = auto()
    VALID_MAC_WITH_COOKIE_BUT_RATELIMITED = auto()
    VALID_MAC_WITH_COOKIE = auto()


def mac1_key_of(public_key: bytes) -> bytes:
    """Return the mac1 key for messages to the owner of this public key (5.4.4)."""
    return blake2s_hash(MAC1_LABEL, public_key)


def cookie_key_of(public_key: bytes) -> bytes:
    """Return the key that encrypts cookies in replies from the owner of this public key (5.4.7)."""
    return blake2s_hash(COOKIE_LABEL, public_key)


def compute_mac1(message: bytes, key: bytes) -> bytes:
    """Return mac1 of a handshake message; it covers all but the last 32 bytes, which are mac1 and mac2 (5.4.4)."""
    return mac(key, message[:-_MACS_LENGTH])


def compute_mac2(message: bytes, cookie: bytes) -> bytes:
    """Return mac2 of a handshake message; it covers all but the last 16 bytes, so mac1 is included (5.4.4)."""
    return mac(cookie, message[:-COOKIE_LENGTH])


class CookieChecker:
    """Checks the macs of messages to a device, and makes cookies from a secret that is replaced every two minutes."""

    def __init__(self, random_bytes: Callable[[int], bytes], now: int) -> None:
        self._random_bytes = random_bytes
        self._secret = random_bytes(KEY_LENGTH)
        self._secret_birthdate = now
        self._mac1_key = self._cookie_key = ZERO_KEY

    def set_public_key(self, public_key: bytes | None) -> None:
        """Accept only messages to this public key from now on; None: the device has no private key."""
        # wg_cookie_checker_precompute_device_keys: without a private key both keys are 32 zero bytes
        if public_key is None:
            self._mac1_key = self._cookie_key = ZERO_KEY
            return
        self._mac1_key = mac1_key_of(public_key)
        self._cookie_key = cookie_key_of(public_key)

    def validate(
        self, message: bytes, address: bytes, port: int, *, now: int, allow: Callable[[bytes, int], bool] | None
    ) -> MacState:
        """Check mac1 and, if `allow` is given, mac2 and the rate limit of the source address.

        address: 4 or 16 bytes. allow: the rate limiter, given only under load. mac2 is checked first, because a sender
        who forges the source address must not use up the tokens of that address.
        """
        mac1, mac2 = message[-_MACS_LENGTH:-COOKIE_LENGTH], message[-COOKIE_LENGTH:]
        # 5.3: mac1 must verify, under load or not
        if not same(mac1, compute_mac1(message, self._mac1_key)):
            return MacState.INVALID_MAC
        # 5.3: mac2 is checked only under load
        if allow is None or not same(mac2, compute_mac2(message, self._make_cookie(address, port, now))):
            return MacState.VALID_MAC_BUT_NO_COOKIE
        # wg_cookie_validate_packet: the token is taken last, after both macs have verified
        if not allow(address, now):
            return MacState.VALID_MAC_WITH_COOKIE_BUT_RATELIMITED
        return MacState.VALID_MAC_WITH_COOKIE

    def create_reply(self, message: bytes, sender_index: int, address: bytes, port: int, now: int) -> CookieReply:
        """Return a cookie reply to a handshake message; only a receiver that has its mac1 can decrypt the cookie."""
        nonce = self._random_bytes(COOKIE_NONCE_LENGTH)
        mac1 = message[-_MACS_LENGTH:-COOKIE_LENGTH]
        # 5.4.7: mac1 is the associated data, which binds the reply to this message
        sealed = xseal(self._cookie_key, nonce, self._make_cookie(address, port, now), mac1)
        return CookieReply(receiver_index=sender_index, nonce=nonce, encrypted_cookie=sealed)

    def _make_cookie(self, address: bytes, port: int, now: int) -> bytes:
        # 5.3: the secret changes every two minutes; make_cookie replaces it when it is next used
        if now >= self._secret_birthdate + COOKIE_SECRET_MAX_AGE:
            self._secret = self._random_bytes(KEY_LENGTH)
            self._secret_birthdate = now
        # 5.4.7: the cookie covers source address and port
        return mac(self._secret, address, _PORT.pack(port))


class CookieJar:
    """Adds both macs to the messages to a peer, and keeps the last cookie that the peer has sent."""

    def __init__(self, remote_static: bytes) -> None:
        self._mac1_key = mac1_key_of(remote_static)
        self._cookie_key = cookie_key_of(remote_static)
        self._last_mac1_sent: bytes | None = None
        self._cookie: bytes | None = None
        self._cookie_birthdate = 0

    def add_macs(self, message: bytes, now: int) -> bytes:
        """Return a handshake message with mac1 and, if a fresh cookie is there, mac2 in its last 32 bytes."""
        mac1 = compute_mac1(message, self._mac1_key)
        self._last_mac1_sent = mac1
        message = message[:-_MACS_LENGTH] + mac1 + ZERO_MAC
        # 5.4.4: without a fresh cookie mac2 is zero
        # wg_cookie_add_mac_to_packet: a cookie is fresh for 115 s, 5 s less than its secret lives
        if self._cookie is None or now >= self._cookie_birthdate + COOKIE_SECRET_MAX_AGE - COOKIE_SECRET_LATENCY:
            return message
        return message[:-COOKIE_LENGTH] + compute_mac2(message, self._cookie)

    def consume_reply(self, reply: CookieReply, now: int) -> None:
        """Store the cookie for the next handshake message; nothing is sent now.

        Raises Refused if the tag does not verify, or if no handshake message was sent since the last cookie.
        """
        # wg_cookie_message_consume: at most one cookie for each mac1 sent
        if self._last_mac1_sent is None:
            raise Refused(DropReason.UNEXPECTED_COOKIE)
        # 5.4.7: the tag covers our last mac1, so only a receiver of that message can have made the reply
        try:
            cookie = xopen(self._cookie_key, reply.nonce, reply.encrypted_cookie, self._last_mac1_sent)
        except NotAuthentic as error:
            raise Refused(DropReason.INVALID_TAG) from error
        # 6.6: store the cookie and its time, send nothing
        self._cookie, self._cookie_birthdate, self._last_mac1_sent = cookie, now, None
