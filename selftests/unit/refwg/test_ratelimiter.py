from __future__ import annotations

from ipaddress import ip_address

import pytest

from refwg.messages import MILLISECOND, SECOND
from refwg.ratelimiter import PACKET_COST, RateLimiter

A = ip_address("10.0.0.1").packed
B = ip_address("10.0.0.2").packed


def burst(limiter: RateLimiter, source: bytes, now: int, attempts: int = 20) -> int:
    """Return the number of messages allowed, of several at the same time."""
    return sum(limiter.allow(source, now) for _ in range(attempts))


@pytest.mark.requirement("RL-01", "RL-03", "RL-10")
@pytest.mark.parametrize(
    ("pause", "allowed"),
    [(0, 0), (PACKET_COST - 1, 0), (PACKET_COST, 1), (2 * PACKET_COST, 2), (500 * MILLISECOND, 5), (999 * SECOND, 5)],
)
def test_bucket_regains_one_token_per_50_ms_up_to_five(pause: int, allowed: int) -> None:
    limiter = RateLimiter()
    assert burst(limiter, A, SECOND) == 5
    assert burst(limiter, A, SECOND + pause) == allowed


@pytest.mark.requirement("RL-04")
def test_sources_have_separate_token_buckets() -> None:
    limiter = RateLimiter()
    burst(limiter, A, 0)
    assert burst(limiter, B, 0) == 5


@pytest.mark.requirement("RL-05")
@pytest.mark.parametrize(("other", "allowed"), [("fd00::2", 0), ("fd00:0:0:1::1", 5)])
def test_ipv6_sources_in_same_64_prefix_share_bucket(other: str, allowed: int) -> None:
    limiter = RateLimiter()
    burst(limiter, ip_address("fd00::1").packed, 0)
    assert burst(limiter, ip_address(other).packed, 0) == allowed


@pytest.mark.requirement("RL-08")
def test_full_table_refuses_new_source_and_allows_known_one() -> None:
    limiter = RateLimiter(max_entries=2)
    assert [limiter.allow(bytes([10, 0, 0, host]), 0) for host in (1, 2, 3, 1)] == [True, True, False, True]


@pytest.mark.requirement("RL-09")
@pytest.mark.parametrize(("pause", "is_allowed"), [(SECOND // 2, False), (SECOND, False), (SECOND + 1, True)])
def test_entry_idle_for_over_one_second_is_removed(pause: int, is_allowed: bool) -> None:
    limiter = RateLimiter(max_entries=1)
    assert limiter.allow(A, SECOND)
    assert limiter.allow(B, SECOND + pause) is is_allowed


@pytest.mark.requirement("RL-09")
@pytest.mark.parametrize(("now", "is_allowed"), [(19, False), (20, True)])
def test_table_is_swept_once_per_second(now: int, is_allowed: bool) -> None:
    limiter, tenth = RateLimiter(max_entries=1), SECOND // 10
    assert limiter.allow(A, 10 * tenth - tenth * 2)
    assert not limiter.allow(B, 10 * tenth)
    assert limiter.allow(B, now * tenth) is is_allowed


@pytest.mark.requirement("RL-09")
def test_sweep_is_scheduled_only_while_table_has_entries() -> None:
    limiter = RateLimiter()
    assert limiter.next_sweep() is None
    limiter.allow(A, 5 * SECOND)
    assert (limiter.next_sweep(), len(limiter)) == (6 * SECOND, 1)
    limiter.sweep(6 * SECOND)
    assert (limiter.next_sweep(), len(limiter)) == (7 * SECOND, 1)
    limiter.sweep(7 * SECOND)
    assert (limiter.next_sweep(), len(limiter)) == (None, 0)


def test_rate_limiters_have_separate_tables() -> None:
    first, second = RateLimiter(), RateLimiter()
    burst(first, A, 0)
    assert burst(second, A, 0) == 5
