"""What bench/suite runs in its guest: the suites one after the other, each timed, with the words of neither lost.

Arguments: where the results go, and a JSON object of commands by name. Figures go to `figures.json` there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

FIGURES: Final = "figures.json"
PATIENCE: Final = 1200.0  # seconds for either suite
PACE: Final = 10.0  # seconds between two signs of life
SHOWN_LINES: Final = 15  # of one that failed
_COLOR: Final = re.compile("\x1b\\[[0-9;]*m")


def main() -> None:
    results = Path(sys.argv[1])
    figures = {name: timed(name, command, results) for name, command in json.loads(sys.argv[2]).items()}
    (results / FIGURES).write_text(json.dumps(figures))


def timed(name: str, command: Sequence[str], results: Path) -> dict[str, float]:
    """Run one suite to its end, or until it is overdue; its status and its seconds."""
    started = told = time.monotonic()
    last: deque[str] = deque(maxlen=SHOWN_LINES)
    with (
        (results / f"{name}.log").open("w") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
            text=True,
        ) as child,
    ):
        overdue = threading.Timer(PATIENCE, child.kill)
        overdue.start()
        for line in child.stdout or ():
            log.write(line)
            last.append(_COLOR.sub("", line).rstrip())
            if time.monotonic() - told > PACE:
                told = time.monotonic()
                print(f"{name}: {told - started:.0f} s: {last[-1]}", flush=True)
        overdue.cancel()
    figure = {"status": child.returncode, "seconds": round(time.monotonic() - started, 2)}
    print(name, figure, flush=True)
    if child.returncode:
        print(*last, sep="\n", flush=True)
    return figure


if __name__ == "__main__":
    main()
