"""Compare a run's failures with a baseline, the file of failures that are known already.

A run with `--baseline FILE` fails only if there is a failure that FILE does not list. An entry knows the test, the
implementations, the lane, the state and the message. Messages are the same if they differ only in numbers, keys and
addresses, as in causes.py. With `--update-baseline` a run writes its failures to the file: it adds the new ones, and
removes the entries whose tests ran and did not fail so. Entries whose tests did not run stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.report.causes import essence, fingerprint
from harness.tables import read_toml, toml_string

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from harness.tables import Table

_HEADER: Final = """\
# Failures that are known: a run with --baseline and this file fails only if something else does.
# --update-baseline rewrites the file. It keeps the `note` of an entry, and no other comment.
"""
# States of a test that did not run, so that nothing is known about its entries.
_DID_NOT_RUN: Final = frozenset({"", "skipped", "unsupported"})
_NAMED: Final = 10  # entries that no longer fail and are named in the summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A failure of a test: one of a run, or an entry of a baseline.

    id: pytest's node id. a, b: the implementations; empty if the test has none. state: one that fails a run. message:
    the lines that distinguish it from other failures. note: a remark of the user's.
    """

    id: str
    a: str = ""
    b: str = ""
    lane: str = "core"
    state: str = "failed"
    message: str = ""
    note: str = ""

    @property
    def pair(self) -> str:
        """`A~B`; `A` for one implementation, empty for none."""
        return "~".join(filter(None, (self.a, self.b)))

    @property
    def requirements(self) -> Sequence[str]:
        """None: an entry knows nothing of them."""
        return ()

    bugs = requirements

    @property
    def blamed(self) -> None:
        """Nobody: an entry knows nothing of reruns."""
        return None

    @property
    def is_inferred(self) -> bool:
        """False: an entry knows nothing of reruns."""
        return False

    @property
    def test(self) -> tuple[str, str, str, str]:
        """The test with its implementations and lane; the kernel is left out, because CI updates its own often."""
        return self.id, self.a, self.b, self.lane

    @property
    def key(self) -> tuple[tuple[str, str, str, str], str, str]:
        """The same for all failures that are one entry."""
        return self.test, self.state, fingerprint(self)


def failure_of(facts: Mapping[str, object], *, nodeid: str, state: str, message: str) -> Failure:
    """Make the record of a failure from the plugin's facts about the test."""
    a, b = (str(side["impl"]) if isinstance(side := facts.get(name), dict) else "" for name in "ab")
    # The file is UTF-8, and a program may have written anything.
    brief = essence(message).encode(errors="replace").decode()
    return Failure(id=nodeid, a=a, b=b, lane=str(facts.get("lane", "core")), state=state, message=brief)


def read_comparison(table: Table) -> Comparison | None:
    """Read the result of a comparison from a file of results; None if the run had no baseline."""
    if not table.rest():
        return None
    return Comparison(
        file=table.text("file"),
        known=table.number("known"),
        new=table.number("new"),
        gone=table.words("gone"),
        untested=table.number("untested"),
        updated=table.flag("updated"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The result of a run beside its baseline, for the summary and for results.json.

    known, new: the numbers of entries. gone: the ids of entries that no longer fail. untested: the number of entries
    whose tests did not run. updated: whether the file was rewritten.
    """

    file: str
    known: int
    new: int
    gone: tuple[str, ...]
    untested: int
    updated: bool = False

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        if self.updated:
            changes = f"{self.new} added, {len(self.gone)} removed, {self.known + self.untested} kept"
            return [f"baseline {self.file} is written: {changes}", *self._gone("removed, because it no longer fails")]
        parts = [f"{self.known} known failure{'s' * (self.known != 1)}", f"{self.new} new"]
        if self.gone:
            parts.append(f"{len(self.gone)} no longer fail{'s' * (len(self.gone) == 1)} (--update-baseline removes)")
        if self.untested:
            parts.append(f"{self.untested} not tested")
        return [f"baseline {self.file}: {', '.join(parts)}", *self._gone("no longer fails")]

    def _gone(self, words: str) -> list[str]:
        more = len(self.gone) - _NAMED
        return [f"{words}: {name}" for name in self.gone[:_NAMED]] + ([f"... and {more} more"] if more > 0 else [])


class Baseline:
    """The entries of a baseline, and what a run has shown of them so far.

    update: the run writes the baseline, so none of its failures counts.
    """

    def __init__(self, entries: Iterable[Failure] = (), *, update: bool = False) -> None:
        self._update = update
        self._entries = {entry.key: entry for entry in entries}
        self._failures: dict[tuple[tuple[str, str, str, str], str, str], Failure] = {}
        self._ran: set[tuple[str, str, str, str]] = set()

    def forgives(self, failure: Failure) -> bool:
        """Take a failure of the run; return whether it does not count."""
        self._failures.setdefault(failure.key, failure)
        return self._update or failure.key in self._entries

    def end(self, test: Failure, state: str) -> None:
        """Take the end of a test: its state says whether it ran."""
        if state not in _DID_NOT_RUN:
            self._ran.add(test.test)

    def compare(self, file: str, *, updated: bool = False) -> Comparison:
        """Return the result so far. file: the name of the baseline for people."""
        failed = self._failures.keys()
        left = [entry for key, entry in self._entries.items() if key not in failed]
        gone = [entry for entry in left if entry.test in self._ran]
        return Comparison(
            file=file,
            known=len(self._entries.keys() & failed),
            new=len(failed - self._entries.keys()),
            gone=tuple(sorted(entry.id for entry in gone)),
            untested=len(left) - len(gone),
            updated=updated,
        )

    def entries(self) -> list[Failure]:
        """Return the entries after the run, sorted: a known one keeps its message and note, so that diffs are small."""
        kept = {key: one for key, one in self._entries.items() if key in self._failures or one.test not in self._ran}
        return [entry for _, entry in sorted((self._failures | kept).items())]


def read_baseline(path: Path, states: Collection[str]) -> list[Failure]:
    """Read the entries of a baseline; raises UsageError for a mistake, with the remedy if there is no file.

    states: those that an entry may have.
    """
    name = f"baseline {path}"
    if not path.exists():
        raise UsageError(f"{name}: there is no such file; to write it from this run, add --update-baseline")
    top = read_toml(path, name)
    entries = [_read(table, states) for table in top.tables("failure")]
    top.refuse_rest()
    return entries


def _read(table: Table, states: Collection[str]) -> Failure:
    entry = Failure(
        id=table.text("test"),
        a=table.text("a", ""),
        b=table.text("b", ""),
        lane=table.text("lane", "core"),
        state=table.text("state", "failed"),
        message=table.text("message"),
        note=table.text("note", ""),
    )
    table.refuse_rest()
    if entry.state not in states:
        raise table.wrong(f"state is one of {', '.join(sorted(states))}, not {entry.state!r}")
    return entry


def baseline_text(entries: Iterable[Failure]) -> str:
    """Return the text of a baseline with these entries, one table each."""
    return "\n".join([_HEADER, *map(_table, entries)])


def _table(entry: Failure) -> str:
    values = {
        "test": entry.id, "a": entry.a, "b": entry.b, "lane": entry.lane, "state": entry.state,
        "message": entry.message, "note": entry.note,
    }  # fmt: skip
    lines = [f"{key} = {toml_string(text)}\n" for key, text in values.items() if text or key == "message"]
    return "".join(["[[failure]]\n", *lines])
