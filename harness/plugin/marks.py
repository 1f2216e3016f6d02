"""Check the ids that tests cite: each is in its catalogue, requirements at most three.

The host checks them when it collects the tests; a guest need not. Tests outside the suite may cite any ids.
When a test ends with `differs`, the catalogue must allow that: a must may not differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from harness import suite
from harness.errors import HarnessError
from harness.plugin.session import state_of_run

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import pytest

MAX_REQUIREMENTS: Final = 3
# The markers that cite ids of a catalogue.
_KINDS: Final = ("scenario", "requirement", "bug")


def cited(item: pytest.Item, kind: str) -> list[str]:
    """Return the ids that a test cites by this marker: `scenario`, `requirement` or `bug`."""
    return [name for marker in item.iter_markers(kind) for name in marker.args]


def wrong_marks(root: Path, items: Iterable[pytest.Item]) -> list[str]:
    """Return a sentence for each mistake in the marks of these tests."""
    citing = dict.fromkeys(
        (item.nodeid.partition("[")[0], kind, tuple(ids), item.path.is_relative_to(root))
        for item in items
        for kind in _KINDS
        if (ids := cited(item, kind))
    )
    wrong = [
        f"{test}: a test cites at most {MAX_REQUIREMENTS} requirements, not {', '.join(map(str, names))}"
        for test, kind, names, _ in citing
        if kind == "requirement" and len(names) > MAX_REQUIREMENTS
    ]
    here = [(test, kind, names) for test, kind, names, is_here in citing if is_here]
    if not here or not (root / suite.CATALOGUES).is_dir():
        return wrong
    from harness.report.conformance import CATALOGUES, read_conformance

    try:
        catalogue = read_conformance(root)
    except HarnessError as error:
        return [*wrong, str(error)]
    for test, kind, names in here:
        # A catalogue that is not there lists nothing.
        if (root / CATALOGUES[kind]).exists():
            wrong += [f"{test}: {why}" for name in names if (why := catalogue.why_unknown(kind, str(name)))]
    return wrong


def why_no_difference(item: pytest.Item, kind: str, name: str) -> str:
    """Return why a test may not end as `differs`; empty if it may.

    kind, name: the marker and the id that the test names as its permission; both empty if it names none.
    """
    root = state_of_run(item.config).suite
    if not (root / suite.CATALOGUES).is_dir() or not item.path.is_relative_to(root):
        return ""
    catalogue = state_of_run(item.config).conformance
    if not name:
        musts = [entry for each in cited(item, "requirement") if (entry := catalogue.entry(each)).level == "must"]
        remedy = 'name the should or the scenario that does: differs(..., requirement="ID") or scenario="ID"'
        return f"{' and '.join(map(str, musts))} allows no difference; {remedy}" if musts else ""
    entry = catalogue.entry(name)
    if name not in cited(item, kind):
        return f"the test does not cite {kind} {entry}"
    if kind == "scenario":
        return "" if "differs" in entry.statement else f"the text of scenario {entry} has no word `differs`"
    return "" if entry.level == "should" else f"{entry} is not a should"
