"""Check after a test that a program is healthy: alive, no crash report, no leak, clean end.

The process must still be the one that was started. Its log must not hold a report of a crash, a race detector or a
sanitizer. It must not have more descriptors or threads than at its start, beyond a limit. It must end within
`stop_after` seconds of SIGTERM, 2 unless its manifest gives another number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import DeadlineExceeded
from harness.wait import scaled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from harness.implementations.manifest import Manifest
    from harness.sandbox.process import Process

# Crash reports of the runtimes and sanitizers of C, Go, Python and Rust.
CRASH_PATTERNS: Final = (
    r"^panic: ",
    r"^fatal error: ",
    r"WARNING: DATA RACE",
    # Newer versions of Rust print the thread's id too. A panic ends the program only in the main thread.
    r"thread '.*'( \(\d+\))? panicked at",
    r"^memory allocation of \d+ bytes failed",
    r"(Address|Thread|Leak|Memory)Sanitizer",
    r"runtime error: ",
    r"^Traceback \(most recent call last\)",
    r"Segmentation fault|SIGSEGV",
)
_ENOUGH: Final = 3  # crash reports that a message quotes
_LONGEST: Final = 1 << 16  # bytes of one crash report and its reason
_PIECE: Final = 1 << 24  # bytes of a log that are searched at a time: a program may write gigabytes


@dataclass(frozen=True, slots=True)
class Size:
    """The number of open descriptors and of threads of a process."""

    descriptors: int
    threads: int


def size_of(pid: int) -> Size:
    """Count the descriptors and threads of a process in /proc; raises OSError if it has ended."""
    process = Path("/proc", str(pid))
    return Size(len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())))


class CrashReports:
    """Finds crash reports in a program's log; each call reads only what was added since the last one.

    log: the file of its output. patterns: regular expressions that match within one line.
    """

    def __init__(self, log: Path, patterns: Iterable[str]) -> None:
        self._log = log
        # One search per pattern: an alternation of all takes ten times as long, and a log may have 130 560 lines.
        self._patterns = [re.compile(pattern.encode(), re.MULTILINE) for pattern in patterns]
        self._read = 0
        self._found: dict[int, str] = {}  # by offset

    def lines(self) -> list[str]:
        """Return the first crash reports found so far, at most three; empty if there is none."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            while len(text := log.read(_PIECE)) == _PIECE:
                self._search(text)
                log.seek(self._read)
        self._search(text)
        return [self._found[offset] for offset in sorted(self._found)[:_ENOUGH]]

    def _search(self, text: bytes) -> None:
        """Search the next piece of the log, from where the last one ended."""
        for pattern in self._patterns:
            for start, line, why in islice(_lines_with(pattern, text), _ENOUGH):
                # Rust prints the place of a panic on one line and the reason on the next.
                whole = line + b" " + why if line.endswith(b":") else line
                self._found[self._read + start] = f"wrote: {whole.decode(errors='replace')}".rstrip()
        # Read the last two lines again: the last may be incomplete, and the one before may still get its reason.
        kept = text.rfind(b"\n", 0, max(text.rfind(b"\n"), 0)) + 1
        # A piece without two lines is one long line: go on behind it.
        self._read += kept or len(text) * (len(text) == _PIECE)


def _lines_with(pattern: re.Pattern[bytes], text: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield each line in which the pattern matches: its offset, the line, and the next line."""
    end = -1
    while hit := pattern.search(text, end + 1):
        start = text.rfind(b"\n", 0, hit.start()) + 1
        line, _, after = text[start : start + _LONGEST].partition(b"\n")
        # A match that crosses the end of the line does not count.
        if pattern.search(line):
            yield start, line, after.partition(b"\n")[0]
        end = text.find(b"\n", hit.start())
        if end < 0:
            return


class HealthCheck:
    """Health check of one process; counts its descriptors and threads when it is created."""

    def __init__(self, process: Process, manifest: Manifest) -> None:
        self._process = process
        self._manifest = manifest
        self._who = f"{manifest.name} (pid {process.pid})"
        self._at_start = size_of(process.pid)
        self._crashes = CrashReports(process.log, (*CRASH_PATTERNS, *manifest.complaints))

    def complaints(self) -> list[str]:
        """Return a sentence for each fault of the process now; empty if it is healthy."""
        return [f"{self._who} {text}" for text in (self._death(), self._growth(), *self._crashes.lines()) if text]

    def end(self) -> list[str]:
        """Send SIGTERM and return all complaints, also that the process did not end in time or died of a signal.

        A process that does not end in time is killed.
        """
        found = self.complaints()
        was_running = self._process.running
        try:
            status = self._process.terminate(self._manifest.stop_after)
        except DeadlineExceeded:
            found.append(f"{self._who} still ran {scaled(self._manifest.stop_after):g} s after SIGTERM")
        else:
            if was_running and status < 0 and status != -15:  # noqa: PLR2004 - SIGTERM itself
                found.append(f"{self._who} died of signal {-status} after SIGTERM")
        self._process.close()
        # A sanitizer reports leaks at exit, and a crash at exit may still leave status 0.
        crashes = [f"{self._who} {text}" for text in self._crashes.lines()]
        return found + [text for text in crashes if text not in found]

    def _death(self) -> str | None:
        status = self._process.status
        if status is None:
            return None
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{how} during the test; it last wrote:\n{self._process.tail()}"

    def _growth(self) -> str | None:
        if not self._process.running:
            return None
        now = size_of(self._process.pid)
        grown = [
            f"{after - before} {what} more than at its start ({before}); {allowed} are allowed"
            for what, before, after, allowed in [
                ("descriptors", self._at_start.descriptors, now.descriptors, self._manifest.descriptors),
                ("threads", self._at_start.threads, now.threads, self._manifest.threads),
            ]
            if after - before > allowed
        ]
        return f"has {' and '.join(grown)}" if grown else None
