"""Install implementations into the cache by name, and remember why one could not be."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError, Unavailable, UsageError
from harness.install.cache import REMEDY, Area, cache_root
from harness.install.progress import Step
from harness.install.recipes import CargoProgram, parse_recipe
from harness.install.tools import ToolFailed
from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from harness.install.progress import OnLine
    from harness.install.recipes import Recipe
    from harness.tables import Table

MANIFESTS: Final = Path(__file__).parents[1] / "implementations"

# What a manifest may be called: the name is a directory of the cache and a part of test ids.
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._+-]*")
EXIT_FAILED: Final = {UsageError: 2, Unavailable: 125}


def install(name: str, recipe: Recipe, on_line: OnLine = lambda _: None) -> Path:
    """Install one implementation if it is not there, telling `on_line` each line of news; the path of its program."""
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


def recipes(manifests: Path = MANIFESTS) -> dict[str, Recipe]:
    """The recipes of all manifests in a directory that have one, by the name of the implementation."""
    found = {path.stem: take_recipe(read_manifest(path)) for path in sorted(manifests.glob("*.toml"))}
    return {name: recipe for name, recipe in found.items() if recipe is not None}


def on_request(recipe: Recipe) -> bool:
    """Whether it is installed only if someone names it, because a build takes minutes."""
    return isinstance(recipe, CargoProgram)


def install_each(names: Sequence[str]) -> int:
    """Install these implementations one by one, all if there are none, each with a line of progress.

    names: of implementations that come with the lab, or files of manifests. Returns the exit status: 0 all are there, 2
    a name or a manifest makes no sense, 125 one could not be installed.
    """
    known = recipes()
    statuses = [_install_one(name, known) for name in names or known]
    return max(statuses, default=0)


def is_manifest(name: str) -> bool:
    """Whether what a command line names is a manifest's file rather than an implementation."""
    return name not in recipes() and (name.endswith(".toml") or Path(name).is_file())


def _install_one(name: str, known: Mapping[str, Recipe]) -> int:
    try:
        name, recipe = _find(name, known)
        with Step(name) as step:
            step.note = str(recipe.installed(name) or install(name, recipe, step.on_line))
    except HarnessError as error:
        print(f"wg-interop install: {error}", file=sys.stderr)
        return EXIT_FAILED.get(type(error), 1)
    return 0


def _find(name: str, known: Mapping[str, Recipe]) -> tuple[str, Recipe]:
    """The name and the recipe of what the command line names: a known implementation, or a manifest."""
    if name in known:
        return name, known[name]
    if not is_manifest(name):
        raise UsageError(f"{name}: no implementation of this name can be installed; known: {', '.join(known)}")
    manifest = read_manifest(Path(name))
    called, recipe = take_name(manifest), take_recipe(manifest)
    if recipe is None:
        raise UsageError(f"{name}: it has no table [install]")
    return called, recipe


def read_manifest(path: Path) -> Table:
    """Read a manifest's tables; its other keys are checked by harness.implementations.manifest."""
    return read_toml(path, f"manifest {path}")


def take_name(manifest: Table) -> str:
    """Take out the name that a manifest gives; UsageError for one that cannot be a directory's or an option's."""
    name = manifest.text("name", "")
    if not NAME.fullmatch(name):
        raise manifest.wrong(f"name must be lower-case letters, digits and . _ + -, not {name!r}")
    return name


def take_recipe(manifest: Table) -> Recipe | None:
    """Take out a manifest's [install] table and make a recipe of it; None if there is no such table."""
    table = manifest.table("install")
    return parse_recipe(table) if table.rest() else None
