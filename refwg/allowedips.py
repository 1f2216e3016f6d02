"""Find the peer that owns an address: two compressed binary tries, for IPv4 and IPv6.

Mirrors allowedips.c of the driver; section 2 of the paper. A node stands for a prefix. Each node has an owner, or two
children, or both. A node that loses its owner and has fewer than two children is removed, so the trie has fewer than
two nodes per prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from refwg.errors import InvalidArgument
from refwg.ip import IPV4_BYTES, IPV6_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

Owner = TypeVar("Owner")


class Prefix(NamedTuple):
    """A network: the address in network order, host bits cleared, and the length in bits.

    A tuple, because a device may have 100 000 of them.
    """

    address: bytes
    length: int

    def __str__(self) -> str:
        address = IPv4Address(self.address) if len(self.address) == IPV4_BYTES else IPv6Address(self.address)
        return f"{address}/{self.length}"


@dataclass(slots=True, eq=False)
class Node(Generic[Owner]):
    """A prefix in the trie; child 0 holds longer prefixes whose next bit is 0, child 1 those whose next bit is 1."""

    bits: int
    length: int
    owner: Owner | None = None
    children: list[Node[Owner] | None] = field(default_factory=lambda: [None, None])


class Trie(Generic[Owner]):
    """The trie of one address family; addresses are integers of `width` bits (32 or 128)."""

    __slots__ = ("_width", "root")

    def __init__(self, width: int) -> None:
        self._width = width
        self.root: Node[Owner] | None = None

    def lookup(self, address: int) -> Owner | None:
        """Return the owner of the longest prefix that contains the address, None if no prefix does."""
        owner: Owner | None = None
        node, width = self.root, self._width
        while node is not None and (address ^ node.bits) >> (width - node.length) == 0:
            if node.owner is not None:
                owner = node.owner
            if node.length == width:
                break
            node = node.children[address >> (width - node.length - 1) & 1]
        return owner

    def insert(self, bits: int, length: int, owner: Owner) -> Owner | None:
        """Give the prefix to `owner`; returns the previous owner, None if the prefix is new."""
        parent, node = self._find(bits, length)
        if node is not None and node.length == length and node.bits == bits:
            previous, node.owner = node.owner, owner
            return previous
        leaf = Node(bits, length, owner)
        if node is None:
            self._attach(parent, leaf)
            return None
        common = min(length, node.length, self._common_length(bits, node.bits))
        if common == length:
            self._attach(parent, leaf)
            self._attach(leaf, node)
            return None
        fork: Node[Owner] = Node(self._masked(bits, common), common)
        self._attach(parent, fork)
        self._attach(fork, node)
        self._attach(fork, leaf)
        return None

    def remove(self, bits: int, length: int) -> None:
        """Remove the owner of a prefix that is in the trie, and every node that is no longer needed."""
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
        """Return the longest node that is shorter than the prefix and contains it, and its child on the same path."""
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
    """Both tries, and the prefixes of each owner in insertion order."""

    def __init__(self) -> None:
        self._v4: Trie[Owner] = Trie(8 * IPV4_BYTES)
        self._v6: Trie[Owner] = Trie(8 * IPV6_BYTES)
        self._lists: dict[Owner, dict[Prefix, None]] = {}

    def lookup(self, address: bytes) -> Owner | None:
        """Return the owner of an address of 4 or 16 bytes; called for every packet in both directions."""
        trie = self._v4 if len(address) == IPV4_BYTES else self._v6
        return trie.lookup(int.from_bytes(address))

    def insert(self, prefix: Prefix, owner: Owner) -> None:
        """Give a prefix to `owner`, even if another owner has it; moves it to the end of the owner's list.

        Raises InvalidArgument if the length is negative or exceeds the address.
        """
        prefix = _masked(prefix)
        previous = self._trie(prefix).insert(int.from_bytes(prefix.address), prefix.length, owner)
        if previous is not None:
            del self._lists[previous][prefix]
        self._lists.setdefault(owner, {})[prefix] = None

    def remove(self, prefix: Prefix, owner: Owner) -> None:
        """Remove exactly this prefix from `owner`; does nothing if `owner` does not have it."""
        prefix = _masked(prefix)
        if prefix in self._lists.get(owner, ()):
            del self._lists[owner][prefix]
            self._trie(prefix).remove(int.from_bytes(prefix.address), prefix.length)

    def remove_by_peer(self, owner: Owner) -> None:
        """Remove all prefixes of `owner` (`wg_allowedips_remove_by_peer`)."""
        for prefix in self._lists.pop(owner, ()):
            self._trie(prefix).remove(int.from_bytes(prefix.address), prefix.length)

    def prefixes_of(self, owner: Owner) -> Iterator[Prefix]:
        """Yield the prefixes of `owner` in the order of their last insertion, as `wg show` prints them."""
        yield from self._lists.get(owner, ())

    def _trie(self, prefix: Prefix) -> Trie[Owner]:
        return self._v4 if len(prefix.address) == IPV4_BYTES else self._v6


def _masked(prefix: Prefix) -> Prefix:
    width = len(prefix.address) * 8
    if not 0 <= prefix.length <= width:
        raise InvalidArgument(f"prefix length {prefix.length}: expected 0 to {width}")
    host_bits = width - prefix.length
    network = int.from_bytes(prefix.address) >> host_bits << host_bits
    return Prefix(network.to_bytes(len(prefix.address)), prefix.length)
