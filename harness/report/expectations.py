"""Read the known failures of real programs, and match them with results.

Each is a table of selftests/expectations/NAME.toml, with its evidence. A test that fails as expected is `xfailed`. A
test that passes although it should always fail is `xpassed`, which fails the run: the program was fixed, so remove the
expectation. Several may apply to one test, because it may depend on a race which program fails first. Then one that
matches the failure is enough, and a success refutes all except those marked as a race. refwg has none.

A user's manifest may name a file of its own, `expectations = "mine.toml"`, in the same format. There only `test` and
`message` are needed; in the checkout each entry has its evidence, too. After the date `until`, a failure counts again.

A program given by `--like NAME` has the expectations of NAME, whatever its version. It may be a fixed build of NAME, so
a test that passes against an expectation has state `passed`, with a message.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Final, Protocol

from harness.errors import UsageError
from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from harness.tables import Table

_TEXTS: Final = ("test", "versions", "requirement", "observed", "message", "link")
# Those that an entry beside a user's manifest must have.
_NEEDED: Final = ("test", "message")
_NEVER_EXPECTED: Final = "refwg"
# What a failure means to a user of the program, the worst first. It sorts docs/findings.md.
SEVERITIES: Final = ("security", "dos", "interop", "performance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """One known failure of one program.

    test: pattern of test ids, `file.py::test_name`; with `[[]*-v4]` after it for one row. versions: pattern of the
    program's versions. side: `a` or `b` if only this role fails, else empty. observed: the packet or state that
    was seen. message: regular expression that the failure's message matches. always: False if
    the failure depends on a race, so that the test may pass. severity: one of SEVERITIES. until: the last day on which
    the failure is expected; None: no end. requirement, observed, link: empty if the entry does not say.
    """

    test: str
    message: str
    versions: str = "*"
    requirement: str = ""
    observed: str = ""
    link: str = ""
    side: str = ""
    always: bool = True
    severity: str = "interop"
    until: date | None = None

    def has_expired(self, today: date) -> bool:
        """Return whether the failure counts again."""
        return self.until is not None and today > self.until

    def applies(self, nodeid: str, program: Program, side: str) -> bool:
        """Return whether it applies to this test with this program in this role."""
        return (
            fnmatchcase(nodeid, self.test + "*")
            and self.side in {"", side}
            and bool(program.like_name or fnmatchcase(program.version(), self.versions))
        )

    def concerns(self, versions: Iterable[str]) -> bool:
        """Return whether it is about one of these versions of the program."""
        return any(fnmatchcase(version, self.versions) for version in versions)

    @property
    def expiry(self) -> str:
        """Say that it has expired, below the message of the failure."""
        return f"this failure was expected until {self.until}, so it counts again: {self}"

    @property
    def fact(self) -> str:
        """What was seen, in words."""
        return self.observed or f"a failure with a message like {self.message!r}"

    def __str__(self) -> str:
        return f"{self.requirement and f'{self.requirement}: '}{self.fact}{self.link and f' ({self.link})'}"


class Program(Protocol):
    """The fields of a program under test that expectations need; a Manifest has them."""

    @property
    def name(self) -> str: ...

    @property
    def like_name(self) -> str:
        """The implementation of `--like`, whose expectations apply to it; empty without `--like`."""

    @property
    def expectations(self) -> Path | None:
        """The file that its manifest names for them; None if it names none."""

    def version(self) -> str: ...


class ReportedProgram:
    """A program as a result names it: one side of the result, with what expectations need.

    known: the file that its manifest names for its expectations, if any.
    """

    def __init__(self, side: Mapping[str, str], known: Path | None = None) -> None:
        self.expectations = known
        self.name = side["impl"]
        self.like_name = side.get("like", "")
        self._version = side.get("version", "")

    def version(self) -> str:
        """Return the version that the program reported."""
        return self._version


@dataclass(frozen=True, slots=True)
class Known:
    """An expectation that applies to a test because of this program. like: the NAME of its `--like`, or empty."""

    expectation: Expectation
    program: str
    like: str


def applying(directory: Path, nodeid: str, sides: Sequence[Program | None]) -> tuple[Known, ...]:
    """Return all expectations of both programs for this test; sides: the programs as A and B."""
    likes = {program.name: listed for program in sides if program and (listed := _listed(program)) != program.name}
    # Expectations contain NAME, and the test's id the name of the program.
    file, bracket, parameters = nodeid.partition("[")
    for name, like in likes.items():
        parameters = _word(name).sub(like, parameters)
    found = {
        Known(expectation, program.name, program.like_name): None
        for side, program in zip("ab", sides, strict=False)
        if program is not None
        for expectation in _of_program(directory, program)
        if expectation.applies(file + bracket + parameters, program, side)
    }
    return tuple(found)


def _listed(program: Program) -> str:
    """Return the name whose expectations a program has: that of --like, and of `NAME@VERSION` the part before the @."""
    return (program.like_name or program.name).partition("@")[0]


def _of_program(directory: Path, program: Program) -> tuple[Expectation, ...]:
    """Return the expectations of a program: those of its manifest, else those of the checkout."""
    if program.expectations is not None:
        return load_expectations(program.expectations, shipped=False)
    return load_expectations(directory / f"{_listed(program)}.toml")


def explains(found: Sequence[Known], message: str, today: date = date.min) -> Expectation | None:
    """Return the expectation that matches this message; None if the failure is new.

    One that has not expired comes first. The caller asks an expired one by `has_expired`, and counts the failure.
    """
    names: dict[str, list[str]] = {}
    for known in found:
        listed = (known.like or known.program).partition("@")[0]
        if listed != known.program:
            names.setdefault(listed, []).append(known.program)

    def pattern(text: str) -> str:
        """Let NAME in a pattern also match the programs that are given by `--like NAME`, and `NAME@VERSION`."""
        for like, programs in names.items():
            text = f"(?:{'|'.join(map(re.escape, [like, *programs]))})".join(_word(like).split(text))
        return text

    expected = sorted((known.expectation for known in found), key=lambda one: one.has_expired(today))
    return next((one for one in expected if re.search(pattern(one.message), message)), None)


def refuted(found: Sequence[Known]) -> tuple[Expectation, ...]:
    """Return the expectations that a success refutes: not those that depend on a race or come from `--like`."""
    return tuple(dict.fromkeys(known.expectation for known in found if known.expectation.always and not known.like))


def fixed(found: Sequence[Known]) -> tuple[str, ...]:
    """Return a sentence for each known failure of NAME that a program given by `--like NAME` no longer has."""
    return tuple(
        f"{known.program} does not have a known failure of {known.like}: {known.expectation}"
        for known in found
        if known.expectation.always and known.like
    )


def _word(name: str) -> re.Pattern[str]:
    """Return a pattern of this name that does not match inside a longer name."""
    return re.compile(rf"(?<![\w.+-]){re.escape(name)}(?![\w.+@])")


@cache
def load_expectations(path: Path, *, shipped: bool = True) -> tuple[Expectation, ...]:
    """Read one program's expectations; a mistake raises UsageError.

    shipped: they are the checkout's: the file may be missing, and an entry must have all texts. Otherwise a user's.
    """
    if shipped and not path.exists():
        return ()
    if path.stem.partition("+")[0] == _NEVER_EXPECTED:
        raise UsageError(f"{path}: {_NEVER_EXPECTED} has no expectations: fix the program")
    top = read_toml(path, str(path))
    entries = top.tables("expect", "expectation")
    top.refuse_rest()
    return tuple(_read(entry, _TEXTS if shipped else _NEEDED) for entry in entries)


def _read(entry: Table, needed: Sequence[str]) -> Expectation:
    texts = {name: text for name in _TEXTS if isinstance(text := entry.take(name), str) and text}
    side, always = entry.text("side", ""), entry.flag("always", default=True)
    severity = entry.text("severity", "interop")
    until = entry.take("until")
    missing = [f"no {name}" for name in needed if name not in texts]
    unknown = [f"unknown key {name}" for name in sorted(entry.rest())]
    if missing or unknown:
        raise entry.wrong(", ".join([*missing, *unknown]))
    if side not in {"", "a", "b"}:
        raise entry.wrong(f"side is a or b, not {side!r}")
    if severity not in SEVERITIES:
        raise entry.wrong(f"severity is one of {', '.join(SEVERITIES)}, not {severity!r}")
    if until is not None and type(until) is not date:
        raise entry.wrong(f"until is a day such as 2027-01-31, without quotes, not {until!r}")
    try:
        re.compile(texts["message"])
    except re.error as error:
        raise entry.wrong(f"message: {error}") from error
    return Expectation(**texts, side=side, always=always, severity=severity, until=until)
