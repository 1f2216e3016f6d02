"""Run a command under a kernel of your choice: `python -m harness.vm run|prepare`."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness import suite
from harness.errors import HarnessError, UsageError
from harness.vm import kernels, qemu

if TYPE_CHECKING:
    from collections.abc import Sequence

from harness.vm.boot import DEFAULT_DEADLINE, Ending, boot, explain, find, kvm_works


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `action` of the result is the function of the subcommand. Wrong usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.vm",
        description="Run a command in a QEMU guest under a kernel of your choice.",
        epilog="Exit status of `run`: that of COMMAND; 1 if the guest or its kernel failed; 2 for wrong usage; "
        "125 if something must be installed first.",
    )
    commands = parser.add_subparsers(required=True)
    prepare_options = commands.add_parser(
        "prepare", help="download the kernel and build the guest's files, so that `run` needs no network"
    )
    run_options = commands.add_parser("run", help="boot the kernel, run one command, exit with its status")
    add_kernel_module = run_options.add_argument
    add_kernel_module(
        "--kernel-module", type=Path, action="append", default=[], metavar="FILE",
        help="load this module instead of the kernel's own one of the same name; may be repeated",
    )  # fmt: skip
    for options, action in ((prepare_options, prepare_command), (run_options, run_command)):
        options.set_defaults(action=action)
        options.add_argument(
            "--kernel",
            default=kernels.CATALOGUE.default,
            help="a name of kernels.toml, a version that apt has, a bzImage or a kernel build tree "
            "(default: %(default)s)",
        )
    add_run_options(run_options)
    return parser.parse_args(arguments)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only `run` has."""
    add = parser.add_argument
    add("--warp", action="store_true", help="use one CPU and a clock that skips idle time")
    add("--cpus", type=int, default=2, help="number of CPUs (default: %(default)s)")
    add("--memory", default="2G", help="RAM, as QEMU's option -m (default: %(default)s)")
    add(
        "--deadline",
        type=float,
        default=DEFAULT_DEADLINE,
        metavar="SECONDS",
        help="stop the guest after this time (default: %(default)s)",
    )
    add(
        "--accelerator",
        choices=["auto", "kvm", "tcg"],
        default="auto",
        help="tcg emulates; auto: kvm if a test guest boots under it, else tcg (default: %(default)s)",
    )
    add("--debug", action="store_true", help="turn on dynamic debug of the WireGuard module; read it in kernel.log")
    add(
        "--file",
        type=file_argument,
        action="append",
        default=[],
        metavar="PATH[:GUESTPATH]",
        help="copy a file or folder into the guest; may be repeated",
    )
    add(
        "--collect",
        action="append",
        default=[],
        metavar="PATH",
        help="copy this folder of the guest into --results; may be repeated",
    )
    add(
        "--env",
        type=environment_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set an environment variable for COMMAND; may be repeated",
    )
    add(
        "--results",
        type=Path,
        metavar="DIR",
        help="folder here for kernel.log, the files in the guest's $LAB_RESULTS, and those of --collect",
    )
    add("--durations", action="store_true", help="print how long each step took")
    add("command", nargs="+", metavar="COMMAND", help="command to run in the guest; write it after --")


def file_argument(text: str) -> tuple[Path, str]:
    """Parse PATH[:GUESTPATH] into (absolute path here, path in the guest); by default both are the same."""
    host, _, guest = text.partition(":")
    path = Path(host).absolute()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{host}: no such file or folder")
    return path, guest or str(path)


def environment_argument(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE")
    return name, value


def show(data: bytes) -> None:
    """Print a part of the command's output at once."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status; 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    try:
        status: int = options.action(options)
    except UsageError as error:
        print(f"vm: {error}", file=sys.stderr)
        return 2
    except (HarnessError, OSError) as error:
        print(f"vm: {error}", file=sys.stderr)
        return 125
    except KeyboardInterrupt:
        return 130
    return status


def prepare_command(options: argparse.Namespace) -> int:
    """Run `prepare`: fetch and build all that a boot needs, and try KVM."""
    kernel = find(options.kernel)
    hardware = qemu.Hardware(cpus=2, memory="1G")
    print(f"vm: {kernel.release} is ready to boot under {'KVM' if kvm_works(kernel, hardware) else 'TCG'}")
    return 0


def run_command(options: argparse.Namespace) -> int:
    """Run `run`, and return the exit status for the shell."""
    result = boot(
        options.kernel,
        options.command,
        warp=options.warp,
        cpus=options.cpus,
        memory=options.memory,
        deadline=options.deadline,
        debug=options.debug,
        files=options.file,
        collect=options.collect,
        environment=dict(options.env),
        folder=Path.cwd() if Path.cwd().is_relative_to(suite.root()) else None,
        accelerator=options.accelerator,
        replaced=options.kernel_module,
        show=show,
    )
    if result.ending is not Ending.EXITED:
        print(explain(result), file=sys.stderr)
    if options.results and result.results.exists():
        shutil.copytree(result.results, options.results, dirs_exist_ok=True)
    if options.durations:
        print(f"vm: {result.kernel}, {result.accelerator}", file=sys.stderr)
        for step, seconds in result.durations.items():
            print(f"vm: {seconds:8.2f} s  {step}", file=sys.stderr)
    return result.exit_status()


if __name__ == "__main__":
    sys.exit(main())
