"""Define the commands of `wg-interop`: run, coverage, mutants, probe, install and others.

`run` starts pytest behind harness/sandbox/launcher.py, so that the sandbox and all in it end with this process. The
plugin's reporter sends the finished tests on a pipe. Every error is one line on stderr and an exit status.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NoReturn

import click

from harness.cli import (
    terminal,
)
from harness.cli.terminal import COULD_NOT, FAILED, OK, USAGE
from harness.errors import HarnessError, Unavailable, UsageError
from harness.install import (
    cache,
    installer,
    tools,
)
from harness.lanes import EVENTS, GUESTS, REPORT, SUITES
from harness.plugin import publish, rundir
from harness.report.results import LOG, read_results, write_in_one_step
from harness.sandbox.launch import pytest_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

EXIT_STATUS: Final = {UsageError: USAGE, Unavailable: COULD_NOT}
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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit with its status: the entry point of the script `wg-interop`."""
    sys.exit(_status(arguments))


def _status(arguments: Sequence[str] | None) -> int:
    try:
        return int(cli.main(arguments, prog_name="wg-interop", standalone_mode=False) or OK)
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "wg-interop"
        return _complain(f"{error.format_message().rstrip('.')}; see {command} --help", USAGE)
    except HarnessError as error:
        return _complain(str(error), EXIT_STATUS.get(type(error), FAILED))
    except (KeyboardInterrupt, click.Abort):
        return _complain("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        return _system_error(error)


def _complain(message: str, status: int) -> int:
    click.echo(f"wg-interop: {' '.join(message.split())}", err=True)
    return status


def _system_error(error: OSError) -> int:
    if error.errno == errno.EPIPE:
        # The reader of our output has closed it. Without this, Python reports the error again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return _complain(f"{error.filename or 'system'}: {error.strerror}", COULD_NOT)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("wg-interop"), message="wg-interop %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Test WireGuard implementations against each other, in network namespaces of their own.

    \b
    First time:
      wg-interop doctor                      see what works on this machine, and how to fix the rest
      wg-interop install                     download and build the implementations to test
      wg-interop run -n 2                    test every implementation with every other, in two workers

    \b
    Your own program, if it is started as `PROGRAM -f INTERFACE`:
      wg-interop run --impl mine=./my-wireguard --pair mine~wireguard-go
      wg-interop probe --impl mine=./my-wireguard -o mine.toml         what it can do, as a manifest

    Exit status: 0 all passed, 1 something failed, 2 wrong usage, 125 could not test, 130 interrupted.
    """  # noqa: D301 - click does not rewrap a paragraph that begins with \b
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# run


class _WithPytestArguments(click.Command):
    """A command that keeps the arguments after `--` for pytest, in `ctx.obj`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ctx.obj = args[end + 1 :]
        return super().parse_args(ctx, args[:end])

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] [PATH]... [-- PYTEST ARGUMENTS...]")


