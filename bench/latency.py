"""Measure round-trip times through a tunnel by ping(8), idle and beside a TCP stream."""

from __future__ import annotations

import math
import re
import statistics
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from bench.rates import client, server
from bench.tunnels import tunnel
from harness import V4_OF_B, HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from harness import Manifest, Tunnel

INTERVAL: Final = 0.01  # seconds between two requests
PERCENTILES: Final = (50, 90, 99)
_PATIENCE: Final = 15.0  # seconds that ping may take beside its requests
_LINGER: Final = 20  # seconds that the stream lasts longer than the requests; it is ended before
_TIME: Final = re.compile(r" time=([\d.]+) ms")


def pings(name: str, manifest: Manifest, *, count: int, loaded: bool) -> dict[str, float]:
    """Send echo requests from A to B every 10 ms; returns average and percentiles of the round-trip times, in ms.

    loaded: beside a TCP stream from A to B.
    """
    with tunnel(manifest) as pair:
        if loaded:
            with stream(pair, seconds=count * INTERVAL + _LINGER):
                return summary(name, _times(pair, count), count)
        return summary(name, _times(pair, count), count)


def _times(pair: Tunnel, count: int) -> list[float]:
    argv = ["ping", "-n", "-i", str(INTERVAL), "-c", str(count), "-W", "2", V4_OF_B]
    # Status 1: requests were lost.
    answer = pair.nodes["ns1"].run(argv, deadline=count * INTERVAL * 2 + _PATIENCE, check=False)
    return [float(text) for text in _TIME.findall(answer.stdout)]


def summary(name: str, times: Sequence[float], count: int) -> dict[str, float]:
    """Return average and percentiles of round-trip times; HarnessError if less than half of `count` were answered."""
    if len(times) * 2 < count:
        raise HarnessError(f"ping: {len(times)} of {count} requests were answered")
    figures = {f"{name}_avg": statistics.fmean(times)}
    return figures | {f"{name}_p{percent}": percentile(times, percent) for percent in PERCENTILES}


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the smallest value that at least `percent` of all values do not exceed (nearest rank)."""
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


@contextmanager
def stream(pair: Tunnel, *, seconds: float, streams: int = 1) -> Iterator[None]:
    """Let TCP streams run from A to B during the block; returns when they have connected."""
    log = pair.lab.directory / "iperf3-client.log"
    argv = [word for word in client(["-t", f"{seconds:.0f}", "-P", str(streams)]) if word != "-J"]
    with server(pair):
        process = pair.nodes["ns1"].spawn([*argv, "--forceflush", "-i", "0.5"], log=log)
        try:
            # The first line about a half-second: by now the stream is at its full rate.
            process.says(r"bits/sec")
            yield
            if not process.running:
                raise HarnessError(f"the stream ended before the block: {process.tail()}")
        finally:
            process.kill()
            process.close()
