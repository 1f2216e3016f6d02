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
    """Install the implementations that the command line names, and return the exit status."""
    return install_each(_parse_arguments(arguments, recipes()).name)


def _parse_arguments(arguments: Sequence[str] | None, known: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m harness.install",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Install the WireGuard implementations to test: all of them, or those you name.\n"
        "An installed implementation stays as it is, so a second call takes no time and needs no network.",
        epilog=f"names: {', '.join(known)}\n\n"
        f"Programs are installed in {cache_root() / Area.PEERS}/NAME/VERSION; XDG_CACHE_HOME moves the cache.\n"
        "They are described by the table [install] of harness/implementations/NAME.toml. Its key `kind` is one of:\n"
        "  go      built from the Go module proxy (GOPROXY), by the go on PATH or, if too old, one from PyPI\n"
        "  cargo   built from crates.io in some minutes, by the rustc and cargo on PATH, or by Debian's rustc-web if\n"
        "          those are too old\n"
        "  debian  installed by apt-get if you are root, else unpacked into the cache\n\n"
        "examples:\n"
        "  python -m harness.install                 install everything\n"
        "  python -m harness.install wireguard-go    install one implementation\n\n"
        "exit status: 0 everything is installed, 2 unknown name or bad manifest, 125 something could not be installed",
    )
    parser.add_argument(
        "name", nargs="*", metavar="NAME", help="an implementation, or the path of a manifest (default: all)"
    )
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
