"""Install implementations into the cache by name, and record why an installation failed."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError, Unavailable, UsageError
from harness.install.cache import REMEDY, Area, cache_root
from harness.install.progress import Step
from harness.install.recipes import CargoProgram, DebianProgram, parse_recipe
from harness.install.releases import VERSION
from harness.install.tools import ToolFailed
from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from harness.install.progress import OnLine
    from harness.install.recipes import Recipe
    from harness.tables import Table

MANIFESTS: Final = Path(__file__).parents[1] / "implementations"

# Names that a manifest may give: a name becomes a directory of the cache and a part of test ids.
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._+-]*")
EXIT_FAILED: Final = {UsageError: 2, Unavailable: 125}


def install(name: str, recipe: Recipe, on_line: OnLine = lambda _: None) -> Path:
    """Install one implementation if it is not installed, and return the path of its program.

    name: NAME, or NAME@VERSION with the recipe of this version. on_line: called with each line of output. Raises
    Unavailable with reason and remedy.
    """
    own_program = f"or name a program of your own: --impl {name}=PATH"
    try:
        program = recipe.install(name.partition("@")[0], on_line)
    except Unavailable as error:
        _remember_failure(name, str(error))
        raise Unavailable(f"{name} could not be installed: {error}; {own_program}") from error
    except OSError as error:
        # This OSError is about a file of the cache, because a failed download raises ToolFailed.
        _remember_failure(name, str(error))
        raise Unavailable(f"{name} could not be installed: {error}; {REMEDY}, {own_program}") from error
    except ToolFailed as error:
        _remember_failure(name, str(error))
        remedy = _other_versions(name, recipe, on_line) or "check the network and its proxies"
        raise Unavailable(f"{name} could not be installed: {error}; {remedy}, {own_program}") from error
    _failure_file(name).unlink(missing_ok=True)
    return program


def _other_versions(name: str, recipe: Recipe, on_line: OnLine) -> str:
    """Return which versions exist, if one was asked for that is none of them; empty if that is not known."""
    _, _, version = name.partition("@")
    if not version or isinstance(recipe, DebianProgram):
        return ""
    try:
        found = recipe.releases_found(on_line)
    except HarnessError:
        found = recipe.releases_known()
    if not found or version in found:
        return ""
    return f"there is no version {version} that the lab knows; there are: {', '.join(found)}"


def why_not_installed(name: str) -> str | None:
    """Return why the last installation of an implementation failed; None if it succeeded, or was not tried."""
    with suppress(OSError):
        return _failure_file(name).read_text()
    return None


def _remember_failure(name: str, reason: str) -> None:
    # The reason may be that the cache cannot be written to.
    with suppress(OSError):
        _failure_file(name).parent.mkdir(parents=True, exist_ok=True)
        _failure_file(name).write_text(reason)


def _failure_file(name: str) -> Path:
    base, at, version = name.partition("@")
    return cache_root() / Area.PEERS / base / f"why-not{at and '-'}{version}"


def at_version(name: str, recipe: Recipe | None, version: str) -> tuple[str, Recipe]:
    """Return NAME@VERSION, and the recipe of this version, by the recipe of NAME; UsageError if there is none."""
    asked = f"{name}@{version}"
    if recipe is None or isinstance(recipe, DebianProgram):
        why = "Debian's package has one version" if recipe else f"{name} has no table [install]"
        raise UsageError(f"{asked}: {why}; give the program of this version: --impl {asked}=PATH")
    if not VERSION.fullmatch(version):
        raise UsageError(f"{asked}: a version is letters, digits and . _ + -, not {version!r}")
    try:
        release, other = recipe.at(version)
    except UsageError as error:
        known = ", ".join(recipe.releases_known())
        raise UsageError(f"{asked}: {error}" + (f"; there are: {known}" if known else "")) from None
    return f"{name}@{release}", other


def recipes(manifests: Path = MANIFESTS) -> dict[str, Recipe]:
    """Read the recipes of all manifests in a directory: name of the implementation -> recipe.

    A manifest without a table [install] has none. Raises UsageError for a mistake in a manifest.
    """
    read = {path.stem: take_recipe(read_manifest(path)) for path in sorted(manifests.glob("*.toml"))}
    return {name: recipe for name, recipe in read.items() if recipe is not None}


def on_request(recipe: Recipe) -> bool:
    """Return whether a set-up installs it only if the user names it, because its build takes minutes."""
    return isinstance(recipe, CargoProgram)


def install_each(names: Sequence[str], named: Mapping[str, tuple[str, Recipe | None]] | None = None) -> int:
    """Install implementations one by one, with a line of progress each; all of them if `names` is empty.

    names: of implementations that come with the lab, NAME or NAME@VERSION, or paths of manifests. named: for names of
    other manifests, the name in full and the recipe. Returns the exit status: 0 all are installed, 2 unknown name or
    bad manifest, 125 one could not be installed. Errors are printed.
    """
    known = recipes()
    found = {given: (name, recipe) for given, (name, recipe) in (named or {}).items() if recipe is not None}
    statuses = [_install_one(name, known, found) for name in names or known]
    return max(statuses, default=0)


def is_manifest(name: str) -> bool:
    """Return whether an argument is the path of a manifest, not the name of an implementation."""
    return name not in recipes() and (name.endswith(".toml") or Path(name).is_file())


def _install_one(name: str, known: Mapping[str, Recipe], named: Mapping[str, tuple[str, Recipe]]) -> int:
    try:
        name, recipe = named[name] if name in named else _find(name, known)
        with Step(name) as step:
            step.note = str(recipe.installed(name.partition("@")[0]) or install(name, recipe, step.on_line))
    except HarnessError as error:
        print(f"wg-interop install: {error}", file=sys.stderr)
        return EXIT_FAILED.get(type(error), 1)
    return 0


def _find(name: str, known: Mapping[str, Recipe]) -> tuple[str, Recipe]:
    """Return name and recipe for an argument: the name of a known implementation, or the path of a manifest."""
    if name in known:
        return name, known[name]
    base, at, version = name.partition("@")
    if at and base in {path.stem for path in MANIFESTS.glob("*.toml")}:
        return at_version(base, known.get(base), version)
    if not is_manifest(name):
        raise UsageError(f"{name}: no implementation of this name can be installed; known: {', '.join(known)}")
    manifest = read_manifest(Path(name))
    own_name, recipe = take_name(manifest), take_recipe(manifest)
    if recipe is None:
        raise UsageError(f"manifest {name}: has no table [install]")
    return own_name, recipe


def read_manifest(path: Path) -> Table:
    """Read a manifest; UsageError if it is not TOML. harness.implementations.manifest checks its other keys."""
    return read_toml(path, f"manifest {path}")


def take_name(manifest: Table) -> str:
    """Take the name from a manifest; UsageError for one that cannot be a directory or a part of an option."""
    name = manifest.text("name", "")
    if not NAME.fullmatch(name):
        raise manifest.wrong(f"name must be lower-case letters, digits and . _ + -, not {name!r}")
    return name


def take_recipe(manifest: Table) -> Recipe | None:
    """Take the table [install] from a manifest, and return it as a recipe; None if there is no such table."""
    table = manifest.table("install")
    return parse_recipe(table) if table.rest() else None
