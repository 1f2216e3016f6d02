"""Check that mac1, mac2 and cookies are valid for their message, source and time only."""

from __future__ import annotations

from hashlib import blake2s
from itertools import count, pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refwg.cookie import CookieChecker, CookieJar, MacState
from refwg.errors import Refused
from refwg.messages import COOKIE_SECRET_LATENCY, COOKIE_SECRET_MAX_AGE, SECOND, CookieReply
from selftests.support.strategies import exactly, flip, keys

if TYPE_CHECKING:
    from collections.abc import Callable

INDEX = 7
# The last 32 bytes are the place of both macs.
unsigned_messages = st.one_of(exactly(148), exactly(92), st.binary(min_size=32, max_size=200))
sources = st.tuples(st.one_of(exactly(4), exactly(16)), st.integers(0, 65535))
# Times around 115 s, for which a cookie is used, and 120 s, for which its secret is used.
SPANS = [0, 1, SECOND, 5 * SECOND, 115 * SECOND - 1, 115 * SECOND, 120 * SECOND - 1, 120 * SECOND, 300 * SECOND]
spans = st.one_of(st.sampled_from(SPANS), st.integers(0, 400 * SECOND))


# The first bytes of `numbered_bytes`.
FIRST_SECRET = (1).to_bytes(32)


def numbered_bytes() -> Callable[[int], bytes]:
    """A source of random bytes that never returns the same bytes twice."""
    numbers = count(1)
    return lambda length: next(numbers).to_bytes(length)


def checker_of(public_key: bytes, now: int = 0) -> CookieChecker:
    checker = CookieChecker(numbered_bytes(), now)
    checker.set_public_key(public_key)
    return checker


def state_of(checker: CookieChecker, message: bytes, source: tuple[bytes, int], now: int = 0) -> MacState:
    """The state of a message under load when no source is limited."""
    return checker.validate(message, *source, now=now, allow=lambda _address, _now: True)


def rejected_and_answered(
    checker: CookieChecker, jar: CookieJar, message: bytes, source: tuple[bytes, int], now: int = 0
) -> CookieReply:
    """The cookie reply to a message without a cookie."""
    rejected = jar.add_macs(message, now)
    assert state_of(checker, rejected, source, now) is MacState.VALID_MAC_BUT_NO_COOKIE
    return checker.create_reply(rejected, INDEX, *source, now)


@pytest.mark.requirement("HS-04", "CK-01", "CK-02")
@given(keys, unsigned_messages)
def test_mac1_is_mac_of_all_bytes_before_it(public_key: bytes, message: bytes) -> None:
    key = blake2s(b"mac1----" + public_key).digest()
    mac1 = blake2s(message[:-32], key=key, digest_size=16).digest()
    assert CookieJar(public_key).add_macs(message, 0) == message[:-32] + mac1 + bytes(16)


@pytest.mark.requirement("HS-04", "CK-01")
@given(keys, unsigned_messages, sources, st.data())
def test_mac1_is_invalid_when_any_bit_before_its_end_is_flipped(
    public_key: bytes, message: bytes, source: tuple[bytes, int], data: st.DataObject
) -> None:
    checker, sent = checker_of(public_key), CookieJar(public_key).add_macs(message, 0)
    assert state_of(checker, sent, source) is MacState.VALID_MAC_BUT_NO_COOKIE
    bit = data.draw(st.integers(0, 8 * (len(sent) - 16) - 1))
    assert state_of(checker, flip(sent, bit), source) is MacState.INVALID_MAC
    assert state_of(checker_of(flip(public_key, bit % 256)), sent, source) is MacState.INVALID_MAC


@pytest.mark.requirement("CK-03", "CK-05", "CK-06")
@given(keys, st.tuples(unsigned_messages, unsigned_messages), sources, sources, st.integers(0, 127))
def test_mac2_is_valid_for_message_and_source_of_cookie_only(
    public_key: bytes, messages: tuple[bytes, bytes], source: tuple[bytes, int], other: tuple[bytes, int], bit: int
) -> None:
    checker, jar = checker_of(public_key), CookieJar(public_key)
    jar.consume_reply(rejected_and_answered(checker, jar, messages[0], source), 0)
    sent = jar.add_macs(messages[1], 0)
    cookie = blake2s(source[0] + source[1].to_bytes(2), key=FIRST_SECRET, digest_size=16).digest()
    assert sent[-16:] == blake2s(sent[:-16], key=cookie, digest_size=16).digest()
    assert state_of(checker, sent, source) is MacState.VALID_MAC_WITH_COOKIE
    assert state_of(checker, flip(sent, 8 * (len(sent) - 16) + bit), source) is MacState.VALID_MAC_BUT_NO_COOKIE
    if other != source:
        assert state_of(checker, sent, other) is MacState.VALID_MAC_BUT_NO_COOKIE