@cli.command(cls=_WithPytestArguments)
@click.option(
    "--impl", multiple=True, metavar="NAME[=PROGRAM]",
    help="Test this implementation; PROGRAM is the path of the program to start for it. May be repeated. Default: all "
    "that `wg-interop doctor` lists.",
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
@click.option("-n", "workers", metavar="N", help="Number of parallel workers, or `auto`.")
@click.option("-k", "expression", metavar="EXPR", help="Run only tests that match, as in pytest: `roaming and not v6`.")
@click.option("-m", "markers", metavar="EXPR", help="Run only tests with these markers, as in pytest: `core`.")
@click.option(
    "--results", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write the results to this file, and index.html and evidence/ beside it. Default: report/results.json.",
)  # fmt: skip
@click.option("--keep", metavar="failed|all|none", help="Keep evidence of failed (default), all or no tests.")
@click.option("--seed", metavar="N", help="Seed of all random choices. A run prints its seed; pass it to repeat them.")
@click.option("--timeout-scale", metavar="F", help="Multiply every deadline by F, on a slow machine.")
@click.option(
    "--pause-on-error", is_flag=True, help="Keep a failed test's lab up, print how to enter it, wait for Enter."
)
@click.option("--shell", metavar="NODE", help="After a failed test, open a shell in this node: ns1, ns2, A, B.")
@click.option("--strace", metavar="NODE", help="Run the program of this node under strace; evidence strace.NODE.txt.")
@click.option("--gdb", metavar="NODE", help="Attach gdb to the program of this node when it has started.")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.pass_context
def run(
    context: click.Context, /, paths: tuple[str, ...], results: Path | None, suites: tuple[str, ...], **options: _Option
) -> int:
    """Run the tests and show which implementations work with each other.

    PATH is a test file, a directory, or the id of a test as a failure prints it. Without PATH, the tests that --suite
    selects in the directory selftests of this checkout. Arguments after -- go to pytest.

    \b
      wg-interop run --pair wireguard-go~wireguard-go-debian -n 2
      wg-interop run --impl wireguard-go=/tmp/build/wireguard -k handshake
      wg-interop run --impl mine=/tmp/build/wireguard --like wireguard-go
      wg-interop run --impl-manifest mine.toml --keep all
      wg-interop run --suite lab -n 2
      wg-interop run --suite conformance --impl mine=/tmp/build/wireguard -n 4
      wg-interop run --lane netns -- --random-order --maxfail=1
      wg-interop run --lane vm --kernel 6.12 --pair kernel~mine --impl mine=/tmp/build/wg
    """  # noqa: D301
    root = find_root(paths)
    report = (results or root / "report" / "results.json").absolute()
    arguments = [*_pytest_options(options), f"--rootdir={root}", f"--results={report}", *context.obj]
    if not os.access(root, os.W_OK):
        # Another user's checkout: pytest warns that it cannot write its cache, and a warning fails the run (pyproject).
        arguments.append(f"-ocache_dir={report.parent / '.pytest_cache'}")
    for remark in _remarks(options):
        click.echo(remark)
    at_terminal = any(options[name] for name in _AT_TERMINAL)
    return _Run(report, at_terminal=at_terminal).run([*_tests(root, paths, suites), *arguments])


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


def _tests(root: Path, paths: Sequence[str], suites: Sequence[str]) -> list[str]:
    """Return the paths of the tests to run, and --suite options if the paths contain tests of other suites too."""
    wanted = set(suites) or ({*SUITES} if paths else {"pairs", "alone"})
    chosen = list(paths)
    if not paths:
        home = root / "selftests"
        # If selftests/ has other folders, all of it is run.
        here = {"netns" if suite in {"pairs", "alone"} else suite for suite in wanted}
        all_there = "all" not in wanted and all((home / folder).is_dir() for folder in here)
        chosen = [str(home / folder) for folder in sorted(here)] if all_there else [str(home)]
        if not suites:
            return chosen
    filtered = "all" not in wanted and wanted != {*SUITES}
    return chosen + [f"--suite={suite}" for suite in sorted(wanted) if filtered]


def find_root(paths: Sequence[str], here: Path | None = None) -> Path:
    """Return the directory that contains `selftests`: the first path, or the current directory, or one above it.

    If paths are given and none of these contains it, returns the current directory. Raises UsageError if a path does
    not exist, or if neither paths nor such a directory exist.
    """
    for text in paths:
        if not Path(text.partition("::")[0]).exists():
            raise UsageError(f"no test file or directory {text.partition('::')[0]}")
    start = Path(paths[0].partition("::")[0]).absolute() if paths else (here or Path.cwd())
    for candidate in (start, *start.parents):
        if (candidate / "selftests").is_dir():
            return candidate
    if paths:
        return Path.cwd()
    raise UsageError(f"no directory selftests in {start} or above it; go to a checkout, or wg-interop run PATH")


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

    def __init__(self, results: Path, *, at_terminal: bool = False) -> None:
        """at_terminal: pytest uses the terminal, so no progress is drawn on it."""
        self._results = results
        self._at_terminal = at_terminal
        self._tally = terminal.Tally()
        self._out = terminal.console(sys.stdout)
        self._stopped_by: signal.Signals | None = None
        self._deadline: float | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, arguments: list[str]) -> int:
        """Run pytest, show its progress and results, and return the exit status of the command."""
        for module, package in (("pytest", "pytest"), ("xdist", "pytest-xdist")):
            if importlib.util.find_spec(module) is None and (module == "pytest" or "-n" in arguments):
                raise Unavailable(f"{package} is not installed; to install it: pip install 'wg-interop[test]'")
        with closing(publish.NewReport(self._results)) as report, (report.directory / LOG).open("w+b") as log:
            out = terminal.plain_console(sys.stdout) if self._at_terminal else self._out
            progress = terminal.Progress(out, self._tally)
            with self._started(arguments, report.directory, log) as (child, events), progress:
                self._follow(child, events, progress)
            log.seek(0)
            said = log.read().decode(errors="replace").splitlines()
            place = self._place_of(log)
            if place is not None:
                self._tally.replace(read_results(place / self._results.name).results)
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
        command = pytest_command(guests=any(word in {f"--lane={lane}" for lane in GUESTS} for word in arguments))
        with _signals_to(self._stop):
            # In its own session the child gets no SIGINT from the terminal at Ctrl-C, only the one that _stop sends.
            self._child = subprocess.Popen(
                [*command, "--color=no", *arguments],
                stdin=None if self._at_terminal else subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {EVENTS: str(events), REPORT: str(directory)}, pass_fds=[events],
            )  # fmt: skip
            os.close(events)
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
        self._show_end(conclusion, said, place or self._results.parent)
        style = "bold green" if conclusion.status == OK else "bold red"
        terminal.line(self._out, f"{self._tally} in {seconds:.1f} s", style)
        if place:
            terminal.line(self._out, f"results: {terminal.short(place / self._results.name)}")
        terminal.line(self._out, f"pytest's output: {terminal.short(log)}")
        return _complain(conclusion.reason, conclusion.status) if conclusion.reason else conclusion.status

    def _show_end(self, conclusion: terminal.Conclusion, said: Sequence[str], place: Path) -> None:
        terminal.summary(self._out, self._tally, place)
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


