"""Find complaints in the guest's kernel log: lines that report a fault, and fail the run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

PANIC: Final = "Kernel panic"

FAULTS: Final = (
    PANIC,
    r"\bOops\b|general protection fault|kernel BUG at|\bBUG: ",
    r"\bWARNING: ",
    r"INFO: task .* blocked for more than|INFO: .*detected stalls?|soft lockup|hard LOCKUP",
    r"\bKASAN: |\bUBSAN: |\bKCSAN: |\bKFENCE: |kmemleak: \d+ new suspected",
    r"possible (?:circular|recursive) locking|inconsistent lock state|suspicious RCU usage|irq lock inversion",
    r"refcount_t: |list_(?:add|del) corruption|unregister_netdevice: waiting for",
    r"Out of memory: |invoked oom-killer",
    # Written to the console by the guest's PID 1 (init.py) when it fails, not by the kernel.
    r"^lab: |Traceback \(most recent call last\)",
)
COMPLAINT: Final = re.compile("|".join(FAULTS))

# What begins the line by which the lab notes that a test begins.
TEST: Final = "wg-interop: begins "

STAMP: Final = re.compile(r"^(?:<\d+>)?(?:\[ *\d+\.\d+\] ?(?:\[ *[TC]\d+\] ?)?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """A complaint that is ignored. reason: why it is not a fault."""

    pattern: re.Pattern[str]
    reason: str


def load_noise(table: Path) -> tuple[Noise, ...]:
    """Read the `[[noise]]` tables of kernels.toml; UsageError for a mistake in the file."""
    entries = read_toml(table, table.name).tables("noise")
    return tuple(Noise(pattern=re.compile(entry.text("pattern")), reason=entry.text("reason")) for entry in entries)


def complaints(log: str, noise: Iterable[Noise]) -> Iterator[str]:
    """Yield the lines of a kernel log that report a fault, without time stamps, each text once, in order."""
    noise = tuple(noise)
    seen = set()
    for line in log.splitlines():
        text = STAMP.sub("", line).strip()
        if text in seen or not COMPLAINT.search(text) or any(entry.pattern.search(text) for entry in noise):
            continue
        seen.add(text)
        yield text


def running_test(log: str, complaint: str) -> str:
    """Return the test that had begun last when the kernel logged a complaint; empty if none had."""
    test = ""
    for line in log.splitlines():
        text = STAMP.sub("", line).strip()
        if text.startswith(TEST):
            test = text.removeprefix(TEST)
        elif text == complaint:
            break
    else:
        return ""
    return test


def excerpt(log: str, complaints: Iterable[str], count: int) -> list[str]:
    """Return `count` lines from the first of `complaints` on, or the last `count` lines that are not empty."""
    texts = set(complaints)
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if STAMP.sub("", line).strip() in texts]
    return lines[starts[0] :][:count] if starts else lines[-count:]
