"""Run and time both suites inside the guest of bench/suite, one after the other.

Arguments: the directory for results, and a JSON object that maps the name of a suite to a number of processes and a
command. Each process runs the command for its shard of the tests. If there are several, each has network, mounts and
/run of its own. Logs and `figures.json` go to the directory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from harness.lanes import SHARD
from harness.sandbox import launcher

if TYPE_CHECKING:
    from collections.abc import Sequence

FIGURES: Final = "figures.json"
PATIENCE: Final = 1200.0  # seconds for either suite; then it is killed
PACE: Final = 10.0  # seconds between two lines of progress
APART: Final = "--apart"  # first argument of a process that runs a shard in namespaces of its own
SHOWN_LINES: Final = 15  # last lines of a failed suite that are printed
_COLOR: Final = re.compile("\x1b\\[[0-9;]*m")


def main() -> None:
    """Run the suites that the command line names, and write their figures."""
    results = Path(sys.argv[1])
    suites = json.loads(sys.argv[2]).items()
    figures = {name: timed(name, at_once, command, results) for name, (at_once, command) in suites}
    (results / FIGURES).write_text(json.dumps(figures))


def timed(name: str, at_once: int, command: Sequence[str], results: Path) -> dict[str, float]:
    """Run one suite until it ends, or kill it after PATIENCE; print progress.

    Returns `status`, the first that is not 0, and `seconds`.
    """
    started = printed = time.monotonic()
    last: deque[str] = deque(maxlen=SHOWN_LINES)
    reading, writing = os.pipe()
    children = [start(command, f"{number}/{at_once}", writing) for number in range(at_once)]
    os.close(writing)
    overdue = threading.Timer(PATIENCE, kill, [children])
    overdue.start()
    with (results / f"{name}.log").open("w") as log, os.fdopen(reading, errors="replace") as output:
        for line in output:
            log.write(line)
            last.append(_COLOR.sub("", line).rstrip())
            if time.monotonic() - printed > PACE:
                printed = time.monotonic()
                print(f"{name}: {printed - started:.0f} s: {last[-1]}", flush=True)
    statuses = [child.wait() for child in children]
    overdue.cancel()
    figure = {"status": next(filter(None, statuses), 0), "seconds": round(time.monotonic() - started, 2)}
    print(name, figure, flush=True)
    if figure["status"]:
        print(*last, sep="\n", flush=True)
    return figure


def start(command: Sequence[str], shard: str, output: int) -> subprocess.Popen[bytes]:
    """Start a command for a shard like `0/2`, with namespaces of its own unless it is the only one.

    output: descriptor for its stdout and stderr.
    """
    words = command if shard == "0/1" else [sys.executable, "-m", "bench.suite_inside", APART, *command]
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, SHARD: shard}
    )


def kill(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill all processes of a suite."""
    for child in children:
        child.kill()


def apart(command: Sequence[str]) -> NoReturn:
    """Execute this command in new mount and network namespaces, so that its names cannot clash with another shard's."""
    launcher.unshare(launcher.CLONE_NEWNS | launcher.CLONE_NEWNET)
    launcher.private_mounts()
    launcher.loopback_up()
    os.execvp(command[0], [*command])  # noqa: S606 - no shell is needed


if __name__ == "__main__":
    if sys.argv[1] == APART:
        apart(sys.argv[2:])
    main()
