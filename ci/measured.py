"""Run pytest with coverage in its workers, and join what they measured.

Also the plugin that ends the measurement at a worker: the programs that its tests start would only run slower.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

# Tells a Python program which coverage to begin with (`patch = ["subprocess"]` in pyproject.toml).
_FOR_CHILDREN: Final = "COVERAGE_PROCESS_CONFIG"


def pytest_configure(config: pytest.Config) -> None:
    """Do not measure the programs that this worker's tests start."""
    if hasattr(config, "workerinput"):
        os.environ.pop(_FOR_CHILDREN, None)


def main(arguments: Sequence[str]) -> int:
    """Run `pytest ARGUMENTS`; return its exit status, or that of coverage if pytest's is 0.

    The file .coverage has then what all workers ran, and nothing of runs before.
    """
    # Ctrl-C reaches pytest too. It tells what it has run so far, and this process waits for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    coverage = (sys.executable, "-m", "coverage")
    subprocess.run((*coverage, "erase"), check=True)
    status = subprocess.run((*coverage, "run", "-m", "pytest", "-p", __spec__.name, *arguments), check=False).returncode
    joined = subprocess.run((*coverage, "combine", "--quiet"), check=False).returncode
    return status or joined


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
