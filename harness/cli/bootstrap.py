"""Install the lab's wheel on a host and start it there, for `wg-interop run --on`.

It runs as `python3 -c`, before the lab is there, so it needs only the standard library. It reads a line of JSON from
stdin, then the wheel if it asks for it, and becomes harness/cli/hosted.py. Everything that it writes is an event.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

# Written when the installation is whole.
COMPLETE: Final = "complete"
KEPT_DAYS: Final = 30
_TAIL: Final = 3  # last lines of a command's output in a message


def main() -> NoReturn:
    """Read the order, install what it names unless that is there, and start it."""
    order = json.loads(_read_line())
    place = _place()
    home = place / order["hash"]
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock:
        # Another run may be installing the same wheel.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("doing", text="waiting for another installation there")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / COMPLETE).exists():
            _install(order, home)
        (home / COMPLETE).touch()
        _remove_old(place)
    python = str(home / "bin" / "python")
    os.execv(python, [python, "-P", "-m", "harness", "hosted"])  # noqa: S606 - argv list, no shell


def _place() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "wg-interop" / "on"  # noqa: PTH117


def _say(event: str, **values: str) -> None:
    os.write(1, b"\x1e" + json.dumps({"event": event, **values}).encode() + b"\n")


def _fail(reason: str, home: Path) -> NoReturn:
    shutil.rmtree(home, ignore_errors=True)
    _say("unfit", reason=reason)
    sys.exit(1)


def _read_line() -> bytes:
    """Read one line and not a byte more: what follows is the wheel, or for the program that takes our place."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(1)
        line += byte
    return line


def _install(order: dict[str, object], home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    _say("send")
    wheel = b""
    while len(wheel) < int(str(order["size"])):
        piece = os.read(0, 1 << 16)
        if not piece:
            sys.exit(1)
        wheel += piece
    if hashlib.sha256(wheel).hexdigest() != order["sha256"]:
        _fail("the wheel arrived changed", home)
    _say("doing", text=f"making {home}")
    _run([sys.executable, "-m", "venv", str(home)], "install the package python3-venv there", home)
    file = home / str(order["name"])
    file.write_bytes(wheel)
    _say("doing", text="installing wg-interop and what it depends on, by pip")
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
    _run([*pip, str(file)], "pip needs an index that it can reach: see `pip config` there", home)


def _run(command: Sequence[str], remedy: str, home: Path) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.decode(errors="replace").split("\n") if line.strip()]
        _fail(f"{' '.join(command[1:4])} failed ({remedy}): {' / '.join(lines[-_TAIL:])}", home)


def _remove_old(place: Path) -> None:
    """Remove installations that no run has used for a month."""
    for mark in place.glob(f"*/{COMPLETE}"):
        if mark.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
            shutil.rmtree(mark.parent, ignore_errors=True)


if __name__ == "__main__":
    main()
