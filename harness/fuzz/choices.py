"""Make the choices of a generator, from a seed or from bytes.

A coverage-guided fuzzer changes the bytes, and so the choices.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")


class Chooser(Protocol):
    """What a generator draws from."""

    def below(self, limit: int) -> int:
        """Return an integer from 0 to `limit` - 1."""

    def content(self, length: int) -> bytes:
        """Return bytes without a meaning."""


class Seeded:
    """Chooses by a random generator. seed: the same one makes the same choices, in every run."""

    def __init__(self, seed: str) -> None:
        self._random = Random(seed)  # noqa: S311 - not a secret

    def below(self, limit: int) -> int:
        """Return an integer from 0 to `limit` - 1."""
        return self._random.randrange(limit)

    def content(self, length: int) -> bytes:
        """Return random bytes."""
        return self._random.randbytes(length)


class Guided:
    """Chooses by bytes: a choice takes as many as it needs, and is 0 when there are none left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, limit: int) -> int:
        """Return an integer from 0 to `limit` - 1."""
        size = ((limit - 1).bit_length() + 7) // 8
        return int.from_bytes(self._take(size)) % limit

    def content(self, length: int) -> bytes:
        """Return bytes that repeat a few of the given ones, so that long contents do not use them up."""
        taken = self._take(min(length, 4)) or bytes(1)
        return (taken * (length // len(taken) + 1))[:length]

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken


def pick(choose: Chooser, items: Sequence[T]) -> T:
    """Return one of the items, each as likely as any other."""
    return items[choose.below(len(items))]


def weighted(choose: Chooser, table: Sequence[tuple[int, T]]) -> T:
    """Return one of the items of (weight, item), as likely as its weight."""
    left = choose.below(sum(weight for weight, _ in table))
    for weight, item in table:
        if left < weight:
            return item
        left -= weight
    raise AssertionError("the weights have no sum")  # pragma: no cover - below() keeps its limit
