"""Measure what a flood costs refwg in CPU and memory, and how soon a peer connects.

At full size it takes minutes: `.venv/bin/python harness/sandbox/launcher.py -- .venv/bin/python -m bench.floods`.
bench/run sends smaller floods, and selftests/netns/test_refwg_flood.py checks that a peer connects during them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import Lab
from selftests.support.floods import (
    FULL_RATE,
    INITIATIONS_WITH_COOKIE,
    MAX_GROWTH,
    Flood,
    answered_with_cookie,
    quiet,
)

if TYPE_CHECKING:
    from harness import Manifest

FULL_SIZE: Final = {"garbage": 1_000_000, "initiations": 1_000_000, "forged": 100_000}  # datagrams


def measured(refwg: Manifest) -> dict[str, float]:
    """Measure every kind of flood; return the CPU seconds, keyed by the figure's name. refwg: or a variant of it."""
    return {f"flood_{kind}": seconds_per_100_000(kind, quiet(refwg)) for kind in FULL_SIZE}


def seconds_per_100_000(kind: str, refwg: Manifest) -> float:
    """Return the CPU seconds that refwg needs for 100 000 datagrams of this kind, of those that it reads."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        try:
            result = Flood(lab, refwg).run(kind, 50_000, 0)
            return result.cpu / max(1, result.read) * 100_000
        finally:
            lab.close()


def main() -> int:
    """Send each flood at full size and print its result; return 1 if memory grew too much or no peer connected."""
    status = 0
    for kind, count in FULL_SIZE.items():
        with tempfile.TemporaryDirectory() as directory:
            lab = Lab(Path(directory))
            try:
                # Under load A answers B's first initiation with a cookie, and B waits five seconds before the next.
                result = Flood(lab).run(kind, count, FULL_RATE, patience=5.0 if kind == "garbage" else 12.0)
            finally:
                lab.close()
        is_good = result.growth <= MAX_GROWTH and result.connected is not None
        status |= not is_good
        print(f"{kind}: {result}: {'ok' if is_good else 'FAILED'}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        try:
            with_cookie = answered_with_cookie(lab, "forged", FULL_RATE)
        finally:
            lab.close()
    is_good = with_cookie.answered * 2 >= INITIATIONS_WITH_COOKIE and with_cookie.connected is not None
    status |= not is_good
    print(f"with a cookie: {with_cookie}: {'ok' if is_good else 'FAILED'}", flush=True)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
