from __future__ import annotations

from hashlib import blake2s
from random import Random

import pytest

from refwg.cookie import CookieChecker, CookieJar, MacState, compute_mac2, cookie_key_of, mac1_key_of
from refwg.errors import DropReason, Refused
from refwg.messages import SECOND, CookieReply
from refwg.ratelimiter import RateLimiter

KEY = bytes(range(32))
BLANK = bytes(148)
ADDRESS, PORT, INDEX = b"\x0a\0\0\1", 4000, 7


def checker(public_key: bytes = KEY) -> CookieChecker:
    checker = CookieChecker(Random(1).randbytes, 0)  # noqa: S311 - repeatable on purpose
    checker.set_public_key(public_key)
    return checker


def state_of(
    checker: CookieChecker,
    message: bytes,
    *,
    address: bytes = ADDRESS,
    port: int = PORT,
    now: int = 0,
    limiter: RateLimiter | None = None,
) -> MacState:
    """Return the MAC state that a receiver under load finds in a message."""
    return checker.validate(
        message, address, port, now=now, allow=(RateLimiter() if limiter is None else limiter).allow
    )


def with_cookie(checker: CookieChecker, jar: CookieJar, *, now: int = 0) -> bytes:
    """Return a message with the mac2 of a cookie."""
    rejected = jar.add_macs(BLANK, now)
    jar.consume_reply(checker.create_reply(rejected, INDEX, ADDRESS, PORT, now), now)
    return jar.add_macs(BLANK, now)


@pytest.mark.requirement("HS-04", "CK-01", "DOS-05")
@pytest.mark.parametrize("length", [148, 92])
def test_mac1_covers_everything_before_it(length: int) -> None:
    message = bytearray(CookieJar(KEY).add_macs(bytes(length), 0))
    assert state_of(checker(), bytes(message)) is MacState.VALID_MAC_BUT_NO_COOKIE
    for at in (0, length - 33, length - 32, length - 17):
        message[at] ^= 1
        assert state_of(checker(), bytes(message)) is MacState.INVALID_MAC
        message[at] ^= 1


@pytest.mark.requirement("CK-16", "HS-26")
@pytest.mark.parametrize("identity", [None, bytes(32)])
def test_mac1_is_invalid_when_identity_has_changed(identity: bytes | None) -> None:
    changed = checker()
    changed.set_public_key(identity)
    assert state_of(changed, CookieJar(KEY).add_macs(BLANK, 0)) is MacState.INVALID_MAC


@pytest.mark.requirement("HS-05", "RL-06")
def test_mac2_is_ignored_when_not_under_load() -> None:
    message = CookieJar(KEY).add_macs(BLANK, 0)[:-16] + b"anything at all!"
    assert checker().validate(message, ADDRESS, PORT, now=0, allow=None) is MacState.VALID_MAC_BUT_NO_COOKIE


@pytest.mark.requirement("CK-02", "CK-03")
def test_mac2_is_zero_until_cookie_is_received() -> None:
    jar = CookieJar(KEY)
    assert jar.add_macs(BLANK, 0)[-16:] == bytes(16)
    assert state_of(checker(), with_cookie(checker(), jar)) is MacState.VALID_MAC_WITH_COOKIE


@pytest.mark.requirement("CK-05", "CK-06")
@pytest.mark.parametrize(("address", "port"), [(b"\x0a\0\0\2", PORT), (ADDRESS, PORT + 1), (ADDRESS + bytes(12), PORT)])
def test_cookie_is_valid_for_one_address_and_port(address: bytes, port: int) -> None:
    issuer = checker()
    message = with_cookie(issuer, CookieJar(KEY))
    assert state_of(issuer, message) is MacState.VALID_MAC_WITH_COOKIE
    assert state_of(issuer, message, address=address, port=port) is MacState.VALID_MAC_BUT_NO_COOKIE


@pytest.mark.requirement("CK-07")
@pytest.mark.parametrize(
    ("now", "state"),
    [(120 * SECOND - 1, MacState.VALID_MAC_WITH_COOKIE), (120 * SECOND, MacState.VALID_MAC_BUT_NO_COOKIE)],
)
def test_cookie_secret_lives_for_two_minutes(now: int, state: MacState) -> None:
    issuer = checker()
    message = with_cookie(issuer, CookieJar(KEY))
    assert state_of(issuer, message, now=now) is state


