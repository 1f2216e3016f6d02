"""Measure how long a program takes from its start until its control socket answers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench.processes import cpu_seconds, peak_memory
from bench.tunnels import laboratory
from selftests.support.floods import quiet

if TYPE_CHECKING:
    from harness import Manifest


def start(name: str, manifest: Manifest) -> dict[str, float]:
    """Start a program; returns milliseconds until its control socket answers, its CPU time until then, its memory."""
    with laboratory() as lab:
        node = lab.node("ns1")
        started = time.perf_counter()
        interface = lab.interface("wg0", quiet(manifest), node)
        interface.get()
        figures = {name: (time.perf_counter() - started) * 1000}
        if (cpu := cpu_seconds(interface)) is not None:
            figures[f"{name}_cpu"] = cpu * 1000
        if (memory := peak_memory(interface)) is not None:
            figures[f"{name}_memory"] = memory
    return figures
