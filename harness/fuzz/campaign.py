"""Fuzz one device for some minutes, and reduce what is found.

The child process of `wg-interop fuzz`. Each event is a line of JSON on stdout: progress, finding, summary, error.
SIGINT and SIGTERM end the run by a summary.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from harness.errors import HarnessError, Unavailable, UsageError
from harness.fuzz.choices import Guided, Seeded
from harness.fuzz.corpus import Corpus
from harness.fuzz.findings import ANSWERED, CONTROL, DIED, GREW, RAISED, SILENT, SPINS, Finding, as_test
from harness.fuzz.generator import IN_PROCESS_ONLY, STATES, SURFACES, Generator
from harness.fuzz.memory import Growth
from harness.fuzz.reduction import reduce_cases
from harness.implementations.registry import Registry
from harness.lab.lab import Lab
from harness.lab.target import Target
from harness.sandbox.launch import require_sandbox
from harness.wait import set_timeout_scale
from harness.wire import pcapng

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from harness.fuzz.in_process import RefwgInProcess
    from harness.fuzz.inputs import Case
    from harness.implementations.manifest import Manifest

COVERAGE, REASONS, NOTHING = "coverage", "answers", "nothing"
GUIDES: Final = (COVERAGE, REASONS, NOTHING)
ENGINES: Final = ("simple", "batch")
_REFWG: Final = "refwg"
_PROGRESS_EACH: Final = 1.0
_CHECK_EACH: Final = 1.0
_IDLE_EACH: Final = 15.0
_WARM_AFTER: Final = 10.0
# Seconds for the reduction of one finding; what is reduced by then is reported.
_REDUCTION: Final = 60.0
# Cases that are kept for a reduction, and how many of the last ones are tried, in this order.
_HISTORY: Final = 512
_LAST: Final = (1, 8, 64, _HISTORY)
# How often an input is played that does not always lead to the finding, such as to a race.
_TRIES: Final = 25
# Kinds of findings after which a program has to be started again.
_BROKEN: Final = frozenset({DIED, SILENT, GREW, SPINS, CONTROL})
# A log of each packet would be what is measured.
_QUIET: Final = {"LOG_LEVEL": "error", "WG_LOG_LEVEL": "error"}
# A device in process imports these modules again, so that all of them use the same classes of refwg.
_PURGED: Final = ("refwg", "harness.scripted", "harness.fuzz.player", "harness.fuzz.in_process")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The options of `wg-interop fuzz`.

    impl, manifest, like: the program. seconds: of fuzzing; count: most packets and requests, 0 for no limit. corpus: a
    folder. in_process, engine: refwg without sockets. surfaces: of SURFACES. guide: of GUIDES. ignore: regular
    expressions of findings that are known.
    """

    impl: str = ""
    manifest: str = ""
    like: str = ""
    seconds: float = 60.0
    count: int = 0
    seed: int = 1
    corpus: str = ""
    in_process: bool = False
    engine: str = "simple"
    surfaces: tuple[str, ...] = SURFACES
    guide: str = REASONS
    ignore: tuple[str, ...] = ()
    timeout_scale: float = 1.0

    def find(self) -> Manifest:
        """Return the program's manifest; raises UsageError or Unavailable."""
        if bool(self.impl) == bool(self.manifest):
            raise UsageError("name one program: --impl NAME, --impl NAME=PROGRAM, or --impl-manifest FILE")
        manifests = [Path(self.manifest)] if self.manifest else []
        registry = Registry.of_options([self.impl] if self.impl else [], manifests, [self.like] if self.like else [])
        found = registry.get(registry.asked[0])
        if found.kind == "kernel":
            raise Unavailable(
                "fuzz: a kernel's memory, CPU time and end cannot be watched from here; fuzz a program, or send it "
                "hostile messages by wg-interop run --suite conformance --lane vm --impl kernel"
            )
        if self.in_process and (found.base or found.name) != _REFWG:
            raise UsageError(f"--in-process runs refwg's device in this process, not {found.name}; leave it out")
        if self.guide == COVERAGE and not self.in_process:
            raise UsageError("--guide coverage needs --in-process: a program's coverage cannot be seen from outside")
        if not self.in_process and (reason := found.why_unavailable()):
            raise Unavailable(reason)
        return found

    @property
    def command(self) -> str:
        """The command that makes the same inputs, for the reproducer."""
        program = f"--impl {self.impl}" if self.impl else f"--impl-manifest {self.manifest}"
        where = f" --in-process --engine {self.engine}" if self.in_process else ""
        return f"wg-interop fuzz {program}{where} --seed {self.seed}"