@pytest.mark.requirement("CK-07")
def test_renewed_cookie_secret_lives_for_two_minutes() -> None:
    issuer = checker()
    message = with_cookie(issuer, CookieJar(KEY), now=200 * SECOND)
    assert state_of(issuer, message, now=320 * SECOND - 1) is MacState.VALID_MAC_WITH_COOKIE
    assert state_of(issuer, message, now=320 * SECOND) is MacState.VALID_MAC_BUT_NO_COOKIE


@pytest.mark.requirement("CK-08", "CK-09")
@pytest.mark.parametrize(("age", "is_used"), [(115 * SECOND - 1, True), (115 * SECOND, False)])
def test_cookie_is_used_for_115_seconds(age: int, is_used: bool) -> None:
    jar = CookieJar(KEY)
    with_cookie(checker(), jar, now=SECOND)
    assert (jar.add_macs(BLANK, SECOND + age)[-16:] != bytes(16)) is is_used


@pytest.mark.requirement("RL-02", "RL-07")
def test_rate_limiter_counts_messages_with_valid_mac2_only() -> None:
    issuer, limiter, jar = checker(), RateLimiter(), CookieJar(KEY)
    good = with_cookie(issuer, jar)
    bad = good[:-16] + bytes(16)
    states = [state_of(issuer, message, limiter=limiter) for message in [bad] * 100 + [good] * 6]
    assert states[100:105] == [MacState.VALID_MAC_WITH_COOKIE] * 5
    assert states[105] is MacState.VALID_MAC_WITH_COOKIE_BUT_RATELIMITED


@pytest.mark.requirement("CK-15", "CK-04")
def test_cookie_replies_differ_but_hold_same_cookie() -> None:
    issuer, message = checker(), CookieJar(KEY).add_macs(BLANK, 0)
    first, second = (issuer.create_reply(message, INDEX, ADDRESS, PORT, 0) for _ in range(2))
    assert first.nonce != second.nonce
    assert first.encrypted_cookie != second.encrypted_cookie
    assert first.receiver_index == INDEX
    jars = [CookieJar(KEY), CookieJar(KEY)]
    for jar, reply in zip(jars, (first, second), strict=True):
        jar.add_macs(BLANK, 0)
        jar.consume_reply(reply, 0)
    assert jars[0].add_macs(BLANK, 0) == jars[1].add_macs(BLANK, 0)


@pytest.mark.requirement("CK-11", "CK-04")
def test_cookie_reply_for_other_mac1_leaves_cookie_unchanged() -> None:
    issuer, jar = checker(), CookieJar(KEY)
    mac2 = with_cookie(issuer, jar)[-16:]
    foreign = issuer.create_reply(CookieJar(KEY).add_macs(b"\1" + BLANK[1:], 0), INDEX, ADDRESS, PORT, 0)
    broken = CookieReply(receiver_index=INDEX, nonce=bytes(24), encrypted_cookie=bytes(32))
    for reply in (foreign, broken):
        with pytest.raises(Refused, match=DropReason.INVALID_TAG.value):
            jar.consume_reply(reply, 0)
    assert jar.add_macs(BLANK, 0)[-16:] == mac2


@pytest.mark.requirement("CK-12")
def test_second_cookie_reply_to_same_mac1_is_refused() -> None:
    issuer, jar = checker(), CookieJar(KEY)
    reply = issuer.create_reply(jar.add_macs(BLANK, 0), INDEX, ADDRESS, PORT, 0)
    jar.consume_reply(reply, 0)
    with pytest.raises(Refused) as refusal:
        jar.consume_reply(reply, 0)
    assert refusal.value.reason is DropReason.UNEXPECTED_COOKIE


def test_mac2_covers_mac1() -> None:
    message = CookieJar(KEY).add_macs(BLANK, 0)
    changed = message[:-17] + bytes([message[-17] ^ 1]) + message[-16:]
    assert compute_mac2(message, bytes(16)) != compute_mac2(changed, bytes(16))


@pytest.mark.requirement("CR-10")
def test_mac1_key_and_cookie_key_hash_label_and_public_key() -> None:
    public = bytes(range(32))
    assert mac1_key_of(public) == blake2s(b"mac1----" + public).digest()
    assert cookie_key_of(public) == blake2s(b"cookie--" + public).digest()
