"""Run the tests in pytest and print their results: `wg-interop run`.

pytest is started behind harness/sandbox/launcher.py, so that the sandbox and all in it end with this process. The
plugin's reporter sends the finished tests on a pipe.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import click

from harness import suite
from harness.cli import continuous, terminal
from harness.cli.on import connected
from harness.cli.settled import settle
from harness.cli.terminal import OK
from harness.errors import UsageError
from harness.install import cache
from harness.lanes import EVENTS, GUESTS, REPORT, SUITES
from harness.plugin import publish
from harness.report.results import LOG, read_results, write_in_one_step
from harness.sandbox.launch import pytest_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from harness.cli.on import Team
    from harness.report.results import RunResults

# The lowest descriptor for events. It is high: a program that inherits the variable without the pipe must not have
# another file at this number.
_EVENTS_FROM: Final = 200
_TICK: Final = 0.25  # seconds between two updates of the progress
_PATIENCE: Final = 15.0  # seconds for pytest to stop after Ctrl-C; then it is killed, and the kernel cleans up
_LOG_TAIL: Final = 40  # last lines of pytest's output that are shown after an error
# The value of an option that the plugin checks: a tuple if it may be repeated, a bool for a flag, None if not given.
_Option = tuple[str, ...] | str | bool | None
# Options that use the terminal, so that no progress may be drawn on it.
_AT_TERMINAL: Final = ("pause_on_error", "shell", "gdb")


class _WithPytestArguments(click.Command):
    """A command that keeps the arguments after `--` for pytest, in `ctx.obj`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ctx.obj = args[end + 1 :]
        return super().parse_args(ctx, args[:end])

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] [PATH]... [-- PYTEST ARGUMENTS...]")


