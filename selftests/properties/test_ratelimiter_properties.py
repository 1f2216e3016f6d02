"""Check the rate limiter against exact token buckets that are never forgotten."""

from __future__ import annotations

from fractions import Fraction
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refwg.messages import MILLISECOND, SECOND
from refwg.ratelimiter import RateLimiter

# Two IPv4 hosts, and IPv6 hosts of which two share a /64.
SOURCES = [ip_address(text) for text in ("10.0.0.1", "10.0.0.2", "fd00::1", "fd00::ffff:0:0:1", "fd00:0:0:1::1")]
# Times around the refill of one token, and around 1 s, after which a source is forgotten.
PAUSES = [0, 1, 50 * MILLISECOND - 1, 50 * MILLISECOND, 100 * MILLISECOND, 250 * MILLISECOND, SECOND, SECOND + 1]
pauses = st.one_of(st.sampled_from(PAUSES), st.integers(0, 3 * SECOND))
attempts = st.lists(st.tuples(st.sampled_from(SOURCES), pauses, st.integers(1, 8)), max_size=40)


class TokenBuckets:
    """Five messages at once and twenty a second, for each IPv4 address and each IPv6 /64."""

    def __init__(self) -> None:
        self._buckets: dict[object, tuple[Fraction, int]] = {}

    @staticmethod
    def owner(source: Any) -> object:
        return source if source.version == 4 else ip_network((source, 64), strict=False)

    def allow(self, source: Any, now: int) -> bool:
        tokens, last = self._buckets.get(self.owner(source), (Fraction(5), now))
        tokens = min(Fraction(5), tokens + Fraction(20 * (now - last), SECOND))
        is_allowed = tokens >= 1
        self._buckets[self.owner(source)] = (tokens - is_allowed, now)
        return is_allowed


@pytest.mark.requirement("RL-01", "RL-05", "RL-09")
@given(st.integers(0, 10 * SECOND), attempts)
def test_limiter_allows_exactly_what_token_buckets_allow(start: int, attempts: list[tuple[Any, int, int]]) -> None:
    limiter, buckets, now = RateLimiter(), TokenBuckets(), start
    for source, pause, messages in attempts:
        now += pause
        for _ in range(messages):
            assert limiter.allow(source.packed, now) is buckets.allow(source, now)


@pytest.mark.requirement("RL-08", "RL-09")
@given(st.integers(1, 3), attempts)
def test_full_table_admits_new_source_only_when_one_is_forgotten(
    max_entries: int, attempts: list[tuple[Any, int, int]]
) -> None:
    limiter, now = RateLimiter(max_entries), 0
    last_attempt: dict[object, int] = {}
    for source, pause, _ in attempts:
        now += pause
        owner = TokenBuckets.owner(source)
        is_allowed = limiter.allow(source.packed, now)
        recent = {known for known, time in last_attempt.items() if now - time <= SECOND}
        # After two idle seconds a source has been swept; after one it may have been.
        possible = {known for known, time in last_attempt.items() if now - time < 2 * SECOND}
        if owner not in possible and len(possible) < max_entries:
            assert is_allowed
        if owner not in possible and len(recent) >= max_entries:
            assert not is_allowed
        if is_allowed or owner in recent:
            last_attempt[owner] = now
        assert len(recent) <= len(limiter) <= max_entries


@pytest.mark.requirement("RL-09")
@given(attempts)
def test_sweeping_in_time_forgets_all_sources_of_past_flood(attempts: list[tuple[Any, int, int]]) -> None:
    limiter, now = RateLimiter(), 0
    for source, pause, _ in attempts:
        now += pause
        limiter.allow(source.packed, now)
    end = now
    while (deadline := limiter.next_sweep()) is not None:
        # Two sweeps, one second apart, are enough.
        assert now <= end + 2 * SECOND
        now = max(now, deadline)
        limiter.sweep(now)
    assert len(limiter) == 0
