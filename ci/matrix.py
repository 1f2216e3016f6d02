"""Set up, run the interop matrix on this kernel and in a guest, and leave a report."""

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
SCENARIOS: Final = ROOT / "selftests" / "netns"
# What an implementation does alone, and what the lab itself can do, is no matter of pairs; ci/test has both.
FULL: Final = ("--suite", "pairs")
# What makes a tunnel, in a time that one waits for: connecting, counting, allowed ips, roaming, NAT, answers.
CORE: Final = ("-m", "core", str(SCENARIOS))
QUICK: Final = (str(SCENARIOS / "test_ping_and_counters.py"),)
REPORT: Final = ROOT / "report" / "index.html"

HELP: Final = """\
Run every implementation against every other, in both roles: on this kernel, and in a guest with kernel WireGuard.

What is missing is installed first. The last line is the path of the report, which opens in a browser.
"""
EXAMPLES: Final = """\
examples:
  ci/interop                                kernel, refwg, wireguard-go
  ci/interop --impl mine=/tmp/build/wg      yours with each of them, and with itself
  ci/interop --impl boringtun --impl gotatun          those two as well, which take minutes to build the first time
  ci/interop --quick                        handshakes and pings only
  ci/interop --full                         every scenario for two: more than twice as long
  ci/interop --suite pairs --suite alone    as wg-interop run --suite: also what one program does alone
  ci/interop --kernel 6.1 --kernel 6.12     in guests with these kernels, a column each

exit status: 0 all passed, 1 something failed, 2 wrong usage, 125 could not test, 130 interrupted
"""


def main() -> int:
    """Prepare, run the lanes, name the report; the exit status."""
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
    print(f"{time.monotonic() - started:.0f} s in all; the report:")
    print(REPORT)
    return status


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ci/interop", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", dest="tests", action="store_const", const=QUICK, help="handshakes and pings only")
    extent.add_argument("--full", dest="tests", action="store_const", const=FULL, help="as --suite pairs")
    extent.add_argument(
        "--suite", action="append", choices=(*SUITES, "all"),
        help="these tests, as in wg-interop run: of two implementations, of one, of the lab, all; may be repeated",
    )  # fmt: skip
    parser.add_argument("--impl", action="append", default=[], metavar="NAME[=PATH]", help="this one too, or its PATH")
    parser.add_argument(
        "--kernel", action="append", default=[], metavar="VERSION|PATH", help="of the guest; default: 6.1"
    )
    parser.set_defaults(tests=CORE)
    return parser.parse_args()


def _step(name: str, *command: str) -> None:
    """Run one step of the preparation and say how long it took."""
    started = time.monotonic()
    done = subprocess.run(command, check=False, env=python_environment(), cwd=ROOT)
    word = "ok" if done.returncode == 0 else "FAILED"
    print(f"{word:<10} {name:<20} {time.monotonic() - started:7.1f} s", flush=True)


def _run(options: argparse.Namespace) -> int:
    """Run `wg-interop run` on both lanes."""
    given = {text.partition("=")[0]: text for text in options.impl}
    chosen = [given.pop(name, name) for name in IMPLEMENTATIONS] + list(given.values())
    command = [str(VENV / "bin" / "wg-interop"), "run", "--lane", "netns", "--lane", "vm", "-n", "2"]
    command += [word for name in chosen for word in ("--impl", name)]
    command += [word for kernel in options.kernel for word in ("--kernel", kernel)]
    tests = [word for suite in options.suite or () for word in ("--suite", suite)] or options.tests
    return subprocess.run([*command, *tests], check=False, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