@click.command(cls=_WithPytestArguments)
@click.option(
    "--impl", multiple=True, metavar="NAME[@VERSION][=PROGRAM]",
    help="Test this implementation, or this version of it; PROGRAM is the path of the program to start for it. May be "
    "repeated. Default: all that `wg-interop doctor` lists.",
)  # fmt: skip
@click.option(
    "--impl-manifest", multiple=True, metavar="FILE",
    help="Test the implementation that this manifest describes: with itself, unless --impl or --pair names others.",
)  # fmt: skip
@click.option(
    "--like", multiple=True, metavar="[NAME=]LIKE",
    help="Start the program of --impl NAME=PROGRAM like LIKE, with its capabilities and known failures. Without NAME: "
    "all programs that have no manifest.",
)  # fmt: skip
@click.option("--pair", multiple=True, metavar="A~B", help="Test A in ns1, B in ns2. Default: all ordered pairs.")
@click.option(
    "--lane", multiple=True, metavar="LANE",
    help="Run only this lane: core (no namespaces), netns (namespaces of this kernel), vm (a guest with another "
    "kernel), warp (a guest whose clock skips idle time). May be repeated. Default: core and netns.",
)  # fmt: skip
@click.option(
    "--kernel", multiple=True, metavar="VERSION|PATH",
    help="Kernel of lanes vm and warp: a Debian version such as 6.12, a bzImage or a build tree. May be repeated.",
)  # fmt: skip
@click.option(
    "--kernel-module", multiple=True, metavar="FILE",
    help="In lanes vm and warp, load this wireguard.ko instead of the kernel's own. May be repeated.",
)  # fmt: skip
@click.option(
    "--suite", "suites", multiple=True, type=click.Choice([*SUITES, "all"]),
    help="Run only the tests of two implementations (pairs), of one (alone), of the lab itself (lab), of single "
    "requirements (conformance), or all tests, unit tests too (all). May be repeated. Default: pairs and alone; with a "
    "PATH, all tests there.",
)  # fmt: skip
@click.option(
    "--nightly", is_flag=True, help="Run long tests too, and send as much as the requirements ask; it takes hours."
)
@click.option(
    "--on", multiple=True, metavar="ssh:HOST|vm:N|warp:N",
    help="Run the tests on this machine, by ssh, instead of here; or share those of lane vm or warp among N guests. "
    "May be repeated: machines share the tests, too (docs/hosts.md).",
)  # fmt: skip
@click.option("-n", "workers", metavar="N", help="Number of parallel workers, or `auto`; with --on, on each machine.")
@click.option("-k", "expression", metavar="EXPR", help="Run only tests that match, as in pytest: `roaming and not v6`.")
@click.option("-m", "markers", metavar="EXPR", help="Run only tests with these markers, as in pytest: `core`.")
@click.option(
    "--results", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write the results to this file, and index.html and evidence/ beside it. Default: report/results.json.",
)  # fmt: skip
@continuous.options
@click.option("--keep", metavar="failed|all|none", help="Keep evidence of failed (default), all or no tests.")
@click.option(
    "--blame/--no-blame", default=True,
    help="At the end run failed tests again, with refwg in the place of A, of B and of both, and name the program to "
    "blame. Default: --blame.",
)  # fmt: skip
@click.option("--blame-seconds", metavar="N", help="Run failed tests again for at most N seconds. Default: 300.")
@click.option("--seed", metavar="N", help="Seed of all random choices. A run prints its seed; pass it to repeat them.")
@click.option("--timeout-scale", metavar="F", help="Multiply every deadline by F, on a slow machine.")
@click.option(
    "--pause-on-error", is_flag=True, help="Keep a failed test's lab up, print how to enter it, wait for Enter."
)
@click.option("--shell", metavar="NODE", help="After a failed test, open a shell in this node: ns1, ns2, A, B.")
@click.option("--strace", metavar="NODE", help="Run the program of this node under strace; evidence strace.NODE.txt.")
@click.option("--valgrind", metavar="NODE", help="Run the program of this node under memcheck; errors fail the test.")
@click.option("--gdb", metavar="NODE", help="Attach gdb to the program of this node when it has started.")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.pass_context
def run(
    context: click.Context, /, paths: tuple[str, ...], results: Path | None, suites: tuple[str, ...], **options: _Option
) -> int:
    """Run the tests and show which implementations work with each other.

    PATH is a test file, a directory, or the id of a test as a failure prints it; one that is not in the current
    directory is looked for in the suite (`wg-interop where`). Without PATH, the tests of the suite that --suite
    selects. The report goes to the current directory. Arguments after -- go to pytest.

    Options that are not given are taken from the environment (--timeout-scale from WG_TIMEOUT_SCALE, --impl from
    WG_IMPL="refwg kernel"), else from wg-interop.toml in this directory or above (docs/settings.md).

    \b
      wg-interop run --pair wireguard-go~wireguard-go-debian -n 2
      wg-interop run --impl wireguard-go=/tmp/build/wireguard -k handshake
      wg-interop run --impl mine=/tmp/build/wireguard --like wireguard-go
      wg-interop run --impl-manifest mine.toml --keep all
      wg-interop run --suite lab -n 2
      wg-interop run --suite conformance --impl mine=/tmp/build/wireguard -n 4
      wg-interop run --lane netns -- --random-order --maxfail=1
      wg-interop run --lane vm --kernel 6.12 --pair kernel~mine --impl mine=/tmp/build/wg

    In CI, red only for news (docs/ci.md):

    \b
      wg-interop run --impl mine=./wg --baseline known.toml --must-include mine
      wg-interop run --lane vm --kernel . --pair kernel~kernel --ktap -

    Exit status: 0 all passed, 1 something failed, 2 wrong usage, 125 could not test (`git bisect run` skips such a
    commit), 130 interrupted.
    """  # noqa: D301
    options, results, suites, settings = settle(options, results, suites)
    outlet = continuous.take_outlet(options)
    tests = _tests(paths, suites)
    workplace = suite.workplace()
    report = (results or workplace / "report" / "results.json").absolute()
    arguments = [*_pytest_options(options), *_place(tests), f"--results={report}", *context.obj]
    # In another user's checkout pytest would warn that it cannot write its cache, and a warning fails the run.
    cache_place = workplace if os.access(workplace, os.W_OK) else report.parent
    arguments.append(f"-ocache_dir={cache_place / '.pytest_cache'}")
    for remark in (*settings, *_remarks(options)):
        click.echo(remark, file=outlet.stream)
    at_terminal = any(options[name] for name in _AT_TERMINAL)
    places = options["on"] if isinstance(options["on"], tuple) else ()
    with connected(places, lambda text: click.echo(text, file=outlet.stream)) as team:
        return _Run(report, outlet, team, at_terminal=at_terminal).run([*tests, *arguments])