class Device(Protocol):
    """What is fuzzed."""

    packets: int
    requests: int
    features: set[str]
    reached: set[str]

    def run(self, case: Case) -> None:
        """Play a case; raises Finding."""

    def check(self) -> None:
        """Check its health; raises Finding."""

    def check_idle(self) -> None:
        """Check that it does nothing when nothing comes; raises Finding."""

    def memory(self) -> int:
        """Return its resident memory in bytes."""


class InProcess:
    """Makes devices of refwg in this process. is_covered: refwg is instrumented for a coverage-guided fuzzer."""

    def __init__(self, order: Order, manifest: Manifest, *, is_covered: bool) -> None:
        variant = manifest.name.partition("+")[2]
        named = {"batch", "simple", "workers", ""}
        self.engine = variant if variant in ENGINES else order.engine
        self._seed = order.seed
        if variant not in named:
            from refwg import mutants  # noqa: PLC0415 - only a mutant needs it

            mutants.install(mutants.load_mutants()[variant])
        self._make = _load(is_covered=is_covered)

    def fresh(self) -> RefwgInProcess:
        """Make a new device."""
        return self._make(self.engine, self._seed)

    @contextmanager
    def recorded(self, folder: Path) -> Iterator[RefwgInProcess]:
        """Make a device, and write what passed during the last case to a pcapng file in the folder."""
        device = self.fresh()
        yield device
        ends = [pcapng.End("peers", "refwg in process: virtual time, made-up headers")]
        packets = [
            pcapng.Packet(0, number, _frame(peer, datagram, is_sent=is_sent), not is_sent)
            for number, (peer, is_sent, datagram) in enumerate(device.passed)
        ]
        pcapng.save(folder / "exchange.pcapng", ends, packets)

    def close(self) -> None:
        """Do nothing: there is no lab."""


def _load(*, is_covered: bool) -> Callable[..., RefwgInProcess]:
    """Import refwg's device, after whatever changes how its modules are loaded."""
    for name in list(sys.modules):
        if name.startswith(tuple(f"{purged}." for purged in _PURGED)) or name in _PURGED:
            del sys.modules[name]
    if is_covered:
        import atheris  # noqa: PLC0415 - an optional dependency

        with atheris.instrument_imports(include=[_REFWG], enable_loader_override=False):
            from harness.fuzz.in_process import RefwgInProcess  # noqa: PLC0415 - see above
    else:
        from harness.fuzz.in_process import RefwgInProcess  # noqa: PLC0415 - see above
    return RefwgInProcess


def _frame(peer: int, datagram: bytes, *, is_sent: bool) -> bytes:
    from harness.scripted.packets import udp_packet  # noqa: PLC0415 - only a finding needs it

    ends = [(f"10.0.0.{peer}", peer), ("10.0.0.1", 1)]
    source, destination = ends if is_sent else reversed(ends)
    return bytes(12) + b"\x08\0" + udp_packet(source, destination, datagram)


