"""Print how long a step of a set-up took, and its progress every few seconds while it runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from types import TracebackType

# A callback that gets each line of a step's output, such as a compiler's.
OnLine = Callable[[str], None]

QUIET: Final = 3.0  # seconds before the first line of progress
PACE: Final = {True: 0.5, False: 10.0}  # seconds between two lines of progress: on a terminal, in a log
WIDTH: Final = 60  # characters of output shown: a terminal cannot overwrite a line that wraps


class Step:
    """A step of a set-up, as a context manager. note: printed when it has succeeded; seconds: how long it took."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.note = ""
        self.seconds = 0.0
        self._last_line = ""
        self._terminal = sys.stdout.isatty()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def on_line(self, line: str) -> None:
        """Set the line of output to show as progress."""
        self._last_line = line.strip()

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._ticker.join()
        self.seconds = time.monotonic() - self._start
        self._print("ok" if error is None else "FAILED", self.note if error is None else _how(error), end="\n")

    def _tick(self) -> None:
        wait = QUIET
        while not self._over.wait(wait):
            self.seconds = time.monotonic() - self._start
            self._print("..", self._last_line[:WIDTH], end="" if self._terminal else "\n")
            wait = PACE[self._terminal]

    def _print(self, mark: str, text: str, *, end: str) -> None:
        line = step_line(mark, self.name, self.seconds, text)
        # On a terminal each line of progress overwrites the one before.
        print(f"\r\033[K{line}" if self._terminal else line, end=end, flush=True)


def step_line(mark: str, name: str, seconds: float, note: str = "") -> str:
    """Format one row of the table of steps."""
    return f"{mark:<9}  {name:<20} {seconds:7.1f} s  {note}".rstrip()


def _how(error: BaseException) -> str:
    # The caller prints the message of the error.
    return "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else ""
