"""Measure TCP throughput between two copies of a program, and how long it takes to start."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harness import LOOPBACK, V4_OF_B, Lab, Tunnel, tcp_stream

if TYPE_CHECKING:
    from harness import Manifest

STREAM = 4 << 20  # bytes


def seconds_per_mebibyte(manifest: Manifest) -> float:
    """Return the seconds per MiB of one TCP stream from A to B; both ends run this implementation."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        try:
            tunnel = Tunnel(lab, LOOPBACK, manifest, manifest)
            tunnel.must_ping("ns1", V4_OF_B)
            rate = tcp_stream(tunnel.nodes["ns1"], tunnel.nodes["ns2"], V4_OF_B, size=STREAM)
            return (1 << 20) / rate
        finally:
            lab.close()


def start_up(manifest: Manifest) -> float:
    """Return the seconds from the start of the program until its control socket answers."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        try:
            node = lab.node("ns0")
            started = time.perf_counter()
            lab.interface("wg0", manifest, node).get()
            return time.perf_counter() - started
        finally:
            lab.close()
