"""List all measurements: what each yields, how long it takes, and whom it measures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from bench import configuration, floods, guest, handshakes, latency, rates, starts, topologies
from bench.figures import Figure
from harness import Registry, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from harness import Manifest

UDP_SIZES: Final = (64, 512, 1400)  # bytes of a packet, with IP and UDP headers
SLOW_ROUNDS: Final = 3  # at most, of measurements that take long and depend little on the load


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long each measurement lasts. stream, probe, handshakes: seconds; pings: requests, 100 per second."""

    stream: int
    probe: int
    handshakes: float
    pings: int


FULL: Final = Effort(stream=4, probe=1, handshakes=3.0, pings=300)
QUICK: Final = Effort(stream=2, probe=1, handshakes=1.0, pings=100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a measurement gets.

    guess: the result of the last round; None in the first. note: shows a line of progress.
    """

    manifest: Manifest
    effort: Effort
    guess: float | None
    note: Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measurement. run: returns values by the name of the figure.

    of: it measures this implementation only, and its variants; empty: each that the command line names. lab: it
    measures the lab, so its figures belong to no implementation. in_quick: --quick has it too. most_rounds: 0 means no
    limit.
    """

    name: str
    title: str
    figures: tuple[Figure, ...]
    run: Callable[[Task], dict[str, float]]
    of: str = ""
    lab: bool = False
    in_quick: bool = False
    most_rounds: int = 0


def _tcp(name: str, title: str, *, streams: int, back: bool, in_quick: bool = False) -> Measurement:
    def run(task: Task) -> dict[str, float]:
        return rates.tcp(name, task.manifest, seconds=task.effort.stream, streams=streams, back=back)

    each = partial(Figure, group=name)
    figures = (
        each(name=name, title=title, unit="Mbit/s", more_is_better=True),
        *_cpu(name, title, "s/Gbit"),
        each(name=f"{name}_memory", title=f"{title}: peak memory of one end", unit="MiB", is_detail=streams == 1),
    )
    return Measurement(name=name, title=title, figures=figures, run=run, in_quick=in_quick)


def _udp(size: int) -> Measurement:
    name, title = f"udp{size}", f"UDP, packets of {size} bytes, less than 1 % lost"

    def run(task: Task) -> dict[str, float]:
        return rates.udp(name, task.manifest, seconds=task.effort.probe, size=size, guess=task.guess, note=task.note)

    rate = Figure(name=name, title=title, unit="packets/s", more_is_better=True, group=name)
    figures = (rate, *_cpu(name, title, "us/packet"))
    return Measurement(name=name, title=title, figures=figures, run=run, in_quick=size == UDP_SIZES[-1])


def _cpu(name: str, title: str, unit: str) -> list[Figure]:
    ends = {"_cpu": "CPU time, both ends", "_cpu_sender": "CPU time, sender", "_cpu_receiver": "CPU time, receiver"}
    return [
        Figure(name=name + end, title=f"{title}: {what}", unit=unit, group=name, is_detail=end != "_cpu")
        for end, what in ends.items()
    ]


def _pings(name: str, title: str, *, loaded: bool) -> Measurement:
    def run(task: Task) -> dict[str, float]:
        return latency.pings(name, task.manifest, count=task.effort.pings, loaded=loaded)

    kinds = {"avg": "average", **{f"p{percent}": f"{percent}th percentile" for percent in latency.PERCENTILES}}
    figures = tuple(
        Figure(name=f"{name}_{kind}", title=f"{title}: {what}", unit="ms", group=name) for kind, what in kinds.items()
    )
    return Measurement(name=name, title=title, figures=figures, run=run, in_quick=not loaded)


def _figures(group: str, *rows: tuple[str, str, str]) -> tuple[Figure, ...]:
    return tuple(Figure(name=name, title=title, unit=unit, group=group) for name, title, unit in rows)


def _topology(task: Task) -> dict[str, float]:
    lab, shell = topologies.by_lab(task.manifest), topologies.by_shell(task.manifest)
    return {
        "nat_topology_by_lab": lab,
        "nat_topology_by_shell": shell,
        "nat_topology_lab_over_shell": lab / shell,
    }


_HANDSHAKES: Final = Measurement(
    name="handshakes",
    title="Handshakes",
    figures=(
        Figure(
            name="handshakes", title="Initiations answered by one core", unit="1/s", more_is_better=True,
            group="handshakes",
        ),
        Figure(
            name="handshakes_by_clock", title="Initiations answered by one core, beside other programs", unit="1/s",
            more_is_better=True, group="handshakes", is_detail=True,
        ),
    ),
    run=lambda task: handshakes.per_second("handshakes", task.manifest, seconds=task.effort.handshakes),
)  # fmt: skip
MEASUREMENTS: Final = (
    _tcp("tcp1", "TCP, one stream", streams=1, back=False, in_quick=True),
    _tcp("tcp1_back", "TCP, one stream, B to A", streams=1, back=True),
    _tcp("tcp8", "TCP, 8 streams", streams=8, back=False),
    _tcp("tcp8_back", "TCP, 8 streams, B to A", streams=8, back=True),
    *map(_udp, UDP_SIZES),
    _pings("ping_idle", "Round trip, idle", loaded=False),
    _pings("ping_loaded", "Round trip beside one TCP stream", loaded=True),
    _HANDSHAKES,
    Measurement(
        name="peers1000",
        title="A thousand peers at once",
        figures=_figures("peers1000", ("peers1000", "A thousand peers at once: until all are connected", "s")),
        run=lambda task: handshakes.thousand_peers("peers1000", task.manifest, note=task.note),
    ),
    Measurement(
        name="start",
        title="Start",
        figures=_figures(
            "start",
            ("start", "Start, until the control socket answers", "ms"),
            ("start_cpu", "Start, until the control socket answers: CPU time", "ms"),
            ("start_memory", "Memory after the start", "MiB"),
        ),
        run=lambda task: starts.start("start", task.manifest),
        in_quick=True,
    ),
    Measurement(
        name="topology",
        title="Set-up of topology nat",
        figures=_figures(
            "topology",
            ("nat_topology_by_lab", "Topology nat, set up by the lab", "s"),
            ("nat_topology_by_shell", "Topology nat, set up by a shell script", "s"),
            ("nat_topology_lab_over_shell", "Topology nat, lab over shell script", ""),
        ),
        run=_topology,
        lab=True,
        in_quick=True,
    ),
    Measurement(
        name="configuration",
        title="130 560 allowed-ips",
        figures=_figures(
            "configuration",
            ("setconf_130560_allowed_ips", "wg setconf with 130 560 allowed-ips", "s"),
            ("show_130560_allowed_ips", "wg show with 130 560 allowed-ips", "s"),
        ),
        run=lambda task: configuration.measured(task.manifest),
        of="refwg",
        most_rounds=SLOW_ROUNDS,
    ),
    Measurement(
        name="floods",
        title="Floods",
        figures=_figures(
            "floods",
            *((f"flood_{kind}", f"CPU time for 100 000 datagrams: {kind}", "s") for kind in floods.FULL_SIZE),
        ),
        run=lambda task: floods.measured(task.manifest),
        of="refwg",
        most_rounds=SLOW_ROUNDS,
    ),
    Measurement(
        name="first_verdict",
        title="Boot of a guest",
        figures=_figures("first_verdict", ("guest_first_verdict", "From booting a guest to a command's status", "s")),
        run=lambda _: {"guest_first_verdict": guest.first_verdict()},
        lab=True,
        most_rounds=SLOW_ROUNDS,
    ),
)
# With --guest, unless --only names others: what the kernel's driver and refwg can be compared by under emulation.
IN_GUEST: Final = ("tcp1", "tcp8", "udp1400", "ping_idle")


def chosen(only: Iterable[str], *, quick: bool) -> list[Measurement]:
    """Return the measurements of a run, in order. only: their names; empty: all. Raises UsageError for another name."""
    known = {measurement.name: measurement for measurement in MEASUREMENTS}
    names = list(dict.fromkeys(only))
    for name in names:
        if name not in known:
            raise UsageError(f"--only {name}: no such measurement; there are: {', '.join(known)}")
    if names:
        return [measurement for measurement in MEASUREMENTS if measurement.name in names]
    return [measurement for measurement in MEASUREMENTS if measurement.in_quick or not quick]


def measured_by(measurement: Measurement, asked: Iterable[Manifest]) -> list[Manifest]:
    """Return those of the implementations that a measurement is for; wireguard-go stands in for all if it is the lab's.

    That program is started by the measurements of the lab that need one.
    """
    if measurement.lab:
        return [Registry().get("wireguard-go")]
    return [manifest for manifest in asked if measurement.of in {"", manifest.base or manifest.name}]
