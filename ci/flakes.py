"""Run the netns tests of a pair many times in random order, and count chance failures.

A test that fails by chance once in a hundred runs blocks one finished change in a hundred; ten such tests block ten. A
failed run keeps its evidence and the seed of its order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ci.gates import NETNS
from ci.setup_checkout import EXIT_COULD_NOT, EXIT_INTERRUPTED, ROOT, prepare, run_program
from harness.errors import HarnessError
from harness.install.tools import exit_on_sigterm
from harness.report.results import GATING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

PAIR: Final = "refwg~wireguard-go"
PLACE: Final = ROOT / "report" / "flakes"
DEADLINE: Final = 1200.0  # seconds for one run
# A program that keeps one processor busy until its parent ends.
SPIN: Final = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"
SEEDS: Final = 1 << 32

HELP: Final = """\
Run the netns tests of a pair RUNS times, each time in another random order, and print how often runs and tests failed.
Every other run is under load: spinners, programs that do nothing but use a processor, run beside the tests.

Results are kept in a folder of report/flakes/ for each commit and selection of tests; a failed run also keeps its
evidence there. After an interruption, run the same command again to continue; --fresh starts again from run 1.
"""
EXAMPLES: Final = f"""\
examples:
  ci/flakes 20                                     20 runs of {PAIR}, half of them under load
  ci/flakes 50 --pair mine~kernel --impl mine=/tmp/build/wg
  ci/flakes 50 -- -k roaming                       only these tests; arguments after -- are pytest's
  ci/flakes 1 --seed 3141 --spinners 0 -n 2        repeat one order

exit status: 0 no run failed, 1 some runs failed, 2 wrong usage, 125 could not test, 130 interrupted
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of all tests.

    seed: of the order. spinners: how many ran beside the tests. status: pytest's exit status, None if it did not end in
    time. tests: how many ran. failed: ids of the failed tests. seconds: wall time.
    """

    number: int
    seed: int
    spinners: int
    status: int | None
    seconds: float
    tests: int
    failed: tuple[str, ...] = ()

    @property
    def red(self) -> bool:
        """True if pytest's exit status is not 0, or there is none."""
        return self.status != 0

    def __str__(self) -> str:
        load = f", {self.spinners} spinners" if self.spinners else ""
        word = "RED" if self.red else "ok"
        line = f"{word:<4} run {self.number:3d}: {self.seconds:5.1f} s, {self.tests} tests, seed {self.seed}{load}"
        return "\n".join([line, *(f"       {name}" for name in self.failed)])


