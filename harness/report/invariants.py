"""Add up the oracle's findings: one result for each invariant, pair, role and lane.

Its id is `oracle::REQUIREMENT[A~B-a]`, or `[A-a]` for a test of one implementation. The role is that of the program
that sent the datagrams. A result exists if at least one datagram was judged. It is decided by the first violation: a
must fails, a should differs, and an expectation that names `oracle::REQUIREMENT` explains nothing but this result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from harness.report import expectations
from harness.report.expectations import ReportedProgram

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from harness.report.results import Result

PREFIX: Final = "oracle::"
# Of the requirements that the oracle judges, those that a program may break without harm to others.
SHOULDS: Final = frozenset({"CR-12", "MSG-12"})
# Defects of real programs, by the requirement that they violate.
BUGS: Final = {"CR-11": ("IB-48",), "CR-12": ("IB-49",)}
# The key of the oracle's findings among the facts of a report.
FACT: Final = "oracle"
# For these a difference from the driver is a failure.
AS_THE_KERNEL: Final = frozenset({"kernel", "refwg"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one invariant. explanation: of the expectation that makes it an xfail; else empty."""

    id: str
    facts: dict[str, object]
    state: str
    message: str = ""
    explanation: str = ""


@dataclass(slots=True)
class _Sum:
    """What was judged so far. first: the first violation, and the test with it; None if there is none."""

    facts: dict[str, object]
    side: dict[str, str]
    role: str
    requirement: str
    pair: str
    checked: int = 0
    violations: int = 0
    first: tuple[Mapping[str, str], str] | None = None
    artifacts: str = ""

    @property
    def id(self) -> str:
        return f"{PREFIX}{self.requirement}[{self.pair}-{self.role}]"


@dataclass(slots=True)
class Invariants:
    """Collects the oracle's findings of all tests, also of those that ran in workers and guests."""

    _sums: dict[tuple[object, ...], _Sum] = field(default_factory=dict)

    def add(self, result: Result, found: object) -> None:
        """Add what the oracle found in one test. found: the fact FACT of its report; anything else is ignored."""
        if not isinstance(found, list) or result.a is None:
            return
        for entry in found:
            self._add(result, entry)

    def _add(self, result: Result, entry: dict[str, Any]) -> None:
        role = entry["role"]
        side = result.b if role == "b" and result.b is not None else result.a
        assert side is not None  # noqa: S101 - `add` has looked
        violations = {violation["requirement"]: violation for violation in entry["violations"]}
        for requirement in dict.fromkeys([*entry["checked"], *violations]):
            facts: dict[str, object] = {
                "a": result.a,
                "b": result.b,
                "lane": result.lane,
                "kernel": result.kernel,
                "requirements": [requirement],
                "bugs": list(BUGS.get(requirement, ())),
            }
            key = (requirement, role, result.pair, result.lane, result.kernel)
            of_it = self._sums.setdefault(key, _Sum(facts, side, role, requirement, result.pair))
            of_it.checked += entry["checked"].get(requirement, 0)
            if (violation := violations.get(requirement)) is not None:
                of_it.violations += 1
                of_it.artifacts = of_it.artifacts or result.artifacts
                of_it.first = of_it.first or (violation, result.id)

    def outcomes(
        self, directory: Path, files: Mapping[str, Path] = MappingProxyType({}), today: date = date.min
    ) -> Iterator[Outcome]:
        """Return the results, sorted by id.

        directory: of the expectations. files: by name of the program, those that its manifest names.
        today: expectations that end before it have expired.
        """
        for one in sorted(self._sums.values(), key=lambda each: (each.facts["lane"], each.facts["kernel"], each.id)):
            yield _decide(one, directory, files.get(one.side["impl"]), today)


def _decide(one: _Sum, directory: Path, known: Path | None, today: date) -> Outcome:
    if one.first is None:
        return Outcome(id=one.id, facts=one.facts, state="passed")
    violation, test = one.first
    name = one.side["impl"]
    times = f"; in {one.violations} tests, first in {test}" if one.violations > 1 else f"; in {test}"
    message = f"{name} {violation['message']} ({violation['packet']}){times}"
    facts = one.facts | {"artifacts": one.artifacts}
    program = ReportedProgram(one.side, known)
    sides = (None, program) if one.role == "b" else (program, None)
    explained = expectations.explains(expectations.applying(directory, one.id, sides), message, today)
    if explained is not None and explained.has_expired(today):
        message += f"\n{explained.expiry}"
    elif explained is not None:
        return Outcome(id=one.id, facts=facts, state="xfailed", message=message, explanation=str(explained))
    may_differ = one.requirement in SHOULDS and name.partition("+")[0] not in AS_THE_KERNEL
    return Outcome(id=one.id, facts=facts, state="differs" if may_differ else "failed", message=message)