def _remarks(options: Mapping[str, _Option]) -> list[str]:
    """Return remarks on programs given by path; empty if an option is wrong, which pytest reports."""
    programs, manifests, likes = (
        value if isinstance(value := options[name], tuple) else () for name in ("impl", "impl_manifest", "like")
    )
    if not any("=" in text for text in programs):
        return []
    from harness.implementations.registry import Registry  # noqa: PLC0415 - few runs ask for it

    try:
        return Registry.of_options(programs, [Path(name) for name in manifests], likes).remarks()
    except UsageError:
        return []


def _tests(paths: Sequence[str], suites: Sequence[str]) -> list[str]:
    """Return the paths of the tests to run, and --suite options if the paths contain tests of other suites too."""
    wanted = set(suites) or ({*SUITES} if paths else {"pairs", "alone"})
    chosen = [suite.locate(text) for text in paths]
    if not paths:
        home = suite.root() / suite.FOLDER
        # If selftests/ has other folders, all of it is run.
        here = {"netns" if name in {"pairs", "alone"} else name for name in wanted}
        all_there = "all" not in wanted and all((home / folder).is_dir() for folder in here)
        chosen = [str(home / folder) for folder in sorted(here)] if all_there else [str(home)]
        if not suites:
            return chosen
    filtered = "all" not in wanted and wanted != {*SUITES}
    return chosen + [f"--suite={name}" for name in sorted(wanted) if filtered]


def _place(tests: Sequence[str]) -> list[str]:
    """Return pytest's options for its configuration and root: those of the suite, unless a test lies elsewhere."""
    own = any(not suite.contains(text) for text in tests if not text.startswith("--suite="))
    return [f"--rootdir={Path.cwd()}"] if own else suite.pytest_options()


def _pytest_options(options: Mapping[str, _Option]) -> list[str]:
    """Convert our options into pytest's. The plugin checks their values."""
    named = {"expression": "-k", "workers": "-n", "markers": "-m"}
    words: list[str] = []
    for name, given in options.items():
        if isinstance(given, bool):
            words += [f"--{name.replace('_', '-')}"] if given else []
            continue
        values = given if isinstance(given, tuple) else () if given is None else (given,)
        for value in values:
            words += [named[name], value] if name in named else [f"--{name.replace('_', '-')}={value}"]
    return words


