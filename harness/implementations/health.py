"""Check after a test that a program is well: alive, no crash report, no leak, clean end.

It must be the process that was started, must not have written what a crash, a race detector or a sanitizer writes, must
not have grown in descriptors or threads, and must end by itself soon after SIGTERM: within 2 s, or what its manifest
gives as `stop_after`.
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

# What the runtimes and sanitizers of the usual languages write when a program has gone wrong.
CRASH_PATTERNS: Final = (
    r"^panic: ",
    r"^fatal error: ",
    r"WARNING: DATA RACE",
    # Rust of today names the thread's id as well, and goes on unless it was the main thread.
    r"thread '.*'( \(\d+\))? panicked at",
    r"^memory allocation of \d+ bytes failed",
    r"(Address|Thread|Leak|Memory)Sanitizer",
    r"runtime error: ",
    r"^Traceback \(most recent call last\)",
    r"Segmentation fault|SIGSEGV",
)
_ENOUGH: Final = 3  # crash reports are named
_LONGEST: Final = 1 << 16  # bytes of a crash report and its reason


@dataclass(frozen=True, slots=True)
class Size:
    """What a process holds: open descriptors and threads."""

    descriptors: int
    threads: int


def size_of(pid: int) -> Size:
    """Count descriptors and threads of a process; raises OSError when it is gone."""
    process = Path("/proc", str(pid))
    return Size(len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())))


class CrashReports:
    """What a program wrote that only a program gone wrong writes; each look reads what came since the last.

    log: the file of its output. patterns: regular expressions for one line.
    """

    def __init__(self, log: Path, patterns: Iterable[str]) -> None:
        self._log = log
        # Each by itself: an alternation of all takes ten times as long, and a log may have a line for each allowed-ip.
        self._patterns = [re.compile(pattern.encode(), re.MULTILINE) for pattern in patterns]
        self._read = 0
        self._found: dict[int, str] = {}  # by offset

    def lines(self) -> list[str]:
        """The first lines so far that say that something is wrong; empty if none does."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        for pattern in self._patterns:
            for start, line, why in islice(_lines_with(pattern, text), _ENOUGH):
                # Rust says on one line where it panicked, and why on the next.
                whole = line + b" " + why if line.endswith(b":") else line
                self._found[self._read + start] = f"wrote: {whole.decode(errors='replace')}".rstrip()
        # The last line may grow yet, and the one before it may get its reason.
        self._read += text.rfind(b"\n", 0, max(text.rfind(b"\n"), 0)) + 1
        return [self._found[offset] for offset in sorted(self._found)[:_ENOUGH]]


def _lines_with(pattern: re.Pattern[bytes], text: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """The lines in which it matches: offset, line, the line after it."""
    end = -1
    while hit := pattern.search(text, end + 1):
        start = text.rfind(b"\n", 0, hit.start()) + 1
        line, _, after = text[start : start + _LONGEST].partition(b"\n")
        # What matches over the end of a line does not count.
        if pattern.search(line):
            yield start, line, after.partition(b"\n")[0]
        end = text.find(b"\n", hit.start())
        if end < 0:
            return


class HealthCheck:
    """Watches one process from the moment it is ready."""

    def __init__(self, process: Process, manifest: Manifest) -> None:
        self._process = process
        self._manifest = manifest
        self._who = f"{manifest.name} (pid {process.pid})"
        self._at_start = size_of(process.pid)
        self._crashes = CrashReports(process.log, (*CRASH_PATTERNS, *manifest.complaints))

    def complaints(self) -> list[str]:
        """All that is wrong with the process now, in words; empty if it is well. It goes on running."""
        return [f"{self._who} {text}" for text in (self._death(), self._growth(), *self._crashes.lines()) if text]

    def end(self) -> list[str]:
        """The last look: complaints, and whether the process ends by itself after SIGTERM."""
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
        # A sanitizer tells of leaks at the end, and a crash on the way out may still give status 0.
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