# The other commands


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON, for other programs.")
def doctor(as_json: bool) -> int:
    """Check this machine, and print how to fix what is missing.

    Everything that the lab needs is tried in a sandbox: namespaces, devices, programs. Also lists all implementations
    that can be tested, and whether they are installed.

    Exit status: 0 lane netns can run, 125 it cannot.
    """
    from harness.cli.doctor import examine  # noqa: PLC0415 - only this command needs it

    return examine(sys.stdout, as_json=as_json)


@cli.command()
@click.argument(
    "results", nargs=-1, type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="[RESULTS.json]..."
)
@click.option("--json", "as_json", is_flag=True, help="Print the coverage as JSON, for other programs.")
@click.option("--all", "everything", is_flag=True, help="Also print, for each id, what its tests did where.")
@click.option("--record", is_flag=True, help="Also add the results to selftests/conformance/record.toml.")
def coverage(results: tuple[Path, ...], *, as_json: bool, everything: bool, record: bool) -> int:
    """Show which requirements and bugs the black-box tests cover, and what the others lack.

    \b
      wg-interop coverage                              by the record, and all results below report/
      wg-interop coverage report/vm/results.json --record
      wg-interop coverage --json | jq .uncovered_must

    \b
    A requirement counts as covered if
      1. a test in selftests/netns, faults, mutants, interop or conformance cites it,
      2. such a test passed on two implementations, one of which is not refwg, in a recorded run, and
      3. a deliberate defect was seen to fail such a test: `seen_to_fail` in the catalogue says which.

    Two versions of a program are two implementations: kernels 6.1 and 6.12, wireguard-go and wireguard-go-debian. So a
    requirement that only a kernel can have counts if both kernels passed. The totals say how many passed on two
    versions of one program only.

    A bug counts if a test that cites it passed on two implementations, or fails as expected on the program that has it
    and passes on another. The sums leave out requirements that only a unit test can observe. More: docs/coverage.md.

    Exit status: 0 the coverage is printed, 2 wrong usage.
    """  # noqa: D301
    from harness.cli.coverage import show  # noqa: PLC0415 - few ask for it

    return show(results, sys.stdout, as_json=as_json, everything=everything, record=record)


@cli.command()
@click.option("--impl", metavar="NAME[=PROGRAM]", default="", help="Probe this program, as NAME.")
@click.option("--impl-manifest", "manifest", metavar="FILE", default="", help="Probe the program of this manifest.")
@click.option("--like", metavar="LIKE", default="", help="Start the program like the implementation LIKE.")
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write the manifest to this file. Default: stdout.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("--timeout-scale", type=float, default=1.0, metavar="F", help="Multiply every deadline.")
def probe(*, impl: str, manifest: str, like: str, out: Path | None, force: bool, timeout_scale: float) -> int:
    """Try each capability of a program in a sandbox, and write its manifest.

    \b
      wg-interop probe --impl theirs=/tmp/build/wg -o theirs.toml
      wg-interop probe --impl-manifest theirs.toml -o theirs.toml --force

    The manifest declares what works, with refwg as the peer, and has a comment for each capability that is lacking,
    with what was seen. Progress goes to stderr.

    Exit status: 0 the manifest is written, 1 the program does not work at all or a probe could show nothing, 2 wrong
    usage, 125 could not test.
    """  # noqa: D301
    from harness.cli.probe import Order, probe_program  # noqa: PLC0415 - few ask for it

    tools.exit_on_sigterm()
    order = Order(impl=impl, manifest=manifest, like=like, timeout_scale=timeout_scale)
    return probe_program(order, out, force=force)


@cli.command(name="install")
@click.argument("names", nargs=-1, metavar="[NAME|FILE.toml]...")
def install_(names: tuple[str, ...]) -> int:
    """Download and build the implementations to test.

    NAME is one of those that `wg-interop doctor` lists. FILE.toml is a manifest with a table [install]
    (docs/manifests.md). Without arguments, everything that comes with the lab is installed; programs in Rust take
    minutes to build. All goes into the cache. An installed implementation is not built again.

    Exit status: 0 all are installed, 2 wrong usage, 125 something could not be installed.
    """
    from harness.implementations.manifest import load_manifest  # noqa: PLC0415 - only this command needs it

    tools.exit_on_sigterm()
    for name in names:
        if installer.is_manifest(name):
            # Report a mistake in any key of the manifest now, not after a build that takes minutes.
            load_manifest(Path(name))
    return installer.install_each(names)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON, for other programs.")
