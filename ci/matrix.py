"""Set up, run the interop matrix on this kernel and in a guest, and write a report."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Final

from ci.setup_checkout import EXIT_COULD_NOT, EXIT_INTERRUPTED, ROOT, VENV, prepare, python_environment
from harness.errors import HarnessError
from harness.install.tools import exit_on_sigterm
from harness.lanes import SUITES

IMPLEMENTATIONS: Final = ("kernel", "refwg", "wireguard-go")
# To build these two takes minutes, the first time.
RUST: Final = ("boringtun", "gotatun")
SCENARIOS: Final = ROOT / "selftests" / "netns"
# All tests of two implementations. ci/test also runs those of one implementation, and of the lab.
FULL: Final = ("--suite", "pairs")
# The most important scenarios, in some minutes: connecting, counting, allowed ips, roaming, NAT, ICMP errors.
CORE: Final = ("-m", "core", str(SCENARIOS))
QUICK: Final = (str(SCENARIOS / "test_ping_and_counters.py"),)
REPORT: Final = ROOT / "report" / "index.html"

HELP: Final = """\
Run the core scenarios with every ordered pair of implementations, each with itself too: on this kernel, and in a guest
that has WireGuard in its kernel.

Missing packages and programs are installed first. The last line is the path of the report; open it in a browser.
"""
EXAMPLES: Final = """\
examples:
  ci/interop                                   kernel, refwg and wireguard-go
  ci/interop --impl mine=/tmp/build/wg         also your program, with each of them and with itself
  ci/interop --impl mine=/tmp/build/wg --like wireguard-go   a build of wireguard-go: its known failures are expected
  ci/interop --all                             also boringtun and gotatun; to build them takes minutes the first time
  ci/interop --quick                           handshakes and pings only
  ci/interop --full                            all scenarios of two implementations: more than twice as long
  ci/interop --suite pairs --suite alone       also the tests of one implementation
  ci/interop --kernel 6.1 --kernel 6.12        in a guest with each of these kernels

exit status: 0 all passed, 1 something failed, 2 wrong usage, 125 could not test, 130 interrupted
"""


def main() -> int:
    """Set up, run the matrix, print the path of the report; return the exit status."""
    options = _parse_arguments()
    exit_on_sigterm()
    started = time.monotonic()
    try:
        for _ in prepare(options.impl):
            pass
        prepare_guest = ("python", str(ROOT / "ci" / "vm.py"), "prepare")
        if not options.kernel:
            _step("guest", *prepare_guest)
        for kernel in options.kernel:
            _step(f"guest {kernel}", *prepare_guest, "--kernel", kernel)
        status = _run(options)
    except (HarnessError, OSError) as error:
        print(f"ci/interop: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    print(f"{time.monotonic() - started:.0f} s in total; report:")
    print(REPORT)
    return status


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ci/interop", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument(
        "--quick", dest="tests", action="store_const", const=QUICK, help="run only handshakes and pings"
    )
    extent.add_argument(
        "--full", dest="tests", action="store_const", const=FULL,
        help="run all scenarios of two implementations: the same as --suite pairs",
    )  # fmt: skip
    extent.add_argument(
        "--suite", action="append", choices=(*SUITES, "all"),
        help="run the tests of two implementations (pairs), of one (alone), of the lab, of single requirements "
        "(conformance), or all; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--all", action="store_true",
        help=f"also test {' and '.join(RUST)}: all 25 pairs; they are built first, which takes minutes the first time",
    )  # fmt: skip
    parser.add_argument(
        "--impl", action="append", default=[], metavar="NAME[=PATH]",
        help="also test this implementation; PATH: its program, which is started like wireguard-go; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--like", action="append", default=[], metavar="[NAME=]LIKE",
        help="start the program of --impl NAME=PATH like LIKE, with its capabilities and known failures",
    )  # fmt: skip
    parser.add_argument(
        "--kernel", action="append", default=[], metavar="VERSION|PATH",
        help="kernel of the guest: a version, a bzImage or a build tree (default: 6.1); may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--no-blame", action="store_true", help="do not run failed tests again to find out which program is to blame"
    )
    parser.set_defaults(tests=CORE)
    options = parser.parse_args()
    if options.all:
        given = {text.partition("=")[0] for text in options.impl}
        options.impl += [name for name in RUST if name not in given]
    return options


def _step(name: str, *command: str) -> None:
    """Run one step of the preparation and print how long it took; a failure is reported by the tests that need it."""
    started = time.monotonic()
    done = subprocess.run(command, check=False, env=python_environment(), cwd=ROOT)
    word = "ok" if done.returncode == 0 else "FAILED"
    print(f"{word:<10} {name:<20} {time.monotonic() - started:7.1f} s", flush=True)


def _run(options: argparse.Namespace) -> int:
    """Run `wg-interop run` on both lanes, and return its exit status."""
    requested = {text.partition("=")[0]: text for text in options.impl}
    implementations = [requested.pop(name, name) for name in IMPLEMENTATIONS] + list(requested.values())
    command = [str(VENV / "bin" / "wg-interop"), "run", "--lane", "netns", "--lane", "vm", "-n", "2"]
    command += [word for name in implementations for word in ("--impl", name)]
    command += [word for kernel in options.kernel for word in ("--kernel", kernel)]
    command += [word for like in options.like for word in ("--like", like)]
    command += ["--no-blame"] if options.no_blame else []
    tests = [word for suite in options.suite or () for word in ("--suite", suite)] or options.tests
    return subprocess.run([*command, *tests], check=False, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
