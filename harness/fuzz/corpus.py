"""Keep a corpus: a folder of cases, one JSON file each, and findings below it.

CORPUS/cases/HASH.json              cases that led to behaviour that no case before them led to
CORPUS/findings/KIND-HASH/          case.json, test_hostile_input.py, exchange.pcapng
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from harness.errors import Unavailable
from harness.fuzz.inputs import Case

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CASES: Final = "cases"
FINDINGS: Final = "findings"
_HASH: Final = 16


class Corpus:
    """The cases of a folder, in the order of their names, and those added since."""

    def __init__(self, folder: Path) -> None:
        """Read the folder, which need not exist. Raises UsageError for a file that is not a case."""
        self._folder = folder
        files = sorted((folder / CASES).glob("*.json"))
        self.cases = [Case.from_json(path.read_text(encoding="utf-8"), str(path)) for path in files]

    def add(self, case: Case) -> None:
        """Keep a case: for this run, and in the folder for the next one."""
        self.cases.append(case)
        self._write(self._folder / CASES, f"{_name(case.to_json())}.json", case.to_json())

    def finding(self, kind: str, cases: Sequence[Case]) -> Path:
        """Make a folder for a finding, with its cases in case.json, and return it."""
        text = "".join(f"{case.to_json()}\n" for case in cases)
        folder = self._folder / FINDINGS / f"{kind.replace(' ', '-')}-{_name(text)}"
        self._write(folder, "case.json", text)
        return folder

    def _write(self, folder: Path, name: str, text: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise Unavailable(
                f"--corpus {self._folder}: {error.strerror}; name a folder that you may write to"
            ) from error


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH]
