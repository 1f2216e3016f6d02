"""List the nodes of the allowed-ips tries, with those that a lookup does not need."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from refwg.allowedips import Prefix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refwg.allowedips import AllowedIPs, Node


class TrieNode(NamedTuple):
    """A node with its depth below the root; owner None: a branch."""

    depth: int
    prefix: str
    owner: str | None


def nodes(allowed: AllowedIPs[str]) -> list[TrieNode]:
    """All nodes, IPv4 first, each parent before its children."""
    v4, v6 = allowed._v4, allowed._v6  # noqa: SLF001 - only tests want to see the tries
    return [*_below(v4.root, 4, 0), *_below(v6.root, 16, 0)]


def _below(node: Node[str] | None, length: int, depth: int) -> Iterator[TrieNode]:
    if node is not None:
        yield TrieNode(depth, str(Prefix(node.bits.to_bytes(length), node.length)), node.owner)
        for child in node.children:
            yield from _below(child, length, depth + 1)
