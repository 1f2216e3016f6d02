"""Print how long a step took, and a sign of life every few seconds while it runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from types import TracebackType

# Told each line of news from a step, such as what a compiler prints.
OnLine = Callable[[str], None]

QUIET: Final = 3.0  # seconds before a step is long enough to speak of
PACE: Final = {True: 0.5, False: 10.0}  # seconds between two signs of life, on a terminal and in a log
WIDTH: Final = 60  # of the news: on a terminal a line that wraps could not be written over


class Step:
    """A step of a set-up; `on_line` takes news, `note` is what is printed when it is over."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.note = ""
        self.seconds = 0.0
        self._news = ""
        self._terminal = sys.stdout.isatty()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def on_line(self, line: str) -> None:
        self._news = line.strip()

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
        self._say("ok" if error is None else "FAILED", self.note if error is None else _how(error), end="\n")

    def _tick(self) -> None:
        wait = QUIET
        while not self._over.wait(wait):
            self.seconds = time.monotonic() - self._start
            self._say("..", self._news[:WIDTH], end="" if self._terminal else "\n")
            wait = PACE[self._terminal]

    def _say(self, mark: str, text: str, *, end: str) -> None:
        line = step_line(mark, self.name, self.seconds, text)
        # A terminal shows one line per step, written over until it ends.
        print(f"\r\033[K{line}" if self._terminal else line, end=end, flush=True)


def step_line(mark: str, name: str, seconds: float, note: str = "") -> str:
    """One row of the table that a run of steps is."""
    return f"{mark:<9}  {name:<20} {seconds:7.1f} s  {note}".rstrip()


def _how(error: BaseException) -> str:
    # The message itself is the caller's to print.
    return "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else ""
