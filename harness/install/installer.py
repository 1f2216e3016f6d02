"""Install implementations into the cache by name, and remember why one could not be."""

from __future__ import annotations

import re
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from harness.errors import HarnessError, Unavailable, UsageError
from harness.install.cache import REMEDY, Area, cache_root
from harness.install.progress import Step
from harness.install.recipes import parse_recipe
from harness.install.tools import ToolFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from harness.install.progress import OnLine
    from harness.install.recipes import Table

MANIFESTS: Final = Path(__file__).parents[1] / "implementations"

# What a manifest may be called: the name is a directory of the cache and a part of test ids.
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._+-]*")
EXIT_FAILED: Final = {UsageError: 2, Unavailable: 125}


def install(name: str, table: Table, on_line: OnLine = lambda _: None) -> Path:
    """Install one implementation if it is not there, telling `on_line` each line of news; the path of its program."""
    recipe = parse_recipe(name, table)
    own = f"or name a program of your own: --impl {name}=PATH"
    try:
        program = recipe.install(name, on_line)
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
    return parse_recipe(name, table).installed(name)


def recipes(manifests: Path = MANIFESTS) -> dict[str, Table]:
    """The [install] tables of all manifests in a directory, by the name of the implementation."""
    tables = {path.stem: read(path).get("install") for path in sorted(manifests.glob("*.toml"))}
    return {name: table for name, table in tables.items() if isinstance(table, dict)}


def on_request(table: Table) -> bool:
    """Whether it is installed only if someone names it, because a build takes minutes."""
    return table.get("kind") == "cargo"


def install_each(names: Sequence[str]) -> int:
    """Install these implementations one by one, all if there are none, each with a line of progress.

    names: of implementations that come with the lab, or files of manifests. Returns the exit status: 0 all are there, 2
    a name or a manifest makes no sense, 125 one could not be installed.
    """
    tables = recipes()
    statuses = [_install_one(name, tables) for name in names or tables]
    return max(statuses, default=0)


def is_manifest(name: str) -> bool:
    """Whether what a command line names is a manifest's file rather than an implementation."""
    return name not in recipes() and (name.endswith(".toml") or Path(name).is_file())


def _install_one(name: str, tables: Mapping[str, Table]) -> int:
    try:
        name, table = _find(name, tables)
        with Step(name) as step:
            step.note = str(installed(name, table) or install(name, table, step.on_line))
    except HarnessError as error:
        print(f"wg-interop install: {error}", file=sys.stderr)
        return EXIT_FAILED.get(type(error), 1)
    return 0


def _find(name: str, tables: Mapping[str, Table]) -> tuple[str, Table]:
    """The name and the [install] table of what the command line names: a known implementation, or a manifest."""
    if name in tables:
        return name, tables[name]
    if not is_manifest(name):
        raise UsageError(f"{name}: no implementation of this name can be installed; known: {', '.join(tables)}")
    manifest = read(Path(name))
    called, table = checked_name(manifest.get("name", ""), Path(name)), manifest.get("install")
    if not isinstance(table, dict) or not table:
        raise UsageError(f"{name}: it has no table [install]")
    return called, table


def checked_name(name: object, manifest: Path) -> str:
    """The name that a manifest gives; UsageError for one that cannot be a directory's or an option's."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UsageError(f"manifest {manifest}: name must be lower-case letters, digits and . _ + -, not {name!r}")
    return name


def read(manifest: Path) -> dict[str, Any]:
    """The tables of a manifest; UsageError that names the file if it cannot be read."""
    try:
        return tomllib.loads(manifest.read_text())
    except OSError as error:
        raise UsageError(f"manifest {manifest}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"manifest {manifest}: not TOML: {error}") from error
