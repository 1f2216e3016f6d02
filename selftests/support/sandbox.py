"""Run a few lines of Python in new namespaces with an empty /run."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child"]
_PREPARE = 'mount -t tmpfs none /run && ip link set lo up && exec "$@"'


def run_in_sandbox(setup: str, code: str, *, timeout: float = 100) -> str:
    """Run two pieces of Python there and return their output; skip where that is forbidden."""
    probe = subprocess.run([*_UNSHARE, "sh", "-c", _PREPARE, "sh", "test", "-w", "/dev/net/tun"], check=False)
    if probe.returncode:
        pytest.skip("no user namespace or no /dev/net/tun here: allow kernel.unprivileged_userns_clone, modprobe tun")
    command = [
        *_UNSHARE,
        "sh",
        "-c",
        _PREPARE,
        "sh",
        sys.executable,
        "-c",
        textwrap.dedent(setup) + textwrap.dedent(code),
    ]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert completed.returncode == 0, completed.stderr
    assert "Traceback" not in completed.stderr
    return completed.stdout
