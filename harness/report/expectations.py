"""Read the known failures of real programs, and match them with results.

Each is a table of selftests/expectations/NAME.toml, with its evidence. A test that fails as expected is `xfailed`; one
that passes although it should always fail is `xpassed`, and that fails the run: the program was mended, and the
expectation must go. Where several speak of a test, one that expects its failure is enough, for which program is seen to
fail first may be a race; a success refutes them all. refwg has none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from harness.implementations.manifest import Manifest
    from harness.tables import Table

_TEXTS: Final = ("test", "versions", "requirement", "observed", "message", "link")
_NEVER_EXPECTED: Final = "refwg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """One known failure of one program.

    test: pattern of test ids, `file.py::test_name`; with `[[]*-v4]` after it for one row. versions: pattern of the
    program's versions. side: `a` or `b` where only that role fails, else empty. observed: the packet or state that
    was seen. message: regular expression that the failure's message matches. always: False for one that depends on a
    race, and may pass.
    """

    test: str
    versions: str
    requirement: str
    observed: str
    message: str
    link: str
    side: str = ""
    always: bool = True

    def applies(self, nodeid: str, manifest: Manifest, side: str) -> bool:
        """Whether it speaks of this test with this program in this role."""
        return (
            fnmatchcase(nodeid, self.test + "*")
            and self.side in {"", side}
            and fnmatchcase(manifest.version(), self.versions)
        )

    def __str__(self) -> str:
        return f"{self.requirement}: {self.observed} ({self.link})"


def applying(directory: Path, nodeid: str, sides: Sequence[Manifest | None]) -> tuple[Expectation, ...]:
    """Every expectation for this test with these programs as A and B: each may have several, and both may have some."""
    found = {
        expectation: None
        for side, manifest in zip("ab", sides, strict=False)
        if manifest is not None
        for expectation in load_expectations(directory / f"{manifest.name}.toml")
        if expectation.applies(nodeid, manifest, side)
    }
    return tuple(found)


def explains(found: Sequence[Expectation], message: str) -> Expectation | None:
    """The first of them that expects this failure; None if none does, for then the failure is news."""
    return next((one for one in found if re.search(one.message, message)), None)


def refuted(found: Sequence[Expectation]) -> tuple[Expectation, ...]:
    """Those that a success refutes: all but the ones that depend on a race."""
    return tuple(one for one in found if one.always)


@cache
def load_expectations(path: Path) -> tuple[Expectation, ...]:
    """Read one program's expectations; none if there is no file. Mistakes are UsageErrors that name the entry."""
    if not path.exists():
        return ()
    if path.stem.partition("+")[0] == _NEVER_EXPECTED:
        raise UsageError(f"{path}: {_NEVER_EXPECTED} has no expectations: mend it")
    return tuple(map(_read, read_toml(path, str(path)).tables("expect", "expectation")))


def _read(entry: Table) -> Expectation:
    texts = {name: text for name in _TEXTS if isinstance(text := entry.take(name), str) and text}
    side, always = entry.text("side", ""), entry.flag("always", default=True)
    missing = [f"no {name}" for name in _TEXTS if name not in texts]
    unknown = [f"unknown key {name}" for name in sorted(entry.rest())]
    if missing or unknown:
        raise entry.wrong(", ".join([*missing, *unknown]))
    if side not in {"", "a", "b"}:
        raise entry.wrong(f"side is a or b, not {side!r}")
    try:
        re.compile(texts["message"])
    except re.error as error:
        raise entry.wrong(f"message: {error}") from error
    return Expectation(**texts, side=side, always=always)
