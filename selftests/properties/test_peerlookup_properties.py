"""Check the tables of peers and indices against lists of pairs."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from refwg.peerlookup import IndexTable, KeyTable

# Few keys and indices, so that they collide. `unused`: so many indices that a test cannot use all of them.
KEYS = st.sampled_from([bytes([number]) * 32 for number in range(4)])
entries = st.integers()
indices = st.integers(0, 5)
unused = st.integers(1000, 2**32 - 1)


class KeyTableAgainstList(RuleBasedStateMachine):
    """Entries stay in the order in which their keys were first added."""

    @initialize()
    def begin(self) -> None:
        self.table: KeyTable[int] = KeyTable()
        self.pairs: list[tuple[bytes, int]] = []

    @rule(key=KEYS, entry=entries)
    def add(self, key: bytes, entry: int) -> None:
        self.table.add(key, entry)
        if any(known == key for known, _ in self.pairs):
            self.pairs = [(known, entry if known == key else old) for known, old in self.pairs]
        else:
            self.pairs.append((key, entry))

    @rule(key=KEYS)
    def remove(self, key: bytes) -> None:
        if any(known == key for known, _ in self.pairs):
            self.table.remove(key)
            self.pairs = [pair for pair in self.pairs if pair[0] != key]

    @rule()
    def remove_each_while_iterating(self) -> None:
        keys = iter([key for key, _ in self.pairs])
        for _ in self.table:
            self.table.remove(next(keys))
        assert next(keys, None) is None
        self.pairs = []

    @rule(key=KEYS)
    def lookup(self, key: bytes) -> None:
        assert self.table.lookup(key) == next((entry for known, entry in self.pairs if known == key), None)

    @invariant()
    def entries_agree(self) -> None:
        assert list(self.table) == [entry for _, entry in self.pairs]
        assert len(self.table) == len(self.pairs)


class IndexTableAgainstList(RuleBasedStateMachine):
    """An index names one entry from its insertion to its removal."""

    @initialize()
    def begin(self) -> None:
        self.table: IndexTable[int] = IndexTable()
        self.pairs: list[tuple[int, int]] = []

    def used(self) -> list[int]:
        return [index for index, _ in self.pairs]

    @rule(draws=st.lists(indices, max_size=8), last=unused, entry=entries)
    def insert(self, draws: list[int], last: int, entry: int) -> None:
        if last in self.used():
            return
        expected = next(index for index in [*draws, last] if index not in self.used())
        draw = iter([*draws, last])
        assert self.table.insert(entry, lambda length: next(draw).to_bytes(length, "little")) == expected
        self.pairs.append((expected, entry))

    @rule(entry=entries, place=st.integers(0, 100))
    def replace(self, entry: int, place: int) -> None:
        if self.pairs:
            index, _ = self.pairs.pop(place % len(self.pairs))
            self.table.replace(index, entry)
            self.pairs.append((index, entry))

    @rule(index=st.one_of(indices, unused))
    def remove(self, index: int) -> None:
        self.table.remove(index)
        self.pairs = [pair for pair in self.pairs if pair[0] != index]

    @rule(index=st.one_of(indices, unused))
    def lookup(self, index: int) -> None:
        assert self.table.lookup(index) == next((entry for known, entry in self.pairs if known == index), None)

    @invariant()
    def all_indices_in_use_name_their_entries(self) -> None:
        assert len(self.table) == len(self.pairs)
        assert [self.table.lookup(index) for index in self.used()] == [entry for _, entry in self.pairs]


for machine in (KeyTableAgainstList, IndexTableAgainstList):
    machine.TestCase.settings = settings(max_examples=30, stateful_step_count=20)
TestKeyTable = pytest.mark.requirement("CFG-25")(KeyTableAgainstList.TestCase)
TestIndexTable = pytest.mark.requirement("MSG-16", "HS-38")(IndexTableAgainstList.TestCase)