@dataclass(slots=True, kw_only=True)
class History:
    """All runs so far of one commit with the same selection of tests, in a file that is written after each run."""

    file: Path
    subject: str  # commit and options
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def open(cls, place: Path, subject: str, *, fresh: bool = False) -> History:
        """Read the runs from a folder, or start without runs.

        fresh: delete the folder first. Raises HarnessError for a file that cannot be read as such.
        """
        if fresh:
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        history = cls(file=place / "flakes.json", subject=subject)
        if not history.file.exists():
            return history
        try:
            document = json.loads(history.file.read_text())
            history.runs = [Run(**{**run, "failed": tuple(run["failed"])}) for run in document["runs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise HarnessError(
                f"{history.file}: not a results file of ci/flakes: {error}; --fresh deletes it"
            ) from error
        return history

    def add(self, run: Run) -> None:
        """Append a run and write the file; a reader never sees a partial file."""
        self.runs.append(run)
        document: dict[str, Any] = {"subject": self.subject, "runs": [asdict(run) for run in self.runs]}
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(self.file)

    def summary(self) -> str:
        """Return the failure rates, and the failed tests, the most frequent first."""
        if not self.runs:
            return "no run has ended"
        lines = []
        for name, runs in (
            ("all", self.runs),
            ("quiet", [run for run in self.runs if not run.spinners]),
            ("under load", [run for run in self.runs if run.spinners]),
        ):
            if runs:
                red = sum(run.red for run in runs)
                seconds = sorted(run.seconds for run in runs)[len(runs) // 2]
                lines.append(f"{name:<10} {rate(red, len(runs))} of runs red; median {seconds:.0f} s")
        failures = Counter(test for run in self.runs for test in run.failed)
        executed = sum(run.tests for run in self.runs)
        lines.append(f"{'tests':<10} {rate(failures.total(), executed)} of executions failed")
        lines += [f"  {count:3d} x {test}" for test, count in failures.most_common()]
        return "\n".join(lines)


def rate(bad: int, of: int) -> str:
    """Format `3 of 200 (1.50 %)`; for 0 bad ones, the upper bound of the true rate with 95 % confidence."""
    # The rule of three: (1 - 3/n)^n is about 5 %.
    return f"{bad} of {of} ({100 * bad / of:.2f} %)" if bad else f"0 of {of} (below {min(300 / of, 100):.2f} %)"


def main() -> int:
    """Set up, run the tests, print the summary; return the exit status."""
    options = _parse_arguments()
    exit_on_sigterm()
    try:
        for _ in prepare():
            pass
        history = History.open(_place(options), _subject(options), fresh=options.fresh)
    except (HarnessError, OSError) as error:
        print(f"ci/flakes: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    status = EXIT_INTERRUPTED
    try:
        while len(history.runs) < options.runs:
            number = len(history.runs) + 1
            history.add(run_once(number, history.file.parent / f"{number:03d}", options))
            print(history.runs[-1], flush=True)
        status = 1 if any(run.red for run in history.runs) else 0
    except KeyboardInterrupt:
        print("ci/flakes: interrupted; run the same command again to continue", file=sys.stderr)
    except (HarnessError, OSError) as error:
        print(f"ci/flakes: {error}", file=sys.stderr)
        status = EXIT_COULD_NOT
    print(history.summary(), history.file, sep="\n", flush=True)
    return status


def _parse_arguments() -> argparse.Namespace:
    arguments = sys.argv[1:]
    rest: Sequence[str] = ()
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, rest = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(
        prog="ci/flakes", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=int, metavar="RUNS", help="number of runs, with those that are done already")
    parser.add_argument(
        "--pair", action="append", metavar="A~B", help=f"pair to test (default: {PAIR}); may be repeated"
    )
    parser.add_argument(
        "--impl", action="append", default=[], metavar="NAME[=PATH]", help="an implementation, as for pytest"
    )
    parser.add_argument(
        "-n", type=int, default=4, metavar="N", help="number of parallel workers (default: %(default)s)"
    )
    parser.add_argument(
        "--spinners", type=int, default=2, metavar="N", help="spinners beside every other run (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the first run's order (default: random)")
    parser.add_argument("--fresh", action="store_true", help="delete earlier runs and their evidence first")
    options = parser.parse_args(arguments)
    if min(options.runs, options.n) < 1 or options.spinners < 0:
        parser.error("RUNS and -n are at least 1, --spinners at least 0")
    options.rest = rest
    return options


def _subject(options: argparse.Namespace) -> str:
    """Return what is tested, in words: the commit, `-dirty` for uncommitted changes, and the selection of tests."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip() or "unknown"
    return shlex.join([commit, *_selection(options), *([f"--seed={options.seed}"] if options.seed is not None else ())])


def _place(options: argparse.Namespace) -> Path:
    return PLACE / hashlib.sha256(_subject(options).encode()).hexdigest()[:8]


def _selection(options: argparse.Namespace) -> list[str]:
    pairs = [f"--pair={pair}" for pair in options.pair or [PAIR]]
    return [f"-n{options.n}", *pairs, *(f"--impl={name}" for name in options.impl), *options.rest]


def run_once(number: int, place: Path, options: argparse.Namespace) -> Run:
    """Run the tests once; the log and the results in `place` are kept if it failed.

    number: 1 for the first; even runs have load. Raises HarnessError if pytest could not run the tests.
    """
    seed = options.seed if options.seed is not None and number == 1 else random.randrange(SEEDS)  # noqa: S311
    spinners = 0 if number % 2 else options.spinners
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    command = [
        "pytest", *NETNS, "-q", "--random-order-bucket=global", f"--random-order-seed={seed}",
        "--results", str(place / "results.json"), *_selection(options),
    ]  # fmt: skip
    started = time.monotonic()
    with (place / "log").open("wb") as log, _load(spinners):
        status = run_program(command, DEADLINE, log.fileno())
    seconds = time.monotonic() - started
    if status not in {0, 1, None}:
        raise HarnessError(f"pytest ended with status {status}; its output: {place / 'log'}")
    states = _states(place / "results.json")
    failed = tuple(sorted(test for test, state in states.items() if state in GATING))
    if status == 0:
        shutil.rmtree(place)
    return Run(
        number=number,
        seed=seed,
        spinners=spinners,
        status=status,
        seconds=round(seconds, 1),
        tests=len(states),
        failed=failed,
    )


@contextmanager
def _load(spinners: int) -> Iterator[None]:
    """Run spinners for the length of the block, each of which uses a processor."""
    spinner = [sys.executable, "-S", "-c", SPIN]
    children = [subprocess.Popen(spinner, stdin=subprocess.DEVNULL) for _ in range(spinners)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def _states(file: Path) -> dict[str, str]:
    """Return the state of each test that ran; empty if there is no results file."""
    try:
        results = json.loads(file.read_text())["results"]
    except (OSError, ValueError):
        return {}
    return {result["id"]: result["state"] for result in results if result["state"] not in {"skipped", "unsupported"}}


if __name__ == "__main__":
    sys.exit(main())
