"""Read the evidence of tests for the page: which files there are, and their text.

The texts come from the programs under test and are not trusted: only regular files below the directory of the results
are read, and invisible characters are made visible.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

if TYPE_CHECKING:
    from pathlib import Path

# Bytes of one text that the page shows from its start and from its end, and of all texts together.
_HEAD, _TAIL = 16_000, 32_000
_BUDGET: Final = 12_000_000
# The kind of each file of the evidence, by its name, in the order of the page.
_KINDS: Final = (
    ("failure.txt", "failure"),
    ("timeline.txt", "timeline"),
    ("topology.txt", "topology"),
    ("commands.txt", "commands"),
    ("*.wg.txt", "wg state"),
    ("*trace*", "trace of refwg"),
    ("dmesg*", "kernel log"),
    ("kernel*", "kernel log"),
    ("*.log", "log of the program"),
    ("*.pcap*", "capture"),
    ("*.txt", "state of the node"),
    ("*", "file"),
)
_COLOURS: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# Control characters, lone surrogates, and the marks that change the direction of text.
_INVISIBLE: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One file of a test's evidence. text: None if the page only links it. left_out: bytes missing from its middle."""

    name: str
    kind: str
    size: int
    href: str
    text: str | None
    left_out: int = 0


def clean(text: str) -> str:
    """Remove colours from a text, and make invisible characters visible."""
    return _INVISIBLE.sub(lambda found: f"<{ord(found[0]):02x}>", _COLOURS.sub("", text).replace("\r\n", "\n"))


class Reader:
    """Read evidence for a page in the folder `place`, until the page has reached its budget."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._left = _BUDGET

    def read(self, base: Path, artifacts: str) -> list[Text]:
        """Read the files of one test's evidence; none if its folder is not below that of the results."""
        if not artifacts or "\0" in artifacts:
            return []
        folder = base / artifacts
        if not folder.resolve().is_relative_to(base.resolve()) or not folder.is_dir():
            return []
        texts = [self._text(path) for path in sorted(folder.iterdir()) if stat.S_ISREG(path.lstat().st_mode)]
        kinds = [kind for _, kind in _KINDS]
        return sorted(texts, key=lambda text: kinds.index(text.kind))

    def link(self, base: Path, artifacts: str) -> str:
        """Return the link from the page to a folder of evidence; empty if it is not below that of the results."""
        folder = base / artifacts
        if not artifacts or "\0" in artifacts or not folder.resolve().is_relative_to(base.resolve()):
            return ""
        return quote(os.fsencode(os.path.relpath(folder, self._place))) if folder.is_dir() else ""

    def _text(self, path: Path) -> Text:
        size = path.stat().st_size
        name = os.fsencode(path.name).decode(errors="replace")
        text, left_out = self._content(path, size)
        return Text(
            name=clean(name),
            kind=next(kind for pattern, kind in _KINDS if fnmatchcase(name, pattern)),
            size=size,
            href=quote(os.fsencode(os.path.relpath(path, self._place))),
            text=text,
            left_out=left_out,
        )

    def _content(self, path: Path, size: int) -> tuple[str | None, int]:
        """Return the text for the page, and how many bytes of its middle are left out."""
        left_out = max(0, size - _HEAD - _TAIL)
        if size - left_out > self._left:
            return None, 0
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD if left_out else _HEAD + _TAIL)
                file.seek(max(file.tell(), size - _TAIL) if left_out else file.tell())
                tail = file.read(_TAIL) if left_out else b""
        except OSError as error:
            return f"{error.strerror}", 0
        if b"\0" in head + tail:
            return None, 0
        self._left -= size - left_out
        gap = f"\n\n[... {left_out} bytes left out ...]\n\n" if left_out else ""
        return clean(head.decode(errors="replace") + gap + tail.decode(errors="replace")), left_out
