"""Write generated parts into a document, or report which of them are out of date."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Written:
    """The parts of a document that a command writes, each between `<!-- WORD: NAME -->` and `<!-- end -->`.

    module, description: of the command. document: where its parts are. word: of the marks. parts: by name, what makes
    the text of one.
    """

    module: str
    description: str
    document: Path
    word: str
    parts: Mapping[str, Callable[[], str]]

    def found(self, text: str) -> dict[str, str]:
        """Return the parts of a document, name -> text; ValueError if one is missing or unknown."""
        found = {match["name"]: match["body"] for match in self._block().finditer(text)}
        if wrong := sorted(found.keys() ^ self.parts.keys()):
            raise ValueError(f"{self.document.name} and python -m {self.module} disagree about: {', '.join(wrong)}")
        return found

    def outdated(self, text: str) -> list[str]:
        """Return the names of the parts that are not current; ValueError as for `found`."""
        return [name for name, body in self.found(text).items() if body != f"{self.parts[name]()}\n"]

    def rewritten(self, text: str) -> str:
        """Return the document with current parts; ValueError as for `found`."""
        self.found(text)
        return self._block().sub(lambda match: f"{match[1]}{self.parts[match['name']]()}\n", text)

    def main(self, arguments: Sequence[str] | None = None, document: Path | None = None) -> int:
        """Write the parts, or with --check only report which are out of date; return 1 if --check finds one, else 0.

        document: instead of its own.
        """
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}", description=self.description)
        parser.add_argument(
            "--check", action="store_true", help="change nothing; report parts that are out of date and exit with 1"
        )
        check = parser.parse_args(arguments).check
        document = document or self.document
        text = document.read_text()
        wrong = self.outdated(text)
        for name in wrong:
            result = f"out of date; run python -m {self.module}" if check else "written again"
            print(f"{document.name}: {name}: {result}")
        if not check:
            document.write_text(self.rewritten(text))
        return 1 if check and wrong else 0

    def _block(self) -> re.Pattern[str]:
        return re.compile(rf"(<!-- {self.word}: (?P<name>[^>]+) -->\n)(?P<body>.*?)(?=<!-- end -->)", re.DOTALL)
