"""Read TOML and JSON files, and check the type of each value; write strings of TOML.

A mistake in a file raises UsageError, one line that names the file and the key.
"""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Final, TypeVar

from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_T = TypeVar("_T")
# How messages name the types that getters check. A number may have a fraction; an object of JSON is a table, too.
_TOML_NAMES: Final[Mapping[type, str]] = {
    str: "a string", int: "an integer", float: "a number", bool: "a boolean", list: "a list", dict: "a table",
}  # fmt: skip


def read_toml(path: Path, name: str) -> Table:
    """Read a TOML file. name: begins each error, `manifest mine.toml`."""
    return _read(path, name, tomllib.loads, "TOML")


def toml_string(text: str) -> str:
    """Format a text as a string of TOML, in one line."""
    # TOML's basic strings have the escapes of JSON, and take no DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_json(path: Path, name: str) -> Table:
    """Read a JSON file that contains an object. name: begins each error."""
    return _read(path, name, json.loads, "JSON")


def _read(path: Path, name: str, parse: Callable[[str], object], language: str) -> Table:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{name}: not {language}: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{name}: the top level must be a table")
    return Table(name, values)


class Table:
    """A table of a TOML or JSON file. Each getter removes its key and checks the type of the value.

    A getter returns the default if the key is absent or null; without a default it raises UsageError, as for a value of
    the wrong type. name: begins each error. title: the table's own name with a dot, `program.`; empty for the top
    table.
    """

    def __init__(self, name: str, values: Mapping[str, object], title: str = "") -> None:
        self.name = name
        self.title = title
        self._values = dict(values)

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def rest(self) -> list[str]:
        """Return the keys that no getter has removed yet, in the order of the file."""
        return list(self._values)

    def take_rest(self) -> dict[str, object]:
        """Remove and return all keys that are left, with unchecked values."""
        values, self._values = self._values, {}
        return values

    def refuse_rest(self) -> None:
        """Raise UsageError for the first key that is left: no code reads it, so it is probably misspelt."""
        for key in self._values:
            raise self.wrong(f"unknown key {self.title}{key}")

    def wrong(self, what: str) -> UsageError:
        """Return the error for a mistake in this file; the caller raises it."""
        return UsageError(f"{self.name}: {what}")

    def take(self, key: str) -> object:
        """Take a value of any type; None if the key is absent."""
        return self._values.pop(key, None)

    def text(self, key: str, default: str | None = None) -> str:
        """Take a string."""
        return self._checked(key, str, default)

    def number(self, key: str, default: int | None = None) -> int:
        """Take an integer."""
        return self._checked(key, int, default)

    def decimal(self, key: str, default: float | None = None) -> float:
        """Take a number with or without a fraction."""
        return self.number(key) if isinstance(self._values.get(key), int) else self._checked(key, float, default)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Take true or false."""
        return self._checked(key, bool, default)

    def words(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Take a list of strings."""
        if default is not None and key not in self:
            return default
        values: list[object] = self._checked(key, list, None)
        words = tuple(value for value in values if isinstance(value, str))
        if len(words) != len(values):
            raise self.wrong(f"{self.title}{key} must be a list of strings")
        return words

    def strings(self, key: str, default: Mapping[str, str] | None = None) -> dict[str, str]:
        """Take a table of strings."""
        if default is not None and key not in self:
            return dict(default)
        values: dict[str, object] = self._checked(key, dict, None)
        strings: dict[str, str] = {}
        for name, value in values.items():
            if not isinstance(value, str):
                raise self.wrong(f"{self.title}{key}.{name} must be a string, not {value!r}")
            strings[name] = value
        return strings

    def table(self, key: str) -> Table:
        """Take a table inside this one; an empty one if the key is absent."""
        return Table(self.name, self._checked(key, dict, {}), f"{self.title}{key}.")

    def tables(self, key: str, each: str | None = None) -> list[Table]:
        """Take the tables `[[key]]`; an empty list if the key is absent.

        each: the word with which errors number them, `each 1`, `each 2`; by default the key.
        """
        if isinstance(self._values.get(key), dict):
            raise self.wrong(f"{self.title}{key}: each begins with a line [[{key}]]")
        values: list[object] = self._checked(key, list, [])
        tables = [value for value in values if isinstance(value, dict)]
        if len(tables) != len(values):
            raise self.wrong(f"{self.title}{key} must be a list of tables")
        return [Table(f"{self.name}: {each or key} {n}", table) for n, table in enumerate(tables, 1)]

    def _checked(self, key: str, kind: type[_T], default: _T | None) -> _T:
        value = self.take(key)
        value = default if value is None else value
        if value is None:
            raise self.wrong(f"{self.title}{key} is missing")
        if not isinstance(value, kind):
            raise self.wrong(f"{self.title}{key} must be {_TOML_NAMES[kind]}, not {value!r}")
        return value