@click.option("--area", "areas", multiple=True, metavar="AREA", help="Run the mutants of this area. May be repeated.")
@click.option(
    "--engine", default="", metavar="ENGINE", type=click.Choice(["", "simple", "batch"]),
    help="Run each with this engine of refwg: simple or batch. Default: auto, or the one that the mutant needs.",
)  # fmt: skip
@click.argument("names", nargs=-1, metavar="[NAME]...")
def mutants(names: tuple[str, ...], areas: tuple[str, ...], engine: str, as_json: bool) -> int:
    """Show that the tests detect the mutants: refwg, broken on purpose in one place.

    Each mutant violates requirements of the catalogue, and names its killer: a test that must fail with the mutant and
    pass with refwg as it is. Prints for each mutant whether it was caught, by which test, and which of its requirements
    this test cites. Two killers run at a time. Without NAME and AREA all mutants are run, which takes minutes. An area
    is a file of refwg/mutants/ (docs/mutants.md).

    \b
      wg-interop mutants no-clamp
      wg-interop mutants --area routing --area timers
      wg-interop mutants --engine batch
      wg-interop mutants --json

    Exit status: 0 all are caught, 1 one is not, 2 wrong usage, 125 a killer could not run.
    """  # noqa: D301
    from harness.cli.mutants import run_command  # noqa: PLC0415 - only this command needs it

    tools.exit_on_sigterm()
    return run_command(find_root(()), names, areas, sys.stdout, engine=engine, as_json=as_json)


@cli.command("kernel-defects")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON, for other programs.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def kernel_defects(names: tuple[str, ...], as_json: bool) -> int:
    """Show that the tests detect defects of the kernel's driver.

    Builds wireguard.ko from Debian's source with one defect each, and loads one after the other in a guest. A defect
    names its killer: a test that must fail with it, and pass with the driver as it is. Without NAME all defects of
    selftests/conformance/kernel-defects.toml are tried, which takes minutes (docs/kernel-defects.md).

    \b
      wg-interop kernel-defects
      wg-interop kernel-defects link-has-flag-multicast --json

    Exit status: 0 all are caught, 1 one is not, 2 wrong usage, 125 a killer could not run.
    """  # noqa: D301
    from harness.cli.kernel_defects import run_command  # noqa: PLC0415 - only this command needs it

    tools.exit_on_sigterm()
    return run_command(find_root(()), names, sys.stdout, as_json=as_json)


@cli.command()
@click.option("--all", "everything", is_flag=True, help="Also remove implementations, toolchains and kernels.")
def clean(everything: bool) -> int:
    """Remove from the cache what killed runs left there.

    A run removes its own directory at its end, and those of killed runs at its start. Runs in progress keep theirs.
    """
    root = cache.cache_root()
    running = _clean_runs(root / cache.Area.RUNS)
    if everything and running:
        raise HarnessError(f"the rest of {root} was not removed: run {running[0].name} uses it; end that run first")
    if everything and root.is_dir():
        for path in sorted(entry for entry in root.iterdir() if entry.is_dir() and entry.name != cache.Area.RUNS):
            _remove_area(path)
    return OK


def _clean_runs(runs: Path) -> list[Path]:
    """Remove the directories of dead runs and print them; return those of runs in progress."""
    if not runs.is_dir():
        click.echo(f"nothing to remove: {runs} does not exist")
        return []
    with cache.locked(runs):
        sizes = {path: _size(path) for path in runs.iterdir() if path.is_dir()}
        removed = rundir.remove_abandoned(runs)
    for path in removed:
        click.echo(f"removed {path} ({terminal.human(sizes.get(path, 0))})")
    running = [path for path in sizes if path.exists()]
    for path in running:
        click.echo(f"not removed, still running: {path} ({_owner(path)})")
    click.echo(f"{len(removed)} dead runs removed, {terminal.human(sum(sizes.get(path, 0) for path in removed))}")
    return running


def _owner(run: Path) -> str:
    with suppress(OSError):
        return (run / "owner").read_text().strip()
    return "of another user"


def _remove_area(path: Path) -> None:
    busy = next((lock for lock in path.rglob(".*.lock") if _is_locked(lock)), None)
    if busy is not None:
        raise HarnessError(f"{path} was not removed: an installation into {busy.parent} is running; wait until it ends")
    size = _size(path)
    cache.remove(path)
    click.echo(f"removed {path} ({terminal.human(size)})")


def _is_locked(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _size(tree: Path) -> int:
    total = 0
    for path in tree.rglob("*"):
        # A running test may have removed the file.
        with suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total
