"""Measure the time from booting a guest with Debian's kernel to a command's exit status."""

from __future__ import annotations

import time

from harness import HarnessError
from harness.vm import boot, kernels


def first_verdict() -> float:
    """Boot a guest that runs `wg --version`; return the seconds until its exit status is here.

    Raises HarnessError if the guest or the command failed.
    """
    started = time.perf_counter()
    result = boot.boot(kernels.CATALOGUE.default, ["wg", "--version"])
    if result.exit_status() != 0:
        raise HarnessError(boot.explain(result))
    return time.perf_counter() - started
