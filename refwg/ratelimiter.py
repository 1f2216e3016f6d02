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
# A token is a time: whoever waited this long may send one more message.
PACKET_COST: Final = SECOND // PACKETS_PER_SECOND
TOKEN_MAX: Final = PACKET_COST * PACKETS_BURSTABLE
MAX_ENTRIES: Final = 65536

_IPV6_PREFIX_BYTES: Final = 8


@dataclass(slots=True)
class _Bucket:
    """What an address has left, and when that was reckoned."""

    tokens: int
    last_time: int


class RateLimiter:
    """One table for all devices of a network namespace: give the same object to each of them.

    Who uses it calls `sweep` when `next_sweep` has come, so that nothing is kept of a flood that is over.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._buckets: dict[bytes, _Bucket] = {}
        self._last_sweep = 0

    def __len__(self) -> int:
        return len(self._buckets)

    def allow(self, source: bytes, now: int) -> bool:
        """Whether a message from this address (4 or 16 bytes) may pass; if so, it has paid."""
        self.sweep(now)
        # Only the first 64 bits of IPv6 count: a /64 is one household.
        key = source if len(source) == IPV4_BYTES else source[:_IPV6_PREFIX_BYTES]
        bucket = self._buckets.get(key)
        if bucket is None:
            return self._admit(key, now)
        bucket.tokens = min(TOKEN_MAX, bucket.tokens + now - bucket.last_time)
        bucket.last_time = now
        if bucket.tokens < PACKET_COST:
            return False
        bucket.tokens -= PACKET_COST
        return True

    def _admit(self, key: bytes, now: int) -> bool:
        if len(self._buckets) >= self._max_entries:
            return False
        self._buckets[key] = _Bucket(TOKEN_MAX - PACKET_COST, now)
        return True

    def next_sweep(self) -> int | None:
        """When there may be something to forget; None: nobody is known."""
        return self._last_sweep + SECOND if self._buckets else None

    def sweep(self, now: int) -> None:
        """Once a second, forget who was quiet for more than a second: the bucket is full again anyway."""
        if now - self._last_sweep < SECOND:
            return
        self._last_sweep = now
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if now - bucket.last_time <= SECOND}
