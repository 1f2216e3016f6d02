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
    """Return whether this process runs in a sandbox.

    The variable names the PID namespace it is valid in, so one inherited from another sandbox does not count.
    """
    return os.environ.get(INSIDE) == str(os.stat("/proc/self/ns/pid").st_ino)  # noqa: PTH116 - called for every node


def require_sandbox() -> None:
    """Raise Unavailable, with reason and remedy, unless this process runs in a sandbox."""
    if not inside():
        reason = refused() or "start pytest with the plugin of wg-interop, or `wg-interop run`; both create one"
        raise Unavailable(f"no sandbox: {reason}")


def refused() -> str | None:
    """Return why the launcher could not create a sandbox; None in a sandbox, and if it did not try."""
    return None if inside() else os.environ.get(REFUSED)


def launcher_command(*options: str) -> list[str]:
    """Return the launcher's command line up to and with the Python that it starts; the caller adds the arguments.

    options: of launcher.py.
    """
    return [sys.executable, "-ISE", str(LAUNCHER), *options, "--", sys.executable]


def pytest_command(*, guests: bool) -> list[str]:
    """Return the command line of a pytest in a sandbox, killed when this process ends; the caller adds the arguments.

    guests: for lanes vm and warp pytest first downloads kernels, which needs the network; then it enters the sandbox
    itself.
    """
    sandbox = "--without" if guests else "--or-without"
    return [*launcher_command("--die-with", str(os.getpid()), sandbox), "-P", "-m", "pytest"]
