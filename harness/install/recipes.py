"""Read a manifest's [install] table, and build or fetch the program: Go, Cargo, Debian.

[install]                                   [install]
kind = "go"                                 kind = "debian"
module = "golang.zx2c4.com/wireguard"       package = "wireguard-go"
version = "v0.0.0-20250521234502-..."       binary = "/usr/bin/wireguard-go"
binary = "wireguard"
go = "1.23.1"       # the go line of the     [install]
                    # module's go.mod       kind = "cargo"
                                            crate = "boringtun-cli"
                                            version = "0.7.1"
                                            binary = "boringtun-cli"
                                            rust = "1.85"

[install.releases]      # for kind "go": versions that `NAME@RELEASE` names, by tag, the oldest first
"0.0.20230223" = "v0.0.0-20230223181233-21636207a675"
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from harness.errors import Unavailable, UsageError
from harness.install import go, rust
from harness.install.cache import Area, building, cache_root, locked, remove
from harness.install.debian import apt_install, unpack
from harness.install.packages import install_command
from harness.install.releases import in_order, of_crate, of_module, pick
from harness.install.tools import ToolFailed, run_tool

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.install.progress import OnLine
    from harness.tables import Table

COMPILER: Final = ("gcc", "libc6-dev")
# What the linker of Go 1.23 and newer prints for golang.org/x/net of 2022 and older, which uses syscall.recvmsg by
# go:linkname; this option of the linker allows it.
_LINK_REFUSED: Final = "invalid reference to "
_LINK_ANYWAY: Final = "-ldflags=-checklinkname=0"


class _Built:
    """A program that is built from source into a directory of the cache, peers/NAME/VERSION."""

    __slots__ = ()

    version: str
    binary: str

    def installed(self, name: str) -> Path | None:
        """Return the path of the program, None if it is not installed; starts no program, needs no network."""
        return _if_executable(self._target(name) / self._place / self.binary)

    def install(self, name: str, on_line: OnLine) -> Path:
        """Build the program, unless it is installed, and return its path.

        Raises Unavailable if a compiler is missing or the source does not build this program, ToolFailed if the build
        fails.
        """
        with locked(self._target(name), on_line):
            # Another run may have built it while we waited for the lock.
            if (program := self.installed(name)) is None:
                with building(self._target(name)) as part:
                    self._build(part, part / ".build", on_line)
                    remove(part / ".build")
                program = self.installed(name)
        if program is None:
            raise Unavailable(f"{self._source} {self.version} builds no program named {self.binary}")
        return program

    def _target(self, name: str) -> Path:
        return cache_root() / Area.PEERS / name / self.version

    def at(self, version: str) -> tuple[str, Self]:
        """Return the name of another version, and the recipe that builds it; UsageError for what cannot be one."""
        raise NotImplementedError

    def releases_known(self) -> list[str]:
        """Return the versions that the manifest names, the oldest first; needs no network."""
        return []

    def releases_found(self, on_line: OnLine) -> list[str]:
        """Return the versions that manifest and source name, the oldest first; ToolFailed if the source does not."""
        raise NotImplementedError

    _place = "."

    @property
    def _source(self) -> str:
        raise NotImplementedError

    def _build(self, target: Path, scratch: Path, on_line: OnLine) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class GoProgram(_Built):
    """A program that `go install` builds from a module."""

    module: str
    version: str
    binary: str
    go: str  # the oldest Go that can build it
    releases: tuple[tuple[str, str], ...] = ()  # names of versions, and the module's version of each

    def __post_init__(self) -> None:
        _check(self.version, r"v?\d[\w.+-]*|[0-9a-f]{7,40}", "version", "is not a fixed version such as v1.2.3")
        _check(self.binary, r"\w[\w.+-]*", "binary", "is not a file name")
        _check(self.go, r"\d+(\.\d+)+", "go", "is not a Go version such as 1.23.1")

    @property
    def _source(self) -> str:
        return self.module

    def _build(self, target: Path, scratch: Path, on_line: OnLine) -> None:
        compiler = go.go(self.go, on_line)
        on_line(f"building {self.module}@{self.version} with {compiler}")
        # -modcacherw: without it the downloaded modules are read-only.
        options = ["-trimpath", "-buildvcs=false", "-modcacherw"]
        environment = go.go_environment(compiler, scratch) | {"GOBIN": str(target)}

        def build(*more: str) -> None:
            command: list[str | Path] = [compiler, "install", *options, *more, f"{self.module}@{self.version}"]
            run_tool(command, on_line, env=environment, cwd=target)

        try:
            build()
        except ToolFailed as error:
            if _LINK_REFUSED not in str(error):
                raise
            build(_LINK_ANYWAY)

    def at(self, version: str) -> tuple[str, Self]:
        """Return name and recipe of a release, `0.0.20230223` or its end, or of a version that Go knows."""
        known = dict(self.releases)
        name = pick(version, known)
        return name, replace(self, version=known.get(name, name))

    def releases_known(self) -> list[str]:
        """Return the table [install.releases]."""
        return [name for name, _ in self.releases]

    def releases_found(self, on_line: OnLine) -> list[str]:
        """Ask the module proxy, by `go list`, and add the table."""
        return in_order([*self.releases_known(), *of_module(self.module, self.go, on_line)])


@dataclass(frozen=True, slots=True, kw_only=True)
class CargoProgram(_Built):
    """A program that `cargo install` builds from a crate, with the dependencies of the crate's lock file."""

    crate: str
    version: str
    binary: str
    rust: str  # the oldest Rust that can build it

    _place = "bin"

    def __post_init__(self) -> None:
        _check(self.crate, r"[A-Za-z][\w-]*", "crate", "is not the name of a crate")
        _check(self.version, r"\d+\.\d+\.\d+[\w.+-]*", "version", "is not a fixed version such as 1.2.3")
        _check(self.binary, r"\w[\w.+-]*", "binary", "is not a file name")
        _check(self.rust, r"\d+(\.\d+)+", "rust", "is not a Rust version such as 1.85")

    def at(self, version: str) -> tuple[str, Self]:
        """Return name and recipe of a version of the crate."""
        return version, replace(self, version=version)

    def releases_found(self, on_line: OnLine) -> list[str]:
        """Ask the index of crates.io."""
        on_line(f"asking crates.io for the versions of {self.crate}")
        return in_order(of_crate(self.crate))

    @property
    def _source(self) -> str:
        return self.crate

    def _build(self, target: Path, scratch: Path, on_line: OnLine) -> None:
        tools = rust.rust(self.rust, on_line)
        _ensure_linker(on_line)
        on_line(f"building {self.crate} {self.version} with {tools.cargo}")
        places: list[str | Path] = ["--root", target, "--target-dir", scratch / "target"]
        run_tool(
            [tools.cargo, *rust.users_settings(), "install", "--locked", *places, f"{self.crate}@{self.version}"],
            on_line,
            env=tools.environment(scratch),
            cwd=target,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianProgram:
    """A program of a Debian package. binary: its absolute path when the package is installed."""

    package: str
    binary: str

    def __post_init__(self) -> None:
        _check(self.package, r"[a-z0-9][a-z0-9.+-]+", "package", "is not the name of a Debian package")
        _check(self.binary, r"(/\w[\w.+-]*)+", "binary", "is not an absolute path")

    def installed(self, name: str) -> Path | None:
        """Return the path of the program, on this machine or unpacked in the cache; None if it is in neither."""
        return _if_executable(Path(self.binary)) or _if_executable(self._tree(name) / self.binary.removeprefix("/"))

    def install(self, name: str, on_line: OnLine) -> Path:
        """Install the package as root, or unpack it into the cache as another user; return the program's path.

        Raises Unavailable if the package does not contain the program, ToolFailed if apt-get fails.
        """
        if (program := self.installed(name)) is None:
            if os.geteuid() == 0:
                apt_install([self.package], on_line)
            else:
                self._unpack(name, on_line)
            program = self.installed(name)
        if program is None:
            raise Unavailable(f"package {self.package} does not contain {self.binary}")
        return program

    def _tree(self, name: str) -> Path:
        return cache_root() / Area.PEERS / name / "debian"

    def _unpack(self, name: str, on_line: OnLine) -> None:
        with locked(self._tree(name), on_line):
            if self.installed(name) is None:
                with building(self._tree(name)) as part:
                    unpack([self.package], part, on_line)


Recipe = GoProgram | CargoProgram | DebianProgram
_KINDS: Final[dict[str, type[Recipe]]] = {"go": GoProgram, "cargo": CargoProgram, "debian": DebianProgram}


def parse_recipe(table: Table) -> Recipe:
    """Check a table [install] and return it as a recipe; UsageError for a wrong key or value."""
    kind = table.take("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise table.wrong(f"[install] kind: {kind!r} is not one of {', '.join(_KINDS)}")
    releases = table.strings("releases", {}) if kind == "go" else {}
    values = table.take_rest()
    expected = {field.name for field in fields(_KINDS[kind])} - {"releases"}
    if wrong := values.keys() ^ expected:
        problem = "missing" if wrong <= expected else "unknown key"
        raise table.wrong(f"[install] {problem}: {', '.join(sorted(wrong - expected or wrong))}")
    make: Callable[..., Recipe] = _KINDS[kind]
    try:
        recipe = make(**{key: _text(key, value) for key, value in values.items()})
    except UsageError as error:
        raise table.wrong(f"[install] {error}") from None
    return replace(recipe, releases=tuple(releases.items())) if isinstance(recipe, GoProgram) else recipe


def _ensure_linker(on_line: OnLine) -> None:
    """Install a C compiler if there is none: Rust links with it, and some crates contain C code."""
    if shutil.which("cc") is None and os.geteuid() == 0:
        apt_install(COMPILER, on_line)
    if shutil.which("cc") is None:
        raise Unavailable(f"no C compiler to link with: {install_command(COMPILER)}")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{key}: {value!r} is not a string")
    return value


def _check(value: str, pattern: str, key: str, complaint: str) -> None:
    if re.fullmatch(pattern, value) is None:
        raise UsageError(f"{key}: {value!r} {complaint}")


def _if_executable(program: Path) -> Path | None:
    return program if os.access(program, os.X_OK) and program.is_file() else None
