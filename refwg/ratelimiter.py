"""Limit handshakes by a token bucket per source address; used only under load, after mac2.

Mirrors ratelimiter.c of the driver; section 5.3 of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from refwg.ip import IPV4_BYTES
from refwg.messages import SECOND

PACKETS_PER_SECOND: Final = 20
PACKETS_BURSTABLE: Final = 5
# Tokens are nanoseconds: one message costs 50 ms, and a source earns 1 ns per ns.
PACKET_COST: Final = SECOND // PACKETS_PER_SECOND
TOKEN_MAX: Final = PACKET_COST * PACKETS_BURSTABLE
MAX_ENTRIES: Final = 65536

_IPV6_PREFIX_BYTES: Final = 8


@dataclass(slots=True)
class _Bucket:
    """The tokens of one source address, in nanoseconds, and the time at which they were computed."""

    tokens: int
    last_time: int


class RateLimiter:
    """Token buckets by source address; all devices of a network namespace share one object.

    Call `sweep` at `next_sweep`, so that the entries of a flood do not stay after it.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._buckets: dict[bytes, _Bucket] = {}
        self._last_sweep = 0

    def __len__(self) -> int:
        return len(self._buckets)

    def allow(self, source: bytes, now: int) -> bool:
        """Return True and take a token if a message from this address (4 or 16 bytes) may be processed."""
        self.sweep(now)
        # wg_ratelimiter_allow: all IPv6 addresses of a /64 share a bucket, because one subscriber has a whole /64
        key = source if len(source) == IPV4_BYTES else source[:_IPV6_PREFIX_BYTES]
        bucket = self._buckets.get(key)
        if bucket is None:
            return self._admit(key, now)
        # wg_ratelimiter_allow: 20 messages a second, and 5 at once
        bucket.tokens = min(TOKEN_MAX, bucket.tokens + now - bucket.last_time)
        bucket.last_time = now
        if bucket.tokens < PACKET_COST:
            return False
        bucket.tokens -= PACKET_COST
        return True

    def _admit(self, key: bytes, now: int) -> bool:
        # wg_ratelimiter_allow: a full table refuses new sources, so its memory is bounded
        if len(self._buckets) >= self._max_entries:
            return False
        self._buckets[key] = _Bucket(TOKEN_MAX - PACKET_COST, now)
        return True

    def next_sweep(self) -> int | None:
        """Return when `sweep` must be called, in nanoseconds; None: the table is empty."""
        return self._last_sweep + SECOND if self._buckets else None

    def sweep(self, now: int) -> None:
        """Remove the addresses that sent nothing for more than a second; does nothing if called within a second.

        Such a bucket is full again, so nothing is lost.
        """
        # wg_ratelimiter_gc_entries: once a second
        if now - self._last_sweep < SECOND:
            return
        self._last_sweep = now
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if now - bucket.last_time <= SECOND}