class _OverSockets:
    """Starts the program in a lab of its own, each time that a fresh one is asked for."""

    engine = ""

    def __init__(self, order: Order, manifest: Manifest, scratch: Path) -> None:
        require_sandbox()
        quiet = {name: value for name, value in _QUIET.items() if name in manifest.env}
        self._manifest = replace(manifest, env=manifest.env | quiet)
        self._seed = order.seed
        self._scratch = scratch
        self._count = 0
        self._lab: Lab | None = None

    def fresh(self) -> Device:
        """Start the program."""
        from harness.fuzz.sockets import OverSockets  # noqa: PLC0415 - not for a run in process

        self.close()
        self._count += 1
        self._lab = Lab(self._scratch / str(self._count), self._seed)
        return OverSockets(Target(self._lab, self._manifest), self._seed)

    @contextmanager
    def recorded(self, folder: Path) -> Iterator[Device]:
        """Start the program, and write what passes its link during the block to a pcapng file in the folder."""
        device = self.fresh()
        lab = self._lab
        assert lab is not None  # noqa: S101 - fresh() has made one
        capture = lab.capture(lab.nodes["ns2"], "veth2")
        yield device
        capture.save(folder / "exchange.pcapng")

    def close(self) -> None:
        """End the program."""
        lab, self._lab = self._lab, None
        if lab is not None:
            with suppress(HarnessError, OSError):
                lab.close()


class Campaign:
    """One run: generates, plays, keeps what is new, checks, reports."""

    def __init__(self, order: Order, maker: InProcess | _OverSockets, emit: Callable[[dict[str, Any]], None]) -> None:
        self._order = order
        self._maker = maker
        self._emit = emit
        inner = _inner(order)
        states = [state for state in STATES if order.in_process or state not in IN_PROCESS_ONLY]
        self._generator = Generator(inner, order.surfaces, states)
        self._corpus = Corpus(Path(order.corpus))
        self._at_start = len(self._corpus.cases)
        self._known: set[str] = set()
        self._history: deque[Case] = deque(maxlen=_HISTORY)
        self._growth = Growth()
        self._device: Device = maker.fresh()
        self._began = time.monotonic()
        self._next_progress = self._next_check = self._began
        self._next_idle = self._began + _IDLE_EACH
        self._cases = self._ignored = 0
        self._ignore = [re.compile(pattern) for pattern in order.ignore]
        self.stopped = False

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def is_over(self) -> bool:
        """Return whether the time is up, the count is reached, or the run was stopped."""
        sent = self._device.packets + self._device.requests
        return self.stopped or self._seconds >= self._order.seconds or 0 < self._order.count <= sent

    def fuzz(self) -> bool:
        """Fuzz until it is over; returns whether something was found."""
        number = 0
        while not self.is_over():
            # Over sockets the answers come at their own times: only the corpus at the start decides the inputs.
            cases = self._corpus.cases if self._order.in_process else self._corpus.cases[: self._at_start]
            parents = [] if self._order.guide == NOTHING else cases
            case = self._generator.case(Seeded(f"{self._order.seed} {number}"), parents)
            number += 1
            if self.play(case):
                return True
        return self._found(self._check_at_end)

    def guided_input(self, data: bytes) -> Case:
        """Return the case that these bytes choose."""
        return self._generator.case(Guided(data))

    def play(self, case: Case) -> bool:
        """Play a case; returns whether something was found. Then it is reduced and reported."""
        self._cases += 1
        self._history.append(case)
        if self._found(partial(self._play, case)):
            return True
        if self._order.guide != NOTHING and not self._device.features <= self._known:
            self._known |= self._device.features
            self._corpus.add(case)
        if time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + _PROGRESS_EACH
            self._emit({"progress": self.figures()})
        return False

    def _play(self, case: Case) -> None:
        self._device.run(case)
        now = time.monotonic()
        if now >= self._next_check:
            # A device in process checks itself by its count of cases: by the clock, two runs would differ.
            if not self._order.in_process:
                self._device.check()
            if self._growth.grown(self._device.memory(), is_warm=self._seconds > _WARM_AFTER):
                raise Finding(GREW, f"grew {self._growth} of memory while it was fuzzed")
            self._next_check = time.monotonic() + _CHECK_EACH
        if now >= self._next_idle:
            self._device.check_idle()
            self._next_idle = time.monotonic() + _IDLE_EACH

    def _check_at_end(self) -> None:
        self._device.check()
        self._device.check_idle()

    def _found(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Finding as finding:
            if not self._is_known(finding):
                self._report(finding)
                return True
            self._ignored += 1
            if finding.kind in _BROKEN:
                self._replace_device()
        return False

    def _is_known(self, finding: Finding) -> bool:
        return any(pattern.search(str(finding)) for pattern in self._ignore)

    def _replace_device(self) -> None:
        old, self._device = self._device, self._maker.fresh()
        self._device.packets, self._device.requests = old.packets, old.requests
        self._device.reached |= old.reached

    def figures(self) -> dict[str, Any]:
        """Return the figures so far."""
        device, seconds = self._device, self._seconds
        sent = device.packets + device.requests
        return {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time(), 1),
            "cases": self._cases,
            "packets": device.packets,
            "requests": device.requests,
            "rate": round(sent / seconds) if seconds else 0,
            "states": sorted(device.reached),
            "features": len(self._known),
            "corpus": len(self._corpus.cases),
            "ignored": self._ignored,
            "memory_mb": [device.memory() >> 20, self._growth.greatest >> 20] if self._is_alive() else [],
        }

    def _is_alive(self) -> bool:
        try:
            self._device.memory()
        except OSError:
            return False
        return True

    # Findings

    def _report(self, finding: Finding) -> None:
        figures = self.figures()
        self._emit({"found": {"kind": finding.kind, "message": str(finding)}})
        cases, tries = self._reduced(finding)
        folder = self._corpus.finding(finding.kind, cases)
        origin, engine = self._order.command, self._maker.engine
        test = as_test(cases, finding, origin=origin, engine=engine, repeat=max(1, tries))
        (folder / "test_hostile_input.py").write_text(test, encoding="utf-8")
        (folder / "finding.txt").write_text(f"{finding}\n{finding.detail}\n", encoding="utf-8")
        if tries:
            with self._maker.recorded(folder) as device:
                any(_plays(device, cases) for _ in range(tries))
        self._emit(
            {
                "finding": {
                    "kind": finding.kind,
                    "message": str(finding),
                    "detail": finding.detail,
                    "reproduced": tries > 0,
                    "tries": tries,
                    "cases": len(cases),
                    "steps": sum(len(case.steps) for case in cases),
                    "folder": str(folder),
                    "test": test,
                    "figures": figures,
                }
            }
        )

    def _reduced(self, finding: Finding) -> tuple[list[Case], int]:
        """Return the smallest cases that lead to the finding, and how often they are played until they do.

        Returns the last cases, and 0, if the finding does not happen again.
        """
        trials = _Trials(self._maker, finding, self._is_known, is_over=lambda: self.stopped, emit=self._emit)
        history = list(self._history)
        for trials.tries, lasts in ((1, _LAST), (_TRIES, _LAST[:2])):
            for last in lasts:
                if trials.fail(history[-last:]):
                    return _reduce(history[-last:], trials.fail), trials.tries
                if last >= len(history):
                    break
        return history[-_LAST[1] :], 0


