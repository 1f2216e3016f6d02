"""Write the tables of docs/findings.md from the expectations: `python -m ci.findings`.

An expectation is what a real program does wrong, seen in the lab. Those with the same id, fact and severity are one
finding, however many tests it fails. A table replaces the text between its markers, `<!-- findings: NAME -->` and
`<!-- end -->`. The prose around the tables is written by hand. refwg and the kernel have no expectations, so no table.
"""

from __future__ import annotations

import re
import shlex
import sys
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import groupby
from typing import TYPE_CHECKING, Final

from ci.setup_checkout import ROOT
from ci.written import Written
from harness.report.conformance import read_conformance
from harness.report.expectations import SEVERITIES, load_expectations
from harness.report.invariants import PREFIX

if TYPE_CHECKING:
    from harness.report.expectations import Expectation

DOCUMENT: Final = ROOT / "docs" / "findings.md"
EXPECTATIONS: Final = ROOT / "selftests" / "expectations"
_HEAD: Final = "| severity | id | what it does | shown by | source |\n|---|---|---|---|---|"
# The other end of a test of two programs.
_PEER: Final = "refwg"


def findings(name: str) -> list[list[Expectation]]:
    """Return a program's findings, the worst first: each is the expectations with one id, fact and severity."""

    def fact(entry: Expectation) -> tuple[int, str, str]:
        return SEVERITIES.index(entry.severity), entry.requirement, entry.observed

    entries = sorted(load_expectations(EXPECTATIONS / f"{name}.toml"), key=fact)
    return [list(group) for _, group in groupby(entries, fact)]


def command(name: str, entry: Expectation) -> str:
    """Return the command that shows a finding: the first test that its pattern matches, in the role that fails."""
    test = first_test(entry.test)
    if test.startswith(PREFIX):
        # The oracle finds it in any test that lets the program send something.
        test = "selftests/netns"
    sides = {"a": f"{name}~{_PEER}", "b": f"{_PEER}~{name}"}
    options = f"--pair {sides[entry.side]}" if entry.side else f"--impl {name}"
    if "::" not in test:
        return f"pytest {test} {options}"
    lane = " --lane warp" if is_marked(*test.split("::"), "waiting") else ""
    nightly = " --nightly" if is_marked(*test.split("::"), "nightly") else ""
    return f"pytest {shlex.quote(test) if '[' in test else test} {options}{lane}{nightly}"


def first_test(pattern: str) -> str:
    """Return the first test, without its parameters, that the pattern of an expectation matches.

    A pattern of the oracle's results, `oracle::DT-01`, is returned as it is.
    """
    pattern = pattern.partition("[")[0]
    if pattern.startswith(PREFIX):
        return pattern
    for path in sorted(ROOT.glob(pattern.partition("::")[0])):
        for test in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            if fnmatchcase(found := f"{path.relative_to(ROOT)}::{test}", pattern + "*"):
                return found
    raise SystemExit(f"ci.findings: no test matches {pattern}")


@cache
def is_marked(file: str, test: str, mark: str) -> bool:
    """Return whether a test or its file has a mark: `waiting`, for lane warp only, or `nightly`."""
    text = (ROOT / file).read_text()
    decorators = re.search(rf"((?:^[@ )].*\n)*)^def {test}\(", text, re.MULTILINE)
    return bool(re.search(rf"^pytestmark = .*\b{mark}\b", text, re.MULTILINE)) or bool(
        decorators and f"mark.{mark}" in decorators[1]
    )


def table(name: str) -> str:
    """Return the table of one program, in Markdown."""
    known = read_conformance(ROOT)
    rows = []
    for group in findings(name):
        first = group[0]
        tests = {first_test(entry.test) for entry in group}
        shown = f"`{command(name, first)}`" + (f" and {len(tests) - 1} more" if len(tests) > 1 else "")
        observed = first.observed + ("" if any(entry.always for entry in group) else " (not each time)")
        links = dict.fromkeys(f"[{source_name(entry.link)}]({entry.link})" for entry in group)
        title = known.entry(first.requirement).title
        rows.append(
            f"| {first.severity} | {first.requirement} {title} | {escaped(observed)} | {shown} | {', '.join(links)} |"
        )
    return "\n".join([_HEAD, *rows])


def source_name(link: str) -> str:
    """Return the name of a link: the file, or the repository's number of an issue or change."""
    last = re.split(r"[?#]", link.rstrip("/"))[0].rsplit("/", 1)[-1]
    return f"#{last}" if last.isdigit() else last


def escaped(text: str) -> str:
    """Return text in which Markdown finds no table cells, tags or emphasis."""
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", text)


def programs() -> list[str]:
    """Return the programs that have expectations."""
    return sorted(path.stem for path in EXPECTATIONS.glob("*.toml"))


WRITTEN: Final = Written(
    "ci.findings",
    __doc__.partition("\n")[0],
    DOCUMENT,
    "findings",
    {name: partial(table, name) for name in programs()},
)


if __name__ == "__main__":
    sys.exit(WRITTEN.main())
