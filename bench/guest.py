"""Measure the time from a command to its verdict from a guest with Debian's kernel."""

from __future__ import annotations

import time

from harness import HarnessError
from harness.vm import boot, kernels


def first_verdict() -> float:
    """Seconds from the call to the exit status of `wg --version` in a guest."""
    started = time.perf_counter()
    result = boot.boot(kernels.CATALOGUE.default, ["wg", "--version"])
    if result.exit_status() != 0:
        raise HarnessError(boot.explain(result))
    return time.perf_counter() - started