def _reduce(cases: list[Case], fail: Callable[[list[Case]], bool]) -> list[Case]:
    """Reduce cases until nothing more can be left out: over sockets a try may fail that mostly succeeds."""
    smaller = reduce_cases(cases, fail)
    while smaller != cases:
        cases, smaller = smaller, reduce_cases(smaller, fail)
    return smaller


class _Trials:
    """Plays cases until they lead to a finding. tries: how often each is played."""

    def __init__(
        self,
        maker: InProcess | _OverSockets,
        finding: Finding,
        is_known: Callable[[Finding], bool],
        *,
        is_over: Callable[[], bool],
        emit: Callable[[dict[str, Any]], None],
    ) -> None:
        self._maker = maker
        self._finding = finding
        self._is_known = is_known
        self._is_over = is_over
        self._emit = emit
        self._began = time.monotonic()
        self._count = 0
        self._device: Device | None = None
        self.tries = 1

    def fail(self, cases: Sequence[Case]) -> bool:
        """Return whether the cases lead to the finding; a new device is made only after one that was found broken."""
        for _ in range(self.tries):
            seconds = time.monotonic() - self._began
            if self._is_over() or seconds > _REDUCTION:
                return False
            self._count += 1
            steps = sum(len(case.steps) for case in cases)
            self._emit({"reducing": {"seconds": seconds, "tries": self._count, "cases": len(cases), "steps": steps}})
            if self._device is None or isinstance(self._maker, InProcess):
                self._device = self._maker.fresh()
            found = _plays(self._device, cases, is_idle=self._finding.kind == SPINS)
            if found is not None:
                self._device = None
                if _same(found, self._finding) and not self._is_known(found):
                    return True
        return False


