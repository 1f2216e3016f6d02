"""Check the reader of TOML and JSON: values by type, mistakes named with file and key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.errors import UsageError
from harness.tables import Table, read_json, read_toml

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VALUES = {
    "text": "x",
    "number": 3,
    "decimal": 0.5,
    "flag": True,
    "words": ["a", "b"],
    "strings": {"b": "1", "a": "2"},
    "mixed": {"a": 1},
    "tables": [{"text": "first"}, {"number": 2}],
}


@pytest.fixture
def table() -> Table:
    return Table("file", VALUES)


def test_getters_return_values_of_their_keys(table: Table) -> None:
    assert (table.text("text", ""), table.number("number", 0), table.words("words", ())) == ("x", 3, ("a", "b"))
    assert (table.decimal("decimal", 0.0), table.flag("flag", default=False)) == (0.5, True)
    assert list(table.strings("strings", {}).items()) == [("b", "1"), ("a", "2")]
    inner = table.table("mixed")
    assert inner.take("a") == 1
    inner.refuse_rest()
    assert [entry.rest() for entry in table.tables("tables")] == [["text"], ["number"]]
    table.refuse_rest()


def test_absent_key_has_default_value(table: Table) -> None:
    assert (table.text("t", ""), table.number("n", 7), table.words("w", ("x",))) == ("", 7, ("x",))
    assert (table.strings("s", {}), table.table("no").rest(), table.tables("no")) == ({}, [], [])
    assert (table.decimal("d", 1.5), table.flag("f", default=False), table.take("no")) == (1.5, False, None)


def test_integer_is_decimal_too(table: Table) -> None:
    assert table.decimal("number") == 3


def test_rest_of_table_can_be_taken_unchecked(table: Table) -> None:
    inner = table.table("mixed")
    assert inner.take_rest() == {"a": 1}
    inner.refuse_rest()


def test_null_counts_as_absent() -> None:
    table = Table("file", {"text": None, "words": None, "table": None})
    assert (table.text("text", "x"), table.words("words", ()), table.table("table").rest()) == ("x", (), [])


@pytest.mark.parametrize(
    ("getter", "key", "complaint"),
    [
        (Table.text, "number", "number must be a string, not 3"),
        (Table.number, "text", "text must be an integer, not 'x'"),
        (Table.decimal, "text", "text must be a number, not 'x'"),
        (Table.flag, "number", "number must be a boolean, not 3"),
        (Table.words, "text", "text must be a list, not 'x'"),
        (Table.words, "tables", "tables must be a list of strings"),
        (Table.strings, "text", "text must be a table, not 'x'"),
        (Table.strings, "mixed", "mixed.a must be a string, not 1"),
        (Table.table, "text", "text must be a table, not 'x'"),
        (Table.tables, "mixed", "mixed: each begins with a line [[mixed]]"),
        (Table.tables, "number", "number must be a list, not 3"),
        (Table.tables, "words", "words must be a list of tables"),
        (Table.text, "no", "no is missing"),
        (Table.number, "no", "no is missing"),
        (Table.words, "no", "no is missing"),
        (Table.strings, "no", "no is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_mistake_in_toml_value_names_file_and_key(
    table: Table, getter: Callable[[Table, str], object], key: str, complaint: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        getter(table, key)
    assert str(refusal.value) == f"file: {complaint}"


def test_mistake_in_inner_toml_table_names_that_table(table: Table) -> None:
    inner = table.table("mixed")
    with pytest.raises(UsageError, match=r"^file: mixed\.no is missing$"):
        inner.text("no")
    with pytest.raises(UsageError, match=r"^file: unknown key mixed\.a$"):
        inner.refuse_rest()
    with pytest.raises(UsageError, match=r"^file: mixed\.a must be a string, not 1$"):
        inner.text("a")
    first, second = table.tables("tables", "row")
    with pytest.raises(UsageError, match=r"^file: row 2: text is missing$"):
        second.text("text")
    (only,) = Table("file", {"rows": [{}]}).tables("rows")
    with pytest.raises(UsageError, match=r"^file: rows 1: text is missing$"):
        only.text("text")
    assert first.text("text") == "first"


def test_toml_file_is_read_as_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes('text = "ä"'.encode())
    assert read_toml(tmp_path / "x.toml", "file").text("text") == "ä"


@pytest.mark.parametrize(
    ("read", "content", "complaint"),
    [
        (read_toml, None, "No such file or directory"),
        (read_toml, b"\xff", "not TOML: 'utf-8' codec"),
        (read_toml, b"x = = 1", "not TOML: Invalid value (at line 1, column 5)"),
        (read_json, None, "No such file or directory"),
        (read_json, b"\xff", "not JSON: 'utf-8' codec"),
        (read_json, b"{", "not JSON: Expecting property name"),
        (read_json, b"[]", "the top level must be a table"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_unreadable_file_is_named_in_error(
    tmp_path: Path, read: Callable[[Path, str], Table], content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        read(tmp_path / "x", "file")
    assert str(refusal.value).startswith(f"file: {complaint}")
