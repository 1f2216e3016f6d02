"""Parse KTAP version 1 strictly, by the rules of the kernel's ktap.rst.

Written from Documentation/dev-tools/ktap.rst, and independent of harness/report/ktap.py. It is stricter than kunit.py:
what the document only recommends, such as a plan, is an error here if it is missing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

DIRECTIVES: Final = frozenset({"SKIP", "TODO", "XFAIL", "TIMEOUT", "ERROR"})
# "note the result of the test case result line should be "not ok" if the ... directive is used"
_ONLY_NOT_OK: Final = frozenset({"TIMEOUT", "ERROR"})
_VERSION: Final = "KTAP version 1"
_PLAN: Final = re.compile(r"1\.\.(\d+)")
# <result> <number> [<description>][ # [<directive>] [<diagnostic data>]]
_RESULT: Final = re.compile(r"(ok|not ok) (\d+)(?: ([^#]*?))?(?: # ?(.*))?")
_INDENT: Final = "  "


class KtapError(ValueError):
    """A line breaks a rule of the format."""


@dataclass(slots=True, kw_only=True)
class Test:
    """One test: its subtests, or none, and its result line."""

    __test__ = False

    name: str = ""
    ok: bool = True
    directive: str = ""
    data: str = ""
    diagnostics: list[str] = field(default_factory=list)
    subtests: list[Test] = field(default_factory=list)


def parse_ktap(text: str) -> list[Test]:
    """Return the tests of the top level; raises KtapError for a line that breaks a rule."""
    lines = text.splitlines()
    tests, end = _parse(lines, 0, "")
    if end != len(lines):
        raise KtapError(f"line {end + 1} is after the last result: {lines[end]!r}")
    return tests


def _parse(lines: Sequence[str], at: int, indent: str) -> tuple[list[Test], int]:
    """Parse one level from its version line on; returns its tests and the number of the line behind them."""
    if at >= len(lines) or lines[at] != indent + _VERSION:
        raise KtapError(f"line {at + 1}: expected {indent + _VERSION!r}")
    plan = _PLAN.fullmatch(lines[at + 1].removeprefix(indent)) if at + 1 < len(lines) else None
    if plan is None:
        raise KtapError(f"line {at + 2}: expected a plan")
    at += 2
    tests: list[Test] = []
    for number in range(1, int(plan[1]) + 1):
        test, at = _parse_test(lines, at, indent, number)
        tests.append(test)
    return tests, at


def _parse_test(lines: Sequence[str], at: int, indent: str, number: int) -> tuple[Test, int]:
    """Parse the subtests, the diagnostic lines and the result line of one test."""
    subtests: list[Test] = []
    diagnostics: list[str] = []
    while at < len(lines):
        line = lines[at]
        if line.startswith(indent + _INDENT):
            if subtests:
                raise KtapError(f"line {at + 1}: a second set of subtests: {line!r}")
            subtests, at = _parse(lines, at, indent + _INDENT)
            continue
        if not line.startswith(indent):
            raise KtapError(f"line {at + 1}: {number - 1} tests, and the plan has more: {line!r}")
        line = line.removeprefix(indent)
        at += 1
        if line.startswith("# "):
            diagnostics.append(line.removeprefix("# "))
            continue
        test = _result(line, number, at)
        test.subtests, test.diagnostics = subtests, diagnostics
        if any(not subtest.ok for subtest in subtests) and test.ok:
            raise KtapError(f"line {at}: a subtest has failed, so the parent must fail: {line!r}")
        return test, at
    raise KtapError(f"the output ends before result {number}")


def _result(line: str, number: int, at: int) -> Test:
    found = _RESULT.fullmatch(line)
    if found is None:
        raise KtapError(f"line {at}: not a result: {line!r}")
    if int(found[2]) != number:
        raise KtapError(f"line {at}: number {found[2]}, expected {number}")
    word, _, rest = (found[4] or "").partition(" ")
    directive = word if word in DIRECTIVES else ""
    ok = found[1] == "ok"
    if ok and directive in _ONLY_NOT_OK:
        raise KtapError(f"line {at}: {directive} needs 'not ok'")
    return Test(name=found[3] or "", ok=ok, directive=directive, data=rest if directive else found[4] or "")
