"""Measure what a tunnel carries, by iperf3: TCP streams, and UDP packets without loss."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.processes import cpu_seconds, peak_memory
from bench.search import NothingPassedError, Probe, highest_rate
from bench.tunnels import tunnel
from harness import V4_OF_B, HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from harness import Manifest, Tunnel

UDP_HEADERS: Final = 28  # bytes of the IPv4 and UDP headers in a packet
FIRST_RATE: Final = 5000.0  # packets per second, to begin a search with
_KNOWN_GROWTH: Final = 1.15  # first factor of a search that begins at the result of the last round
_BUFFER: Final = 4 << 20  # bytes of a UDP socket's buffers, if the system allows as much
_PATIENCE: Final = 20  # seconds that iperf3 may take beside the traffic
_GIGABIT: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a run of iperf3 did. ended: `end` of its JSON output. cpu: CPU seconds of A and B; None for the driver."""

    ended: Mapping[str, Any]
    cpu: tuple[float | None, float | None]

    def cpu_figures(self, name: str, units: float) -> dict[str, float]:
        """Return the CPU time of the sender A, of the receiver B and of both, divided by `units`."""
        sender, receiver = self.cpu
        if sender is None or receiver is None:
            return {}
        return {
            f"{name}_cpu": (sender + receiver) / units,
            f"{name}_cpu_sender": sender / units,
            f"{name}_cpu_receiver": receiver / units,
        }


def tcp(name: str, manifest: Manifest, *, seconds: int, streams: int, back: bool) -> dict[str, float]:
    """Measure TCP from A to B, or with `back` from B to A; returns the figures.

    name: of the measurement. streams: at the same time.
    """
    with tunnel(manifest) as pair:
        arguments = ["-t", str(seconds), "-P", str(streams), *(["-R"] if back else [])]
        load = iperf3(pair, arguments, seconds)
        received = load.ended["sum_received"]
        bits = received["bytes"] * 8
        if back:
            load = Load(ended=load.ended, cpu=(load.cpu[1], load.cpu[0]))
        peaks = [peak for peak in (peak_memory(pair.a), peak_memory(pair.b)) if peak is not None]
    figures = {name: bits / received["seconds"] / 1e6, **load.cpu_figures(name, bits / _GIGABIT)}
    return figures | ({f"{name}_memory": max(peaks)} if peaks else {})


def udp(
    name: str, manifest: Manifest, *, seconds: int, size: int, guess: float | None, note: Callable[[str], None]
) -> dict[str, float]:
    """Search for the highest rate of UDP packets from A to B of which less than 1 % are lost; returns the figures.

    size: bytes of a packet, with IPv4 and UDP headers. guess: a rate to begin with; None if none is known. note: gets
    a line about each rate that is tried.
    """
    loads: dict[Probe, Load] = {}

    def probe(rate: float) -> Probe:
        payload = size - UDP_HEADERS
        arguments = ["-u", "-t", str(seconds), "-l", str(payload), "-b", f"{rate * payload * 8:.0f}", *_buffers()]
        load = iperf3(pair, arguments, seconds)
        total = load.ended["sum"]
        tried = Probe(
            offered=rate,
            sent=total["packets"],
            received=total["packets"] - total["lost_packets"],
            seconds=total["seconds"],
        )
        loads[tried] = load
        note(f"{rate:.0f} packets/s: {tried.loss:.1%} lost")
        return tried

    with tunnel(manifest) as pair:
        try:
            best = highest_rate(probe, guess or FIRST_RATE, _KNOWN_GROWTH if guess else 2.0)
        except NothingPassedError as error:
            raise HarnessError(f"{manifest.name}: {error}") from error
    return {name: best.rate, **loads[best].cpu_figures(name, best.received / 1e6)}


def _buffers() -> list[str]:
    """Return the option that enlarges the sockets' buffers: what a full buffer of iperf3 loses, no tunnel has lost."""
    allowed = [int(Path("/proc/sys/net/core", name).read_text()) for name in ("rmem_max", "wmem_max")]
    return ["-w", str(min(_BUFFER, *allowed))]


def iperf3(pair: Tunnel, arguments: Sequence[str], seconds: int) -> Load:
    """Run iperf3 from A to B through the tunnel; raises HarnessError if it fails.

    arguments: of the client. seconds: how long it sends.
    """
    with server(pair):
        before = (cpu_seconds(pair.a), cpu_seconds(pair.b))
        output = pair.nodes["ns1"].run(client(arguments), deadline=seconds + _PATIENCE, check=False).stdout
        after = (cpu_seconds(pair.a), cpu_seconds(pair.b))
    try:
        answer = json.loads(output)
    except ValueError as error:
        raise HarnessError(f"iperf3 printed no JSON: {output[:200]!r}") from error
    if "error" in answer:
        raise HarnessError(f"iperf3: {answer['error']}")
    return Load(ended=answer["end"], cpu=(_spent(before[0], after[0]), _spent(before[1], after[1])))


def client(arguments: Sequence[str]) -> list[str]:
    """Return the command of the client in A."""
    return ["iperf3", "-c", V4_OF_B, "-J", "--connect-timeout", "5000", *arguments]


@contextmanager
def server(pair: Tunnel) -> Iterator[None]:
    """Serve one client of iperf3 in B while the block runs."""
    log = pair.lab.directory / "iperf3-server.log"
    log.unlink(missing_ok=True)
    process = pair.nodes["ns2"].spawn(["iperf3", "-s", "-1", "-B", V4_OF_B, "--forceflush"], log=log)
    try:
        process.says("Server listening")
        yield
    finally:
        process.kill()
        process.close()


def _spent(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
