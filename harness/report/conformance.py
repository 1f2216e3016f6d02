"""Read the catalogues: what the ids of scenarios, requirements and bugs stand for."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

from harness import suite
from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from harness.tables import Table

FOLDER: Final = suite.CATALOGUES
# For each marker, which is also the name of the tables in the file: the file that lists its ids.
CATALOGUES: Final = {
    "scenario": FOLDER / "netns-scenarios.toml",
    "requirement": FOLDER / "requirements.toml",
    "bug": FOLDER / "real-bugs.toml",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One scenario, requirement or bug; a text that the catalogue lacks is empty.

    level: `must` or `should`; empty for a scenario or bug. observe: `wire`, `config`, `tunnel` or `unit`, where the
    requirement can be observed. statement: what the requirement demands, the steps and the expected result of the
    scenario, or the symptom of the bug and what it violates. source: the document and section that it comes from, or
    the programs that had the bug. seen_to_fail: the deliberate defect by which a test that cites the entry was seen to
    fail; empty if none is known.
    """

    id: str
    title: str = ""
    level: str = ""
    observe: str = ""
    statement: str = ""
    source: str = ""
    seen_to_fail: str = ""

    def __str__(self) -> str:
        """Return `HS-07 (replayed initiation is dropped)`."""
        return f"{self.id} ({self.title})" if self.title else self.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformance:
    """All scenarios, requirements and bugs by id; empty if there is no checkout."""

    scenarios: Mapping[str, Entry]
    requirements: Mapping[str, Entry]
    bugs: Mapping[str, Entry]

    def knows(self, name: str) -> bool:
        """Return whether an id is in one of the catalogues."""
        return name in self.scenarios or name in self.requirements or name in self.bugs

    def entry(self, name: str) -> Entry:
        """Return the entry of an id; one with nothing but the id if it is in no catalogue."""
        return self.scenarios.get(name) or self.requirements.get(name) or self.bugs.get(name) or Entry(id=name)

    def why_unknown(self, kind: str, name: str) -> str:
        """Return why no test may cite this id with the marker `kind`, and what was probably meant; empty if it may."""
        known = {"scenario": self.scenarios, "requirement": self.requirements, "bug": self.bugs}
        if name in known[kind]:
            return ""
        for other, ids in known.items():
            if name in ids:
                return f"{name} is not a {kind}; use @pytest.mark.{other}({name!r})"
        near = get_close_matches(name, known[kind], n=1, cutoff=0)
        return f"{kind} {name} is not in {CATALOGUES[kind]}" + (f"; did you mean {near[0]}?" if near else "")


def read_conformance(root: Path | None) -> Conformance:
    """Read the catalogues of a checkout. Raises UsageError for a mistake in one, such as an entry without an id."""
    return Conformance(
        scenarios=_read(root, "scenario", _scenario),
        requirements=_read(root, "requirement", _requirement),
        bugs=_read(root, "bug", _bug),
    )


def _read(root: Path | None, kind: str, read: Callable[[Table], Entry]) -> dict[str, Entry]:
    if root is None or not (path := root / CATALOGUES[kind]).exists():
        return {}
    return {entry.id: entry for entry in map(read, read_toml(path, str(path)).tables(kind))}


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
        observe=_text(table, "observe"),
        statement=_text(table, "statement"),
        source=_text(table, "source"),
        seen_to_fail=_text(table, "seen_to_fail"),
    )


def _bug(table: Table) -> Entry:
    texts = [("", _text(table, "symptom")), ("Violated: ", _text(table, "violated"))]
    return Entry(
        id=table.text("id"),
        title=_text(table, "topic"),
        statement=" ".join(f"{label}{text}" for label, text in texts if text),
        source=", ".join(filter(None, [_text(table, "implementation"), _text(table, "reference")])),
        seen_to_fail=_text(table, "seen_to_fail"),
    )


def _text(table: Table, key: str) -> str:
    """Return a text with its lines joined to one."""
    return " ".join(table.text(key, "").split())
