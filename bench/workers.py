"""Measure what worker processes gain in the code path of the batch engine.

    python -m bench.workers [--workers N]... [--rounds N] [--superframes N] [--json FILE]

The engine's own code runs, with a device, its sessions and real encryption. The interface and the sockets are buffers
that were recorded before: superframes of TCP to send, and batches of messages to receive. What comes out is checked in
the same run: the counters that were sent, and the TCP sequence numbers that were delivered, must follow each other
without a gap. The rounds are interleaved. Run it when nothing else is busy; one worker fills one core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final, cast

from refwg.engine.parallel import ParallelEngine
from refwg.engine.virtio import HEADER_LENGTH, parse
from selftests.support.pair import arrived_at
from selftests.support.recorded import MSS, RecordedSockets, RecordedTun, Rig, superframe, tcp_segments

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from refwg.boundary import Transmit
    from refwg.peer import Peer

WORKERS: Final = (0, 1, 2)
PACKETS: Final = 45  # of a superframe with MTU 1420: as many as one batch of datagrams holds
_WARM: Final = 8  # superframes before each measurement
_TCP_HEADERS: Final = 40
_SEQUENCE: Final = slice(HEADER_LENGTH + 24, HEADER_LENGTH + 28)
_COUNTER: Final = slice(8, 16)
_NO_SOCKET: Final = cast("socket.socket", None)


class OutOfOrder(Exception):
    """Something left or arrived in another order than it came, or not at all."""


class CheckedSockets(RecordedSockets):
    """Sockets that keep nothing of what is sent, and check the counters."""

    next_counter = 0

    def send(self, transmit: Transmit[Peer], segment: int = 0) -> str:
        """Check the first and the last counter: those between were written at once."""
        datagrams = transmit.datagram
        length = segment or len(datagrams)
        count = -(-len(datagrams) // length)
        for number in (0, count - 1):
            header = bytes(datagrams[number * length : number * length + _COUNTER.stop])
            _expect("sent counter", int.from_bytes(header[_COUNTER], "little"), self.next_counter + number)
        self.next_counter += count
        return ""


class CheckedTun(RecordedTun):
    """An interface that keeps nothing of what is delivered, and checks the TCP sequence numbers."""

    next_sequence = 0

    def write_parts(self, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
        """Check that this is a superframe whose data follows that of the last one."""
        headers = bytes(parts[0]) + bytes(parts[1][:_TCP_HEADERS])
        _expect("delivered sequence number", int.from_bytes(headers[_SEQUENCE]), self.next_sequence)
        _expect("segment size", parse(headers).gso_size, MSS)
        self.next_sequence += sum(map(len, parts)) - HEADER_LENGTH - _TCP_HEADERS
        return True


def _expect(what: str, value: int, expected: int) -> None:
    if value != expected:
        raise OutOfOrder(f"{what} {value}, expected {expected}")


@dataclass(frozen=True)
class Measured:
    """Packets per second, and CPU microseconds for one packet: of the main process, and of all workers."""

    rate: float
    main: float
    workers: float

    def bound(self, workers: int, cores: int) -> float:
        """Return packets per second by the CPU times, if this number of cores does nothing else."""
        bounds = [1e6 / self.main, cores * 1e6 / (self.main + self.workers)]
        return min([*bounds, workers * 1e6 / self.workers] if workers else bounds)


class Recording:
    """What each measurement gets: a superframe, and batches of messages from B. Sessions are the same in every rig."""

    def __init__(self, superframes: int) -> None:
        """Seal so many batches, and a few more for the warm-up."""
        self.count = superframes
        with closing(Rig()) as rig:
            payload = random.Random(1).randbytes(PACKETS * MSS)  # noqa: S311 - not a secret
            self.frame = superframe(rig.a.inner[4], rig.b.inner[4], payload)
            self.origin = arrived_at(rig.b.endpoint, rig.a)
            self.batches = []
            for number in range(superframes + _WARM):
                sequence = number * len(payload)
                packets = tcp_segments(rig.b.inner[4], rig.a.inner[4], payload, sequence=sequence)
                self.batches.append(rig.sealed(rig.b, packets))

    def send(self, workers: int) -> Measured:
        """Send the superframe again and again."""
        sockets = CheckedSockets()
        with closing(Rig(workers, udp=sockets)) as rig:
            keypair = next(rig.a.device.peers).keypairs.current
            sockets.next_counter = first = 0 if keypair is None else keypair.sending_counter
            for number in (_WARM, self.count):
                rig.tun.waiting.extend([self.frame] * number)
                result = _measure(rig, number, lambda: bool(rig.tun.waiting), rig.engine.packets_waiting)
            _expect("sent messages", sockets.next_counter - first, (self.count + _WARM) * PACKETS)
        return result

    def receive(self, workers: int) -> Measured:
        """Receive the batches."""
        tun = CheckedTun()
        with closing(Rig(workers, tun=tun)) as rig:
            for part in (self.batches[:_WARM], self.batches[_WARM:]):
                rig.udp.waiting.extend((b"".join(batch), len(batch[0]), self.origin, 0) for batch in part)
                result = _measure(
                    rig, len(part), lambda: bool(rig.udp.waiting), lambda: rig.engine.datagrams_waiting(_NO_SOCKET)
                )
            _expect("delivered bytes", tun.next_sequence, (self.count + _WARM) * PACKETS * MSS)
        return result


def _measure(rig: Rig, superframes: int, has_input: Callable[[], bool], step: Callable[[], None]) -> Measured:
    """Let the engine work until nothing is left, as the event loop does."""
    engine = rig.engine
    processes = engine.pool.processes if isinstance(engine, ParallelEngine) else []
    before = _cpu_time(processes)
    cpu, clock = time.process_time_ns(), time.monotonic_ns()
    while has_input():
        step()
        if isinstance(engine, ParallelEngine):
            engine.work_done()
    engine.settle()
    clock, cpu = time.monotonic_ns() - clock, time.process_time_ns() - cpu
    packets = superframes * PACKETS
    return Measured(packets / clock * 1e9, cpu / packets / 1000, (_cpu_time(processes) - before) / packets / 1000)


def _cpu_time(processes: list[int]) -> int:
    """Return the nanoseconds that processes have run (proc(5), schedstat)."""
    return sum(int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) for process in processes)


def measure(workers: Sequence[int], rounds: int, superframes: int) -> dict[str, dict[int, list[Measured]]]:
    """Measure both directions with each number of workers, one after the other in each round."""
    recording = Recording(superframes)
    results: dict[str, dict[int, list[Measured]]] = {
        direction: {number: [] for number in workers} for direction in ("send", "receive")
    }
    for _ in range(rounds):
        for direction, function in (("send", recording.send), ("receive", recording.receive)):
            for number in workers:
                results[direction][number].append(function(number))
    return results


def ratios(results: dict[str, dict[int, list[Measured]]]) -> dict[str, float]:
    """Return the medians of the ratios within a round, of each number of workers over the next smaller one."""
    found = {}
    for direction, by_number in results.items():
        numbers = sorted(by_number)
        for less, more in pairwise(numbers):
            pairs = zip(by_number[more], by_number[less], strict=True)
            found[f"{direction}_{more}_over_{less}"] = median(above.rate / below.rate for above, below in pairs)
    return found


def main() -> int:
    """Print the medians and the ratios; returns 1 if something was out of order."""
    parser = argparse.ArgumentParser(description="what worker processes gain in refwg's batch engine")
    parser.add_argument("--workers", type=int, action="append", metavar="N", help="default: 0, 1 and 2")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--superframes", type=int, default=400, metavar="N", help="of each measurement")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        results = measure(options.workers or WORKERS, options.rounds, options.superframes)
    except OutOfOrder as error:
        print(f"FAILED: {error}")
        return 1
    cores = os.cpu_count() or 1
    print(f"{'':8} {'workers':>7} {'packets/s':>10} {'main us':>8} {'workers us':>10} {f'{cores} free cores':>13}")
    for direction, by_number in results.items():
        for number, values in by_number.items():
            middle = Measured(*(median(column) for column in zip(*map(_fields, values), strict=True)))
            print(
                f"{direction:8} {number:7} {middle.rate:10.0f} {middle.main:8.2f} {middle.workers:10.2f} "
                f"{middle.bound(number, cores):13.0f}"
            )
    for name, ratio in ratios(results).items():
        print(f"{name}: {ratio:.2f}")
    print("all packets were in order")
    if options.json:
        runs = [
            {"direction": direction, "workers": number, **asdict(value)}
            for direction, by_number in results.items()
            for number, values in by_number.items()
            for value in values
        ]
        options.json.write_text(json.dumps({"runs": runs, "ratios": ratios(results)}, indent=1) + "\n")
    return 0


def _fields(measured: Measured) -> tuple[float, float, float]:
    return measured.rate, measured.main, measured.workers


if __name__ == "__main__":
    sys.exit(main())
