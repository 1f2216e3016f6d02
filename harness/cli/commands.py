"""Define the commands of `wg-interop`: run, coverage, mutants, probe, install and others.

A command that is more than a call has a module of its own in this folder. Every error is one line on stderr and an
exit status.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from harness import suite
from harness.cli.bisect import bisect
from harness.cli.hosted import hosted
from harness.cli.report import report
from harness.cli.run import run
from harness.cli.site import site
from harness.cli.terminal import COULD_NOT, FAILED, OK, USAGE, complain
from harness.errors import HarnessError, Unavailable, UsageError
from harness.install import installer, tools

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_STATUS: Final = {UsageError: USAGE, Unavailable: COULD_NOT}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit with its status: the entry point of the script `wg-interop`."""
    sys.exit(_status(arguments))


def _status(arguments: Sequence[str] | None) -> int:
    try:
        return int(cli.main(arguments, prog_name="wg-interop", standalone_mode=False) or OK)
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "wg-interop"
        return complain(f"{error.format_message().rstrip('.')}; see {command} --help", USAGE)
    except HarnessError as error:
        return complain(str(error), EXIT_STATUS.get(type(error), FAILED))
    except (KeyboardInterrupt, click.Abort):
        return complain("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        return _system_error(error)


def _system_error(error: OSError) -> int:
    if error.errno == errno.EPIPE:
        # The reader of our output has closed it. Without this, Python reports the error again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return complain(f"{error.filename or 'system'}: {error.strerror}", COULD_NOT)


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


cli.add_command(run)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON, for other programs.")
def where(as_json: bool) -> int:
    """Print where the suite, its catalogue, its expectations and the cache are, and the version.

    The last line has pytest's options for the suite: with them the ids of its tests begin with `selftests/`, as in
    `wg-interop run`, and pytest's cache goes to the current directory.

    \b
      pytest $(wg-interop where --json | jq -r '.pytest | join(" ")') --collect-only -q
    """  # noqa: D301
    from harness.cli.where import show  # noqa: PLC0415 - few ask for it

    return show(sys.stdout, as_json=as_json)


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


cli.add_command(bisect)
cli.add_command(report)


@cli.command(name="install")
@click.argument("names", nargs=-1, metavar="[NAME[@VERSION]|FILE.toml]...")
def install_(names: tuple[str, ...]) -> int:
    """Download and build the implementations to test.

    NAME is one of those that `wg-interop doctor` lists; NAME@VERSION is another version of it, which is installed
    beside it (docs/versions.md): wireguard-go@20230223, boringtun@0.6.0. FILE.toml is a manifest with a table [install]
    (docs/manifests.md). Without arguments, everything that comes with the lab is installed; programs in Rust take
    minutes to build. All goes into the cache. An installed implementation is not built again.

    Exit status: 0 all are installed, 2 wrong usage, 125 something could not be installed.
    """
    from harness.implementations.manifest import load_manifest  # noqa: PLC0415 - only this command needs it
    from harness.implementations.registry import Registry  # noqa: PLC0415

    tools.exit_on_sigterm()
    registry, named = Registry(), {}
    for name in names:
        if installer.is_manifest(name):
            # Report a mistake in any key of the manifest now, not after a build that takes minutes.
            load_manifest(Path(name))
        elif "@" in name or name in registry.known:
            manifest = registry.get(name)
            named[name] = (manifest.name, manifest.install)
    return installer.install_each(names, named)


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
    return run_command(suite.root(), names, areas, sys.stdout, engine=engine, as_json=as_json)


@cli.command()
@click.option("--impl", metavar="NAME[=PROGRAM]", default="", help="Fuzz this program.")
@click.option("--impl-manifest", "manifest", metavar="FILE", default="", help="Fuzz the program of this manifest.")
@click.option("--like", metavar="LIKE", default="", help="Start the program like the implementation LIKE.")
@click.option("--minutes", type=float, default=1.0, metavar="N", help="Fuzz for N minutes. Default: 1.")
@click.option("--count", type=int, default=0, metavar="N", help="End after N packets and requests, too.")
@click.option("--seed", metavar="N", default="", help="Make the inputs of this seed. Default: a new one, printed.")
@click.option("--surface", "surfaces", multiple=True, type=click.Choice(["packets", "uapi"]),
              help="Send only packets, or only requests to the control socket. Default: both.")  # fmt: skip
@click.option("--in-process", is_flag=True, help="Run refwg's device in this process: no sockets, virtual time.")
@click.option("--engine", type=click.Choice(["simple", "batch"]), default="simple", help="Of refwg, --in-process.")
@click.option("--guide", metavar="coverage|answers|nothing", default="",
              help="Keep and vary inputs that reach new code of refwg (atheris), that lead to new answers and drop "
              "reasons, or none. Default: coverage --in-process if atheris is installed and there is no --count, "
              "else answers.")  # fmt: skip
@click.option("--corpus", type=click.Path(file_okay=False), metavar="DIR", default="",
              help="Keep inputs and findings here. Default: fuzz/NAME in the cache.")  # fmt: skip
@click.option("--ignore", multiple=True, metavar="REGEX",
              help="Count a finding whose message matches, and go on: for what is known. May be repeated.")  # fmt: skip
@click.option("--json", "results", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write figures and finding to this file.")  # fmt: skip
@click.option("--timeout-scale", type=float, default=1.0, metavar="F", help="Multiply every deadline.")
def fuzz(*, minutes: float, results: Path | None, **options: Any) -> int:
    """Send a program hostile messages in every state, and requests, until one does harm.

    A scripted peer makes real handshakes, and changes messages in each state of them: types, lengths, indices,
    counters, macs, points, and the packets behind a valid tag; it repeats and reorders them. Requests to the control
    socket are nearly right. The program must be silent or answer correctly, stay alive, keep its memory, descriptors
    and CPU, and serve a legitimate peer. The first input that does harm is reduced to a test, with a capture.

    \b
      wg-interop fuzz --impl mine=/tmp/build/wg --minutes 10
      wg-interop fuzz --impl wireguard-go --surface packets --seed 7 --json fuzz.json
      wg-interop fuzz --impl refwg --in-process --engine batch --count 10000000 --minutes 600

    docs/fuzzing.md explains what is sent and checked, and how to read a finding.

    Exit status: 0 nothing found, 1 a finding, 2 wrong usage, 125 could not test, 130 interrupted.
    """  # noqa: D301
    from harness.cli.fuzz import run_command  # noqa: PLC0415 - few ask for it

    return run_command(results, seconds=60 * minutes, **options)


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
    return run_command(suite.root(), names, sys.stdout, as_json=as_json)


@cli.command()
@click.option("--all", "everything", is_flag=True, help="Also remove implementations, toolchains and kernels.")
def clean(everything: bool) -> int:
    """Remove from the cache what killed runs left there.

    A run removes its own directory at its end, and those of killed runs at its start. Runs in progress keep theirs.
    """
    from harness.cli.clean import clean_cache  # noqa: PLC0415 - only this command needs it

    return clean_cache(everything=everything)


cli.add_command(site)
cli.add_command(hosted)