class _Run:
    """One run of pytest: starts it, shows its progress, prints the conclusion."""

    def __init__(self, results: Path, outlet: continuous.Outlet, team: Team, *, at_terminal: bool = False) -> None:
        """team: the hosts of `--on`. at_terminal: pytest uses the terminal, so no progress is drawn on it."""
        self._results = results
        self._outlet = outlet
        self._team = team
        self._at_terminal = at_terminal
        self._tally = terminal.Tally()
        self._out = terminal.console(outlet.stream)
        self._stopped_by: signal.Signals | None = None
        self._deadline: float | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._contents: RunResults | None = None

    def run(self, arguments: list[str]) -> int:
        """Run pytest, show its progress and results, and return the exit status of the command."""
        with closing(publish.NewReport(self._results)) as report, (report.directory / LOG).open("w+b") as log:
            out = terminal.plain_console(self._outlet.stream) if self._at_terminal else self._out
            progress = terminal.Progress(out, self._tally)
            with (
                self._outlet.folded("wg-interop run"),
                self._started(arguments, report.directory, log) as (child, events),
                progress,
            ):
                self._follow(child, events, progress)
            log.seek(0)
            said = log.read().decode(errors="replace").splitlines()
            place = self._place_of(log)
            if place is not None:
                self._contents = read_results(place / self._results.name)
                self._tally.replace(self._contents.results)
            return self._conclude(child.returncode, said, place, progress.seconds)

    def _place_of(self, log: IO[bytes]) -> Path | None:
        """Find the directory of this run's report by its log; None if the run made no report.

        Another run that ended after this one may already have moved it to PREVIOUS.
        """
        home = self._results.parent
        for place in (home, home / publish.PREVIOUS):
            with suppress(OSError):
                if os.path.samestat(os.fstat(log.fileno()), (place / LOG).stat()):
                    return place
        return None

    @contextmanager
    def _started(
        self, arguments: list[str], directory: Path, log: IO[bytes]
    ) -> Iterator[tuple[subprocess.Popen[bytes], terminal.Events]]:
        """Start pytest with a pipe for its events. It is killed at the end of the block, or when this process ends."""
        read_end, write_end = os.pipe()
        events = fcntl.fcntl(write_end, fcntl.F_DUPFD_CLOEXEC, _EVENTS_FROM)
        os.close(write_end)
        in_guests = tuple(word for lane in GUESTS for word in (f"--lane={lane}", f"--on={lane}:"))
        command = pytest_command(guests=any(word.startswith(in_guests) for word in arguments))
        with _signals_to(self._stop):
            # In its own session the child gets no SIGINT from the terminal at Ctrl-C, only the one that _stop sends.
            self._child = subprocess.Popen(
                [*command, "--color=no", *arguments],
                stdin=None if self._at_terminal else subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | self._team.environment | {EVENTS: str(events), REPORT: str(directory)},
                pass_fds=[events, *self._team.descriptors],
            )  # fmt: skip
            os.close(events)
            self._team.handed_over()
            try:
                yield self._child, terminal.Events(read_end)
            finally:
                self._child.kill()
                self._child.wait()
                os.close(read_end)

    def _stop(self, number: int, _: object) -> None:
        """Handle SIGINT, SIGTERM and SIGHUP: interrupt pytest; at the second signal, kill it."""
        if self._child is None:
            raise KeyboardInterrupt
        if self._stopped_by is None:
            self._stopped_by = signal.Signals(number)
            self._deadline = time.monotonic() + _PATIENCE
            self._child.send_signal(signal.SIGINT)
        else:
            self._child.kill()

    def _follow(self, child: subprocess.Popen[bytes], events: terminal.Events, progress: terminal.Progress) -> None:
        """Process events until the child has exited and the pipe is empty."""
        exited = os.pidfd_open(child.pid)
        try:
            while child.poll() is None:
                select.select([exited] if events.ended else [exited, events.descriptor], [], [], _TICK)
                self._take(events, progress)
                self._hurry(child, progress)
                if not self._at_terminal:
                    progress.tick()
            self._take(events, progress)
        finally:
            os.close(exited)

    def _take(self, events: terminal.Events, progress: terminal.Progress) -> None:
        for outcome in filter(None, map(self._tally.take, events.lines())):
            progress.moved(outcome)

    def _hurry(self, child: subprocess.Popen[bytes], progress: terminal.Progress) -> None:
        if self._deadline is not None:
            progress.note = "stopping; press Ctrl-C again to stop at once"
            if time.monotonic() > self._deadline:
                child.kill()

    def _conclude(self, status: int, said: Sequence[str], place: Path | None, seconds: float) -> int:
        if status == terminal.PYTEST_USAGE and not self._stopped_by:
            raise UsageError(terminal.usage_error(said))
        conclusion = terminal.conclude(status, set(self._tally.counts()), said)
        if self._stopped_by:
            conclusion = terminal.Conclusion(128 + self._stopped_by, "interrupted")
        log = place / LOG if place else _keep_log(said)
        with self._outlet.quoted():
            self._show_end(conclusion, said, place or self._results.parent)
        style = "bold green" if conclusion.status == OK else "bold red"
        terminal.line(self._out, f"{self._tally} in {seconds:.1f} s", style)
        if place:
            terminal.line(self._out, f"results: {terminal.short(place / self._results.name)}")
        terminal.line(self._out, f"pytest's output: {terminal.short(log)}")
        self._outlet.finish(self._contents, conclusion.reason)
        return terminal.complain(conclusion.reason, conclusion.status) if conclusion.reason else conclusion.status

    def _show_end(self, conclusion: terminal.Conclusion, said: Sequence[str], place: Path) -> None:
        terminal.summary(self._out, self._tally, place)
        for line in self._contents.comparison.lines() if self._contents and self._contents.comparison else ():
            terminal.line(self._out, line)
        for remark in self._tally.remarks:
            terminal.line(self._out, remark, "yellow")
        for name, error in terminal.uncollected(said).items():
            terminal.line(self._out, f"could not be collected: {name}: {error}", "bold red")
        for line in said[-_LOG_TAIL:] if conclusion.see_log else ():
            terminal.line(self._out, f"  | {line}", "dim")
        terminal.line(self._out)


def _keep_log(said: Sequence[str]) -> Path:
    """Keep what pytest printed in the cache, for a run without a report; the last report has its own log."""
    path = cache.cache_root() / LOG
    write_in_one_step(path, "".join(f"{line}\n" for line in said))
    return path


@contextmanager
def _signals_to(handler: Callable[[int, object], None]) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
