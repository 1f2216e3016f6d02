"""Find complaints in the guest's kernel log; one is enough to fail a run."""

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
    # The last row is ours: the guest's PID 1 (init.py) writes to the console when it fails.
    r"^lab: |Traceback \(most recent call last\)",
)
COMPLAINT: Final = re.compile("|".join(FAULTS))

STAMP: Final = re.compile(r"^(?:<\d+>)?(?:\[ *\d+\.\d+\] ?(?:\[ *[TC]\d+\] ?)?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """A complaint that means nothing where it comes from."""

    pattern: re.Pattern[str]
    reason: str


def load_noise(table: Path) -> tuple[Noise, ...]:
    entries = read_toml(table, table.name).tables("noise")
    return tuple(Noise(pattern=re.compile(entry.text("pattern")), reason=entry.text("reason")) for entry in entries)


def complaints(log: str, noise: Iterable[Noise]) -> Iterator[str]:
    """The lines of a kernel's log that tell of a fault, without their time stamps, each text once."""
    noise = tuple(noise)
    seen = set()
    for line in log.splitlines():
        text = STAMP.sub("", line).strip()
        if text in seen or not COMPLAINT.search(text) or any(entry.pattern.search(text) for entry in noise):
            continue
        seen.add(text)
        yield text


def excerpt(log: str, found: Iterable[str], count: int) -> list[str]:
    """`count` lines from the first complaint on; without one, the last lines that say anything."""
    found = set(found)
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if STAMP.sub("", line).strip() in found]
    return lines[starts[0] :][:count] if starts else lines[-count:]
