from __future__ import annotations

import pytest

from refwg.peerlookup import IndexTable, KeyTable


@pytest.mark.requirement("CFG-25")
def test_key_table_allows_removal_during_iteration() -> None:
    table: KeyTable[str] = KeyTable()
    for key in (b"c", b"a", b"b"):
        table.add(key, key.decode())
    for entry in table:
        table.remove(entry.encode())
    assert len(table) == 0
    assert table.lookup(b"a") is None


@pytest.mark.requirement("MSG-16")
def test_random_index_is_drawn_again_when_in_use() -> None:
    draws = iter([b"\1\0\0\0", b"\1\0\0\0", b"\2\0\0\0"])
    table: IndexTable[str] = IndexTable()
    assert table.insert("first", lambda _: next(draws)) == 1
    assert table.insert("second", lambda _: next(draws)) == 2
    assert (table.lookup(1), table.lookup(2), len(table)) == ("first", "second", 2)


@pytest.mark.requirement("HS-38")
@pytest.mark.parametrize("drawn", [b"\0\0\0\0", b"\xff\xff\xff\xff"])
def test_index_table_accepts_lowest_and_highest_index(drawn: bytes) -> None:
    table: IndexTable[str] = IndexTable()
    assert table.lookup(table.insert("entry", lambda _: drawn)) == "entry"


def test_index_entry_is_replaced_and_then_removed() -> None:
    table: IndexTable[str] = IndexTable()
    index = table.insert("handshake", lambda _: b"\7\0\0\0")
    table.replace(index, "session")
    assert table.lookup(index) == "session"
    table.remove(index)
    table.remove(index)
    assert table.lookup(index) is None
