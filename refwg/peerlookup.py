"""Look up a peer by public key, and a session or handshake by its 32-bit index.

Mirrors peerlookup.c of the driver; section 5.4.2 of the paper. Both tables are generic, so this file does not import
`Peer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

INDEX_LENGTH: Final = 4


class KeyTable(Generic[T]):
    """Entries by public key; iteration is in insertion order."""

    def __init__(self) -> None:
        self._entries: dict[bytes, T] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        """Iterate over a copy, so that the caller may remove entries."""
        return iter(list(self._entries.values()))

    def add(self, public_key: bytes, entry: T) -> None:
        """Add an entry under a public key of 32 bytes; replaces an entry with the same key."""
        self._entries[public_key] = entry

    def lookup(self, public_key: bytes) -> T | None:
        """Return the entry with this public key, None if there is none."""
        return self._entries.get(public_key)

    def remove(self, public_key: bytes) -> None:
        """Remove the entry with this public key; raises KeyError if there is none."""
        del self._entries[public_key]


class IndexTable(Generic[T]):
    """Entries by 32-bit index; indices are unique, and random so that they leak nothing about the device."""

    def __init__(self) -> None:
        self._entries: dict[int, T] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def insert(self, entry: T, random_bytes: Callable[[int], bytes]) -> int:
        """Add an entry under a new random index and return the index; random_bytes: the source of the index."""
        # wg_index_hashtable_insert: an index in use is drawn again
        index = int.from_bytes(random_bytes(INDEX_LENGTH), "little")
        while index in self._entries:
            index = int.from_bytes(random_bytes(INDEX_LENGTH), "little")
        self._entries[index] = entry
        return index

    def replace(self, index: int, entry: T) -> None:
        """Replace the entry of an index, which a session takes over from its handshake (5.4.2)."""
        self._entries[index] = entry

    def lookup(self, index: int) -> T | None:
        """Return the entry with this index, None if the index is not in use."""
        return self._entries.get(index)

    def remove(self, index: int) -> None:
        """Free an index; does nothing if it is not in use."""
        self._entries.pop(index, None)
