"""Find the manifests of all known implementations.

They are the lab's, those that packages register, and those that wg-interop.toml names.

A package registers manifests by an entry point of the group `wg_interop.implementations` (docs/manifests.md). It names
a module, whose folder has the manifests, or a path in a module: `pathlib.Path` or str, of a manifest or a folder.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.implementations.manifest import load_manifest
from harness.install.installer import MANIFESTS
from harness.lanes import LANE
from harness.settings import read_settings

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.metadata import EntryPoint

    from harness.implementations.manifest import Manifest

GROUP: Final = "wg_interop.implementations"


def known_manifests() -> dict[str, Manifest]:
    """Read all manifests, by name; raises UsageError for a mistake in one.

    A manifest of wg-interop.toml replaces one of the same name. One of a package must have a name of its own.
    """
    known = {manifest.name: manifest for manifest in map(load_manifest, sorted(MANIFESTS.glob("*.toml")))}
    # A guest gets its manifests by options.
    for entry in () if os.environ.get(LANE) else sorted(entry_points(group=GROUP), key=_of_package):
        for path in _files(_path_of(entry), _of_package(entry)):
            manifest = load_manifest(path)
            if manifest.name in known:
                where = known[manifest.name].source
                raise UsageError(f"{path}, {_of_package(entry)}: the name {manifest.name} is taken by {where}")
            known[manifest.name] = manifest
    for path in read_settings().manifests:
        for file in _files(path, "manifests of wg-interop.toml"):
            manifest = load_manifest(file)
            known[manifest.name] = manifest
    return known


def _files(path: Path, what: str) -> Iterable[Path]:
    """Return the manifests at a path: the file itself, or those of a folder; UsageError if there is none."""
    files = sorted(path.glob("*.toml")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{what}: no manifest *.toml in {path}")
    return files


def _path_of(entry: EntryPoint) -> Path:
    try:
        found = entry.load()
    except Exception as error:  # a package of somebody else may raise anything
        raise UsageError(f"{_of_package(entry)}: {type(error).__name__}: {error}") from error
    if isinstance(found, ModuleType) and found.__file__ is not None:
        return Path(found.__file__).parent
    if isinstance(found, str | os.PathLike):
        return Path(found)
    raise UsageError(f"{_of_package(entry)}: want a module or a path, not {found!r}")


def _of_package(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "?"
    return f"entry point {GROUP}: {entry.name} = {entry.value} of package {package}"
