"""Find the peer that owns an address: two compressed binary tries, for IPv4 and IPv6.

Mirrors allowedips.c of the driver; section 2 of the paper. A node stands for a prefix. It has an owner, or two
children, or both; a node that loses its owner and has fewer than two children is taken out, so that the depth never
exceeds the number of prefixes that contain an address.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from refwg.ip import IPV4_BYTES, IPV6_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

Owner = TypeVar("Owner")


class Prefix(NamedTuple):
    """A network: the address in network order with its host bits cleared, and the length. A tuple: there are many."""

    address: bytes
    length: int

    def __str__(self) -> str:
        address = IPv4Address(self.address) if len(self.address) == IPV4_BYTES else IPv6Address(self.address)
        return f"{address}/{self.length}"


@dataclass(slots=True, eq=False)
class Node(Generic[Owner]):
    """A prefix in the trie. The child at 0 continues with bit 0 after the prefix, the child at 1 with bit 1."""

    bits: int
    length: int
    owner: Owner | None = None
    children: list[Node[Owner] | None] = field(default_factory=lambda: [None, None])


class Trie(Generic[Owner]):
    """The tree of one address family, over addresses as integers of `width` bits."""

    __slots__ = ("_width", "root")

    def __init__(self, width: int) -> None:
        self._width = width
        self.root: Node[Owner] | None = None

    def lookup(self, address: int) -> Owner | None:
        """Owner of the longest prefix that contains the address."""
        found: Owner | None = None
        node, width = self.root, self._width
        while node is not None and (address ^ node.bits) >> (width - node.length) == 0:
            if node.owner is not None:
                found = node.owner
            if node.length == width:
                break
            node = node.children[address >> (width - node.length - 1) & 1]
        return found

    def insert(self, bits: int, length: int, owner: Owner) -> Owner | None:
        """Give the prefix to `owner`; returns who had it before."""
        parent, node = self._find(bits, length)
        if node is not None and node.length == length and node.bits == bits:
            previous, node.owner = node.owner, owner
            return previous
        fresh = Node(bits, length, owner)
        if node is None:
            self._attach(parent, fresh)
            return None
        common = min(length, node.length, self._common_length(bits, node.bits))
        if common == length:
            self._attach(parent, fresh)
            self._attach(fresh, node)
            return None
        fork: Node[Owner] = Node(self._masked(bits, common), common)
        self._attach(parent, fork)
        self._attach(fork, node)
        self._attach(fork, fresh)
        return None

    def remove(self, bits: int, length: int) -> None:
        """Take away the owner of a prefix that has one, and every node that is of no more use."""
        path = self._path(bits, length)
        path[-1].owner = None
        while path and path[-1].owner is None and None in path[-1].children:
            node = path.pop()
            only_child = node.children[0] or node.children[1]
            if path:
                path[-1].children[self._side(path[-1], node.bits)] = only_child
            else:
                self.root = only_child

    def _find(self, bits: int, length: int) -> tuple[Node[Owner] | None, Node[Owner] | None]:
        """Last node that contains the prefix and is shorter, and what is below it on the way to the prefix."""
        parent, node, width = None, self.root, self._width
        while node is not None and node.length < length and (bits ^ node.bits) >> (width - node.length) == 0:
            parent, node = node, node.children[bits >> (width - node.length - 1) & 1]
        return parent, node

    def _path(self, bits: int, length: int) -> list[Node[Owner]]:
        path: list[Node[Owner]] = []
        node = self.root
        while node is not None:
            path.append(node)
            node = node.children[self._side(node, bits)] if node.length < length else None
        return path

    def _attach(self, parent: Node[Owner] | None, node: Node[Owner]) -> None:
        if parent is None:
            self.root = node
        else:
            parent.children[self._side(parent, node.bits)] = node

    def _side(self, parent: Node[Owner], bits: int) -> int:
        return bits >> (self._width - parent.length - 1) & 1

    def _masked(self, bits: int, length: int) -> int:
        return bits >> (self._width - length) << (self._width - length)

    def _common_length(self, left: int, right: int) -> int:
        return self._width - (left ^ right).bit_length()


class AllowedIPs(Generic[Owner]):
    """Both tries, and for each owner its prefixes in the order in which they were added."""

    def __init__(self) -> None:
        self._v4: Trie[Owner] = Trie(8 * IPV4_BYTES)
        self._v6: Trie[Owner] = Trie(8 * IPV6_BYTES)
        self._lists: dict[Owner, dict[Prefix, None]] = {}

    def lookup(self, address: bytes) -> Owner | None:
        """Who owns an address of 4 or 16 bytes; the question of every packet in both directions."""
        trie = self._v4 if len(address) == IPV4_BYTES else self._v6
        return trie.lookup(int.from_bytes(address))

    def insert(self, prefix: Prefix, owner: Owner) -> None:
        """Give a prefix to `owner`, whoever had it; it becomes the last of the owner's list even if it was there."""
        prefix = _masked(prefix)
        previous = self._trie(prefix).insert(int.from_bytes(prefix.address), prefix.length, owner)
        if previous is not None:
            del self._lists[previous][prefix]
        self._lists.setdefault(owner, {})[prefix] = None

    def remove(self, prefix: Prefix, owner: Owner) -> None:
        """Take exactly this prefix from `owner`; nothing happens if it is not the owner's."""
        prefix = _masked(prefix)
        if prefix in self._lists.get(owner, ()):
            del self._lists[owner][prefix]
            self._trie(prefix).remove(int.from_bytes(prefix.address), prefix.length)

    def remove_by_peer(self, owner: Owner) -> None:
        for prefix in self._lists.pop(owner, ()):
            self._trie(prefix).remove(int.from_bytes(prefix.address), prefix.length)

    def prefixes_of(self, owner: Owner) -> Iterator[Prefix]:
        yield from self._lists.get(owner, ())

    def _trie(self, prefix: Prefix) -> Trie[Owner]:
        return self._v4 if len(prefix.address) == IPV4_BYTES else self._v6


def _masked(prefix: Prefix) -> Prefix:
    width = len(prefix.address) * 8
    if not 0 <= prefix.length <= width:
        raise ValueError(f"prefix length {prefix.length}: 0 to {width} is possible")
    host_bits = width - prefix.length
    network = int.from_bytes(prefix.address) >> host_bits << host_bits
    return Prefix(network.to_bytes(len(prefix.address)), prefix.length)
