"""Look up a peer by public key, and a session or handshake by its 32-bit index.

Mirrors peerlookup.c of the driver; section 5.4.2 of the paper. Both are generic, so they need to know no peer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

INDEX_LENGTH: Final = 4


class KeyTable(Generic[T]):
    """Entries by public key, in the order in which they were added."""

    def __init__(self) -> None:
        self._entries: dict[bytes, T] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        """Go over a copy, because whoever walks the table may well remove from it."""
        return iter(list(self._entries.values()))

    def add(self, public_key: bytes, entry: T) -> None:
        self._entries[public_key] = entry

    def lookup(self, public_key: bytes) -> T | None:
        return self._entries.get(public_key)

    def remove(self, public_key: bytes) -> None:
        del self._entries[public_key]


class IndexTable(Generic[T]):
    """Entries by index. Indices are random, so that they tell nothing, and unique among those in use."""

    def __init__(self) -> None:
        self._entries: dict[int, T] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def insert(self, entry: T, random_bytes: Callable[[int], bytes]) -> int:
        """Enter something under a new random index and return the index."""
        index = int.from_bytes(random_bytes(INDEX_LENGTH), "little")
        while index in self._entries:
            index = int.from_bytes(random_bytes(INDEX_LENGTH), "little")
        self._entries[index] = entry
        return index

    def replace(self, index: int, entry: T) -> None:
        """What the index named becomes something else: a handshake turns into its session."""
        self._entries[index] = entry

    def lookup(self, index: int) -> T | None:
        return self._entries.get(index)

    def remove(self, index: int) -> None:
        """Forget an index; one that is not in use is no error."""
        self._entries.pop(index, None)
