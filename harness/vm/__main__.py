"""Run a command under a kernel of your choice: `python -m harness.vm run|prepare`."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HarnessError, UsageError
from harness.vm import image, kernels, qemu

if TYPE_CHECKING:
    from collections.abc import Sequence

from harness.vm.boot import DEFAULT_DEADLINE, Ending, boot, explain, find, kvm_works


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m harness.vm", description="Run a command under a kernel of your choice."
    )
    commands = parser.add_subparsers(required=True)
    prepare_options = commands.add_parser(
        "prepare", help="fetch and build what `run` needs, so that it needs no network"
    )
    run_options = commands.add_parser("run", help="boot, run one command, exit with its status")
    for options, action in ((prepare_options, prepare_command), (run_options, run_command)):
        options.set_defaults(action=action)
        options.add_argument(
            "--kernel",
            default=kernels.CATALOGUE.default,
            help="name, version, bzImage or build tree (default: %(default)s)",
        )
    add_run_options(run_options)
    return parser.parse_args(arguments)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--warp", action="store_true", help="one CPU, and a clock that skips idle time")
    add("--cpus", type=int, default=2, help="default: %(default)s")
    add("--memory", default="2G", help="as QEMU takes it (default: %(default)s)")
    add("--deadline", type=float, default=DEFAULT_DEADLINE, metavar="SECONDS", help="default: %(default)s")
    add("--accelerator", choices=["auto", "kvm", "tcg"], default="auto", help="auto: KVM if a guest came up under it")
    add("--debug", action="store_true", help="dynamic debug of the WireGuard module, into kernel.log")
    add("--file", type=file_argument, action="append", default=[], metavar="PATH[:PATH IN GUEST]", help="take it along")
    add("--collect", action="append", default=[], metavar="PATH", help="a folder of the guest to bring back")
    add("--env", type=environment_argument, action="append", default=[], metavar="NAME=VALUE", help="set in the guest")
    add("--results", type=Path, metavar="DIR", help="copy there what is brought back, and kernel.log")
    add("--durations", action="store_true", help="print where the time went")
    add("command", nargs="+", metavar="COMMAND", help="after --")


def file_argument(text: str) -> tuple[Path, str]:
    here, _, there = text.partition(":")
    path = Path(here).absolute()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{here}: no such file or folder")
    return path, there or str(path)


def environment_argument(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: not NAME=VALUE")
    return name, value


def show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main(arguments: Sequence[str] | None = None) -> int:
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
    kernel = find(options.kernel)
    hardware = qemu.Hardware(cpus=2, memory="1G")
    print(f"vm: {kernel.release} is ready to boot under {'KVM' if kvm_works(kernel, hardware) else 'TCG'}")
    return 0


def run_command(options: argparse.Namespace) -> int:
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
        folder=Path.cwd() if Path.cwd().is_relative_to(image.PROJECT) else image.PROJECT,
        accelerator=options.accelerator,
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