def _plays(device: Device, cases: Sequence[Case], *, is_idle: bool = False) -> Finding | None:
    """Play cases and check the health after them; returns what was found."""
    try:
        for case in cases:
            device.run(case)
        device.check()
        if is_idle:
            device.check_idle()
    except Finding as finding:
        return finding
    return None


def _same(one: Finding, other: Finding) -> bool:
    """Return whether two findings are one: of a kind, and of one place or one sort of answer."""
    if one.kind not in {RAISED, ANSWERED}:
        return one.kind == other.kind
    separator = ":" if one.kind == RAISED else " "
    return one.kind == other.kind and str(one).partition(separator)[0] == str(other).partition(separator)[0]


def _inner(order: Order) -> Any:
    if order.in_process:
        from harness.fuzz.in_process import INNER  # noqa: PLC0415 - not over sockets

        return INNER
    from harness.fuzz.sockets import HOSTILE  # noqa: PLC0415 - not in process

    return HOSTILE


# The child process


def main(order: Order) -> None:
    """Run the campaign and print its events; an error is printed too, and the parent raises it."""
    set_timeout_scale(order.timeout_scale)
    try:
        manifest = order.find()
        with tempfile.TemporaryDirectory(prefix="wg-interop-fuzz-") as scratch:
            is_covered = order.guide == COVERAGE
            maker = (
                InProcess(order, manifest, is_covered=is_covered)
                if order.in_process
                else _OverSockets(order, manifest, Path(scratch))
            )
            try:
                campaign = Campaign(order, maker, _print)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, lambda *_: setattr(campaign, "stopped", True))
                if is_covered:
                    _fuzz_by_coverage(order, campaign)
                found = campaign.fuzz()
                _print({"summary": campaign.figures() | {"found": found, "interrupted": campaign.stopped}})
            finally:
                maker.close()
    except (HarnessError, OSError) as error:
        kinds = (Unavailable, UsageError, HarnessError)
        kind = next((known.__name__ for known in kinds if isinstance(error, known)), HarnessError.__name__)
        _print({"error": str(error), "kind": kind})


def _fuzz_by_coverage(order: Order, campaign: Campaign) -> None:
    """Let libFuzzer choose the bytes that choose the cases; does not return: libFuzzer ends the process."""
    import atheris  # noqa: PLC0415 - an optional dependency

    def end(*, found: bool) -> None:
        _print({"summary": campaign.figures() | {"found": found, "interrupted": campaign.stopped}})
        sys.stdout.flush()
        os._exit(0)

    def one(data: bytes) -> None:
        if campaign.is_over():
            end(found=False)
        if campaign.play(campaign.guided_input(data)):
            end(found=True)

    folder = Path(order.corpus) / "bytes"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-handle_int=0", "-handle_term=0", "-rss_limit_mb=0", "-max_len=2048", "-verbosity=0", "-timeout=60"]
    atheris.Setup(["fuzz", *flags, f"-seed={order.seed}", str(folder)], one)
    atheris.Fuzz()


def _print(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)  # noqa: T201 - to the parent


def words(order: Order) -> str:
    """Return the order as the argument of the child."""
    return json.dumps({name: getattr(order, name) for name in Order.__slots__})


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Order(**given | {name: tuple(given[name]) for name in ("surfaces", "ignore")}))
