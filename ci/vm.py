"""Run a command under a kernel of your choice: the same as `python -m harness.vm`."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module("harness.vm", run_name="__main__", alter_sys=True)
