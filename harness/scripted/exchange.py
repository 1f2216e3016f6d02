"""Draw what scripted peers and the device have sent, for the evidence of a test."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

# The name of the file with the diagram, in a test's evidence.
EXCHANGE: Final = "exchange.txt"
# Messages with all their values: the last ones of a test. The diagram has all.
_IN_FULL: Final = 200
_SECOND: Final = 1_000_000_000
_WIDTH: Final = 22
# Characters of an arrow: most texts fit in.
_ARROW: Final = 78
_HEADER: Final = """\
# What the device under test (left) and the scripted peers sent, in order. UTC, by the clock of the captures.
# After "overrides": what a correct peer would not have sent so.

"""
_VALUES: Final = """
# Every value of these messages: c is the chaining key, h the hash. Below a value that an override changed is the value
# of a correct peer.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One message. is_sent: by a peer. text: what it is. values, correct: by name, see Written."""

    time: int
    peer: str
    is_sent: bool
    text: str
    values: Mapping[str, bytes] = field(repr=False, default_factory=dict)
    correct: Mapping[str, bytes] = field(repr=False, default_factory=dict)

    def __str__(self) -> str:
        """`11:02:03.000125  device <--- initiation of 148 bytes, index 0x0a0b0c0d --- p1 192.168.1.2:40000`."""
        wall = datetime.fromtimestamp(self.time // _SECOND, UTC)
        stamp = f"{wall:%H:%M:%S}.{self.time % _SECOND // 1000:06}"
        head, tail = ("<", "-") if self.is_sent else ("-", ">")
        return f"{stamp}  device |{head}{f' {self.text} ':-^{_ARROW}}{tail}| {self.peer}\n"

    def details(self) -> str:
        """List the values, with the correct one below each that differs."""
        lines = []
        for name, value in self.values.items():
            lines.append(f"    {name:{_WIDTH}} {value.hex()}\n")
            right = self.correct.get(name, value)
            if right != value:
                lines.append(f"    {'':{_WIDTH}} {right.hex()} (correct)\n")
        return "".join(lines)


class Exchange:
    """The messages between a device and its scripted peers, oldest first."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._lock = threading.Lock()

    def add(self, line: Line) -> None:
        """Add a message; any thread may call it."""
        with self._lock:
            self.lines.append(line)

    def last(self, count: int = 6) -> str:
        """Return the last messages as lines, for the error of an expectation."""
        return "".join(f"\n  {str(line).rstrip()}" for line in self._sorted()[-count:])

    def _sorted(self) -> list[Line]:
        # A message is added when the test looks at it, which may be long after it came.
        with self._lock:
            return sorted(self.lines, key=lambda line: line.time)

    def __str__(self) -> str:
        lines = self._sorted()
        values = (f"\n{line}{line.details()}" for line in lines[-_IN_FULL:])
        return "".join([_HEADER, *map(str, lines), _VALUES, *values])
