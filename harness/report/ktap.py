"""Write results as KTAP version 1, nested by file and pair.

The format is that of the kernel's Documentation/dev-tools/ktap.rst. A file is a test whose subtests are the pairs, and
the subtests of a pair are pytest's tests. A known failure is `ok` with the directive XFAIL, a test that could not run
`ok` with SKIP. A test that shows nothing about the program is `not ok` with ERROR, and one that took too long has
TIMEOUT.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from harness.report.evidence import clean
from harness.report.results import GATING, in_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from harness.report.results import Result

_VERSION: Final = "KTAP version 1"
_INDENT: Final = "  "
_DIRECTIVES: Final = {
    "xfailed": "XFAIL", "skipped": "SKIP", "unsupported": "SKIP", "error": "ERROR", "blocked": "ERROR",
    "not_reached": "ERROR",
}  # fmt: skip
_LINES: Final = 20  # further lines of a message that a failure has as diagnostic lines
_ALONE: Final = "without an implementation"
# The first words of pytest-timeout's message.
_TIMEOUT: Final = re.compile(r"Timeout \(?>")


@dataclass(slots=True, kw_only=True)
class _Test:
    """A test of the output: with subtests, or with the words after its name."""

    name: str
    ok: bool = True
    directive: str = ""
    data: str = ""
    diagnostics: list[str] = field(default_factory=list)
    subtests: list[_Test] = field(default_factory=list)

    def bubble_up(self) -> None:
        """Derive the result of a test with subtests: it fails with one of them, and is skipped with all of them."""
        for subtest in self.subtests:
            subtest.bubble_up()
        if self.subtests:
            self.ok = all(subtest.ok for subtest in self.subtests)
            self.directive = "SKIP" if all(subtest.directive == "SKIP" for subtest in self.subtests) else ""

    def result_line(self, number: int) -> str:
        # Parsers look for a directive behind any `# `, so the message must not have one.
        words = " ".join(filter(None, (self.directive, self.data.replace("# ", "#"))))
        return f"{'ok' if self.ok else 'not ok'} {number} {self.name}{words and f' # {words}'}"


def ktap_text(results: Iterable[Result], failure: str = "") -> str:
    """Return these results as KTAP.

    failure: why the run failed, if not by its tests, or could not test; it becomes a test of its own, the last.
    """
    top = _Test(name="")
    files: dict[tuple[str, ...], _Test] = {}
    for result in results:
        file, _, name = result.id.partition("::")
        where = f" in lane {result.lane}, kernel {result.kernel}" if result.lane not in {"core", "netns"} else ""
        of_file = _find(files, (f"{file}{where}",), top)
        of_pair = _find(files, (f"{file}{where}", result.pair or _ALONE), of_file)
        of_pair.subtests.append(_of_result(result, name or file))
    if failure:
        top.subtests.append(_Test(name="wg-interop run", ok=False, directive="ERROR", data=_one_line(failure)))
    top.bubble_up()
    return "".join(f"{line}\n" for line in _lines(top))


def _find(files: dict[tuple[str, ...], _Test], key: tuple[str, ...], parent: _Test) -> _Test:
    """Return the test of this file or pair; made when it is first needed."""
    if key not in files:
        files[key] = _Test(name=_name(key[-1]))
        parent.subtests.append(files[key])
    return files[key]


def _of_result(result: Result, name: str) -> _Test:
    first, _, rest = clean(result.message).strip().partition("\n")
    bad = result.state in GATING
    directive = "TIMEOUT" if bad and _TIMEOUT.match(first) else _DIRECTIVES.get(result.state, "")
    # States that KTAP has no word for are named in front of the message.
    data = first if directive or result.state in {"passed", "failed"} else f"{in_words(result.state)}: {first}"
    # Further lines are indented: none of them is taken for the line `# Subtest: NAME`.
    diagnostics = [f"  {line}" for line in rest.splitlines()[:_LINES]] if bad else []
    if bad and result.artifacts:
        diagnostics.append(f"evidence: {_one_line(result.artifacts)}")
    return _Test(name=_name(name), ok=not bad, directive=directive, data=_one_line(data), diagnostics=diagnostics)


def _lines(test: _Test) -> Iterator[str]:
    """Yield the version, the plan, and for each subtest its own lines, its diagnostics and its result."""
    yield _VERSION
    yield f"1..{len(test.subtests)}"
    for number, subtest in enumerate(test.subtests, 1):
        if subtest.subtests:
            yield from (f"{_INDENT}{line}" for line in _lines(subtest))
        yield from (f"# {line}" for line in subtest.diagnostics)
        yield subtest.result_line(number)


def _name(text: str) -> str:
    """Return a name of a test: one line, in which `#` would begin a directive."""
    return _one_line(text).replace("#", "_")


def _one_line(text: str) -> str:
    return " ".join(clean(text).split())
