"""Read the catalogues: what the ids of scenarios and requirements stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from harness.tables import Table

_FOLDER: Final = Path("selftests", "conformance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One scenario or requirement; a text that the catalogue lacks is empty.

    level: `must` or `should`; empty for a scenario. statement: what the requirement demands, or the steps and the
    expected result of the scenario. source: the document and section that it comes from.
    """

    id: str
    title: str = ""
    level: str = ""
    statement: str = ""
    source: str = ""

    def __str__(self) -> str:
        """Return `HS-07 (replayed initiation is dropped)`."""
        return f"{self.id} ({self.title})" if self.title else self.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformance:
    """All scenarios and requirements by id; empty if there is no checkout."""

    scenarios: Mapping[str, Entry]
    requirements: Mapping[str, Entry]

    def entry(self, name: str) -> Entry:
        """Return the entry of an id; one with nothing but the id if it is in neither catalogue."""
        return self.scenarios.get(name) or self.requirements.get(name) or Entry(id=name)


def find_catalogue(results: Sequence[Path]) -> Path | None:
    """Find the checkout: above the results, above the current directory, or above this file."""
    starts = [*(path.absolute().parent for path in results), Path.cwd(), Path(__file__).parent]
    every = (directory for start in starts for directory in (start, *start.parents))
    return next((directory for directory in every if (directory / _FOLDER).is_dir()), None)


def read_conformance(root: Path | None) -> Conformance:
    """Read both catalogues of a checkout. Raises UsageError for an entry without an id."""
    return Conformance(
        scenarios=_read(root, "netns-scenarios.toml", "scenario", _scenario),
        requirements=_read(root, "requirements.toml", "requirement", _requirement),
    )


def _read(root: Path | None, name: str, table: str, read: Callable[[Table], Entry]) -> dict[str, Entry]:
    if root is None:
        return {}
    path = root / _FOLDER / name
    try:
        tables = read_toml(path, str(path)).tables(table)
    except UsageError:
        return {}
    return {entry.id: entry for entry in map(read, tables)}


def _scenario(table: Table) -> Entry:
    texts = [("", _text(table, "steps")), ("Expected: ", _text(table, "expect"))]
    topology = _text(table, "topology")
    return Entry(
        id=table.text("id"),
        title=_text(table, "title"),
        statement=". ".join(f"{label}{text}" for label, text in texts if text),
        source=f"tools/testing/selftests/wireguard/netns.sh, topology {topology}" if topology else "",
    )


def _requirement(table: Table) -> Entry:
    return Entry(
        id=table.text("id"),
        title=_text(table, "title"),
        level=_text(table, "level"),
        statement=_text(table, "statement"),
        source=_text(table, "source"),
    )


def _text(table: Table, key: str) -> str:
    """Return a text with its lines joined to one."""
    return " ".join(table.text(key, "").split())