@pytest.mark.requirement("CK-04", "CK-11")
@given(keys, unsigned_messages, sources, st.data())
def test_cookie_reply_with_any_bit_flipped_is_refused(
    public_key: bytes, message: bytes, source: tuple[bytes, int], data: st.DataObject
) -> None:
    checker, jar = checker_of(public_key), CookieJar(public_key)
    reply = rejected_and_answered(checker, jar, message, source)
    # Not in the type or the receiver index: both are checked before the tag.
    forged = flip(reply.to_bytes(), data.draw(st.integers(8 * 8, 8 * 64 - 1)))
    with pytest.raises(Refused, match="tag"):
        jar.consume_reply(CookieReply.parse(forged), 0)
    # The jar still has the mac1, so it accepts the genuine reply after the refused one.
    jar.consume_reply(reply, 0)
    assert state_of(checker, jar.add_macs(message, 0), source) is MacState.VALID_MAC_WITH_COOKIE


@pytest.mark.requirement("CK-07", "CK-08", "CK-09")
@given(keys, unsigned_messages, sources, spans, spans)
def test_cookie_expires_by_age_of_secret_and_of_itself(
    public_key: bytes, message: bytes, source: tuple[bytes, int], issued: int, age: int
) -> None:
    checker, jar = checker_of(public_key), CookieJar(public_key)
    jar.consume_reply(rejected_and_answered(checker, jar, message, source, issued), issued)
    sent = jar.add_macs(message, issued + age)
    assert any(sent[-16:]) is (age < COOKIE_SECRET_MAX_AGE - COOKIE_SECRET_LATENCY)
    # The checker's secret is as old as the checker, or was replaced at its first use after 120 seconds.
    birth = issued if issued >= COOKIE_SECRET_MAX_AGE else 0
    is_valid = any(sent[-16:]) and issued + age < birth + COOKIE_SECRET_MAX_AGE
    expected = MacState.VALID_MAC_WITH_COOKIE if is_valid else MacState.VALID_MAC_BUT_NO_COOKIE
    assert state_of(checker, sent, source, issued + age) is expected


@settings(max_examples=40)
@pytest.mark.requirement("CK-05", "CK-07", "CK-15")
@given(keys, sources, st.lists(spans, min_size=1, max_size=12))
def test_cookie_changes_with_secret_and_no_secret_is_used_120_s(
    public_key: bytes, source: tuple[bytes, int], pauses: list[int]
) -> None:
    """Each jar gets one reply; mac2 of a fixed message differs if the cookie has changed."""
    checker, now = checker_of(public_key), 0
    issued: list[tuple[bytes, int]] = []
    replies: set[bytes] = set()
    for pause in pauses:
        now += pause
        jar = CookieJar(public_key)
        reply = rejected_and_answered(checker, jar, bytes(148), source, now)
        jar.consume_reply(reply, now)
        issued.append((jar.add_macs(bytes(148), now)[-16:], now))
        replies |= {reply.nonce, reply.encrypted_cookie}
    assert len(replies) == 2 * len(pauses)
    for mac2 in {mac2 for mac2, _ in issued}:
        times = [time for other, time in issued if other == mac2]
        assert max(times) - min(times) < COOKIE_SECRET_MAX_AGE
        # A secret that was replaced is not used again.
        assert [time for _, time in issued if min(times) <= time <= max(times)] == times
    # A secret lives for 120 seconds or longer; only the first may be older than its first use here.
    firsts = sorted({min(time for other, time in issued if other == mac2) for mac2, _ in issued})
    assert all(later - earlier >= COOKIE_SECRET_MAX_AGE for earlier, later in pairwise(firsts[1:]))
