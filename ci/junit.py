"""Read pytest's JUnit files: how many passed, failed and were skipped, and which failed."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many tests of one gate, or of all, passed, failed and were skipped."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    names: tuple[str, ...] = ()  # of the failed tests

    @property
    def ran(self) -> int:
        """How many tests ran: passed and failed, not skipped."""
        return self.passed + self.failed

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            passed=self.passed + other.passed,
            failed=self.failed + other.failed,
            skipped=self.skipped + other.skipped,
            names=self.names + other.names,
        )

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def read_counts(junit: Path) -> Counts:
    """Count the results in a JUnit file; all counts are 0 if pytest wrote none, or not to its end."""
    try:
        cases = list(ET.parse(junit).iter("testcase"))  # noqa: S314 - our own pytest wrote it
    except (OSError, ET.ParseError):
        return Counts()
    # An error in a test's teardown is a second case with the same name; a set counts the test once.
    failed = {_case_name(case) for case in cases if _has(case, "failure", "error")}
    skipped = {_case_name(case) for case in cases if _has(case, "skipped")} - failed
    passed = {_case_name(case) for case in cases} - failed - skipped
    return Counts(passed=len(passed), failed=len(failed), skipped=len(skipped), names=tuple(sorted(failed)))


def _case_name(case: ET.Element) -> str:
    # Only the family xunit1 has the file; with it the name can be passed to pytest.
    return f"{case.get('file') or case.get('classname')}::{case.get('name')}"


def _has(case: ET.Element, *tags: str) -> bool:
    return any(case.find(tag) is not None for tag in tags)
