from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from refwg.allowedips import AllowedIPs, Prefix
from selftests.support.strategies import addresses, prefixes
from selftests.support.tries import nodes

OWNERS = st.sampled_from("abc")


@cache
def masked(prefix: Prefix) -> Prefix:
    width = 8 * len(prefix.address)
    bits = f"{int.from_bytes(prefix.address):0{width}b}"[: prefix.length].ljust(width, "0")
    return Prefix(int(bits, 2).to_bytes(width // 8), prefix.length)


@cache
def contains(prefix: Prefix, address: bytes) -> bool:
    return len(prefix.address) == len(address) and masked(Prefix(address, prefix.length)) == masked(prefix)


class TrieAgainstList(RuleBasedStateMachine):
    """The trie behaves like a list of prefixes that is searched from end to end."""

    @initialize()
    def begin(self) -> None:
        self.allowed: AllowedIPs[str] = AllowedIPs()
        self.entries: list[tuple[Prefix, str]] = []

    @rule(prefix=prefixes, owner=OWNERS)
    def insert(self, prefix: Prefix, owner: str) -> None:
        self.allowed.insert(prefix, owner)
        self.entries = [entry for entry in self.entries if entry[0] != masked(prefix)] + [(masked(prefix), owner)]

    @rule(prefix=prefixes, owner=OWNERS)
    def remove(self, prefix: Prefix, owner: str) -> None:
        self.allowed.remove(prefix, owner)
        self.entries = [entry for entry in self.entries if entry != (masked(prefix), owner)]

    @rule(owner=OWNERS)
    def remove_by_peer(self, owner: str) -> None:
        self.allowed.remove_by_peer(owner)
        self.entries = [entry for entry in self.entries if entry[1] != owner]

    @rule(address=addresses)
    def lookup(self, address: bytes) -> None:
        matching = [(prefix.length, owner) for prefix, owner in self.entries if contains(prefix, address)]
        assert self.allowed.lookup(address) == (max(matching)[1] if matching else None)

    @invariant()
    def lists_agree(self) -> None:
        for owner in "abc":
            expected = [prefix for prefix, holder in self.entries if holder == owner]
            assert list(self.allowed.prefixes_of(owner)) == expected

    @invariant()
    def the_trie_has_no_useless_node(self) -> None:
        owners = [node.owner for node in nodes(self.allowed)]
        branches = owners.count(None)
        assert len(owners) - branches == len(self.entries)
        assert branches <= max(0, len(self.entries) - 1)


TestTrie = pytest.mark.requirement("AIP-16", "AIP-15")(TrieAgainstList.TestCase)


@pytest.mark.requirement("AIP-16", "AIP-05")
@given(st.lists(st.tuples(prefixes, OWNERS), max_size=40), addresses)
def test_longest_prefix_containing_address_wins(entries: list[tuple[Prefix, str]], address: bytes) -> None:
    allowed: AllowedIPs[str] = AllowedIPs()
    for prefix, owner in entries:
        allowed.insert(prefix, owner)
    last = {masked(prefix): owner for prefix, owner in entries}
    matching = [(prefix.length, owner) for prefix, owner in last.items() if contains(prefix, address)]
    assert allowed.lookup(address) == (max(matching)[1] if matching else None)
