"""Measure what a flood costs refwg in CPU and memory, and how soon a peer connects.

The full size, some minutes: `.venv/bin/python harness/sandbox/launcher.py -- .venv/bin/python -m bench.floods`
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import (
    LOOPBACK,
    V4_OF_A,
    Datagram,
    DeadlineExceeded,
    Lab,
    Registry,
    Tunnel,
    let_pass,
    udp_message,
    udp_receiver,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Interface
    from harness.sandbox.process import Process

MEBIBYTE: Final = 1 << 20
FULL_SIZE: Final = {"garbage": 1_000_000, "initiations": 1_000_000, "forged": 100_000}
FULL_RATE: Final = 64_000
MAX_GROWTH: Final = 10 * MEBIBYTE
PORT_OF_A, DISCARD = 1, 9
_LOOK_AGAIN: Final = 0.05
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of a flood.

    sent: datagrams; read: how many of them the target took from its socket before the buffer was full again; cpu: its
    seconds for those; growth: bytes of resident memory; connected: seconds after which a peer had its first packet
    through, None if it had not.
    """

    sent: int
    read: int
    cpu: float
    growth: int
    connected: float | None

    def __str__(self) -> str:
        connected = "not at all" if self.connected is None else f"after {self.connected:.1f} s"
        cost = self.cpu * 1e6 / max(1, self.read)
        return (
            f"{self.sent} sent, {self.read} read, {cost:.1f} us of CPU each, memory grew by "
            f"{self.growth / MEBIBYTE:.1f} MiB, a peer connected {connected}"
        )


class Flood:
    """Two refwg that have not talked yet: A is to be flooded, and B will want to connect."""

    def __init__(self, lab: Lab) -> None:
        refwg = Registry().get("refwg")
        self.tunnel = Tunnel(lab, LOOPBACK, refwg, refwg)
        self._lab = lab

    def run(self, kind: str, count: int, rate: int, *, patience: float = 5.0) -> Outcome:
        """Flood A, and let B connect meanwhile; patience: how many seconds B has."""
        # Nothing that a first handshake needs shall count as growth.
        self.tunnel.must_ping("ns2", V4_OF_A)
        self._forget_sessions()
        target = self.tunnel.a
        cpu, memory, dropped = cpu_seconds(target), resident(target), self._dropped()
        with self.attack(kind, count, rate) as attack:
            connected = self._connect(patience)
            attack.wait(count / (rate or count) * 10 + 60)
            sent = int(attack.tail().split()[0])
            self._calm_down()
        return Outcome(
            sent=sent,
            read=sent - (self._dropped() - dropped),
            cpu=cpu_seconds(target) - cpu,
            growth=resident(target) - memory,
            connected=connected,
        )

    @contextmanager
    def attack(self, kind: str, count: int, rate: int) -> Iterator[Process]:
        """Flood A as long as the block runs, or until `count` datagrams were sent."""
        argv = [sys.executable, "-m", "bench.attack", kind, str(count), str(rate), str(PORT_OF_A)]
        argv.append(self.tunnel.pub_a.raw.hex())
        env = {"PYTHONPATH": str(Path(__file__).parents[1])}
        attack = self.tunnel.nodes["ns0"].spawn(argv, log=self._lab.directory / f"{kind}.log", env=env)
        try:
            yield attack
        finally:
            attack.terminate()
            attack.close()

    def _forget_sessions(self) -> None:
        for up in (False, True):
            self.tunnel.nodes["ns2"].set_link("wg0", up=up)

    def _connect(self, patience: float) -> float | None:
        receiver = udp_receiver(self.tunnel.nodes["ns1"], V4_OF_A, DISCARD)
        started = time.monotonic()
        with receiver:
            udp_message(self.tunnel.nodes["ns2"], V4_OF_A, DISCARD, b"through the flood")
            try:
                wait_for(Datagram(receiver), patience, "B to connect in spite of the flood")
            except DeadlineExceeded:
                return None
        return time.monotonic() - started

    def _calm_down(self) -> None:
        """Wait until A has read all that waited in its socket."""
        before = -1.0
        while (now := cpu_seconds(self.tunnel.a)) > before:
            before = now
            let_pass(4 * _LOOK_AGAIN, "that a queue is empty has no event outside")

    def _dropped(self) -> int:
        """How many datagrams to A found no room in its socket (proc(5), /proc/net/udp)."""
        table = self.tunnel.nodes["ns0"].thread.call(Path("/proc/thread-self/net/udp").read_text)
        rows = [row.split() for row in table.splitlines()[1:]]
        return sum(int(row[-1]) for row in rows if int(row[1].rpartition(":")[2], 16) == PORT_OF_A)


def cpu_seconds(side: Interface) -> float:
    """User and system time of the program so far (proc(5), /proc/PID/stat)."""
    fields = Path(f"/proc/{pid(side)}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident(side: Interface) -> int:
    return int(Path(f"/proc/{pid(side)}/statm").read_text().split()[1]) * _PAGE


def pid(side: Interface) -> int:
    return int(side.process.pid)  # type: ignore[attr-defined]


def measured(rounds: int) -> dict[str, list[float]]:
    """CPU seconds for 100 000 datagrams of each kind, by the names of the figures."""
    return {f"flood_{kind}_refwg": [seconds_per_100_000(kind) for _ in range(rounds)] for kind in FULL_SIZE}


def seconds_per_100_000(kind: str) -> float:
    """CPU seconds of refwg for 100 000 datagrams of a kind that it takes in."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        try:
            outcome = Flood(lab).run(kind, 50_000, 0)
            return outcome.cpu / max(1, outcome.read) * 100_000
        finally:
            lab.close()


def main() -> int:
    """Flood at full size and say what came of it; 1 if memory grew too much, or a peer could not connect."""
    status = 0
    for kind, count in FULL_SIZE.items():
        with tempfile.TemporaryDirectory() as directory:
            lab = Lab(Path(directory))
            try:
                # Under load the first initiation only brings a cookie, and the next goes out five seconds later.
                outcome = Flood(lab).run(kind, count, FULL_RATE, patience=5.0 if kind == "garbage" else 12.0)
            finally:
                lab.close()
        is_well = outcome.growth <= MAX_GROWTH and outcome.connected is not None
        status |= not is_well
        print(f"{kind}: {outcome}: {'ok' if is_well else 'FAILED'}", flush=True)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
