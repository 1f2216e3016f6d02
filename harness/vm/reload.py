"""Run commands in a guest, each with another build of a kernel module loaded.

    python -m harness.vm.reload JOBS.json

The file is a list of jobs, in order: `{"module": PATH, "command": [...], "seconds": 300}`. Each job unloads the module
of this name, loads the file, and runs the command; a command that fails or is late does not stop the next one. The exit
status is 0 if all modules were loaded.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from harness.vm.init import SYS_FINIT_MODULE

_SYS_DELETE_MODULE: Final = 176
_O_NONBLOCK: Final = 0o4000

_libc: Final = ctypes.CDLL(None, use_errno=True)


def load(name: str, path: Path) -> None:
    """Replace the module that is loaded under this name by that in a file; raises OSError."""
    if _libc.syscall(_SYS_DELETE_MODULE, name.encode(), _O_NONBLOCK) == -1:
        raise OSError(ctypes.get_errno(), f"unload {name}: {os.strerror(ctypes.get_errno())}")
    with path.open("rb") as module:
        if _libc.syscall(SYS_FINIT_MODULE, module.fileno(), b"", 0) == -1:
            raise OSError(ctypes.get_errno(), f"load {path}: {os.strerror(ctypes.get_errno())}")


def main(arguments: list[str]) -> int:
    """Run all jobs of the file; returns the exit status."""
    for job in json.loads(Path(arguments[0]).read_text()):
        print(f"load {job['module']}", flush=True)
        load("wireguard", Path(job["module"]))
        try:
            subprocess.run(job["command"], check=False, stdin=subprocess.DEVNULL, timeout=job["seconds"])
        except subprocess.TimeoutExpired:
            print(f"stopped after {job['seconds']} s: {' '.join(job['command'])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
