"""Build the launcher's command line, and check whether this process is in a sandbox."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from harness.errors import Unavailable
from harness.sandbox.launcher import INSIDE, REFUSED

LAUNCHER: Final = Path(__file__).with_name("launcher.py")


def inside() -> bool:
    """Whether this process runs in a sandbox of its own; a value inherited from elsewhere does not count."""
    return os.environ.get(INSIDE) == str(os.stat("/proc/self/ns/pid").st_ino)  # noqa: PTH116 - called for every node


def require_sandbox() -> None:
    """Raise Unavailable, with the reason, unless this process runs in a sandbox of its own."""
    if not inside():
        reason = refused() or "start pytest with this plugin, or wg-interop run, which make one"
        raise Unavailable(f"no sandbox: {reason}")


def refused() -> str | None:
    """Why there is no sandbox, if one was tried in vain."""
    return None if inside() else os.environ.get(REFUSED)


def launcher_command(*options: str) -> list[str]:
    """The command line of the launcher up to the command that it is to run."""
    return [sys.executable, "-ISE", str(LAUNCHER), *options, "--", sys.executable]
