"""Find Rust for building peers: on PATH if new enough, else Debian's in the cache.

Debian keeps a newer Rust than its own release for building web browsers, `rustc-web` and `cargo-web`. Both find what
belongs to them beside themselves, wherever they are unpacked, but for the shared libraries.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import Unavailable
from harness.install.cache import Area, building, directory, locked
from harness.install.debian import unpack
from harness.install.tools import ToolFailed, parse_version, version_said, version_text

if TYPE_CHECKING:
    from harness.install.progress import OnLine
    from harness.install.tools import Version

PACKAGES: Final = ("rustc-web", "cargo-web")
_VERSION: Final = re.compile(r"^rustc (\d+)\.(\d+)\.(\d+) ")
# What would have the program built for another machine, or put somewhere else.
_UNWANTED: Final = ("CARGO_BUILD_TARGET", "CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR", "CARGO_INSTALL_ROOT")


@dataclass(frozen=True, slots=True)
class Rust:
    """A compiler with its cargo, and the variables that they need."""

    cargo: Path
    rustc: Path
    variables: dict[str, str] = field(default_factory=dict)

    def version(self) -> Version | None:
        """What `rustc --version` says, as numbers; None for a nightly or beta version, or no Rust at all."""
        return version_said([self.rustc, "--version"], self.variables, _VERSION)

    def environment(self, scratch: Path) -> dict[str, str]:
        """The environment to build with: the user's proxies and registries, crates fetched into `scratch`."""
        kept = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
        # Cargo's own choice is ~/.cargo, outside the one directory that we promise to keep to.
        kept.setdefault("CARGO_HOME", str(scratch / "cargo"))
        return kept | self.variables | {"RUSTC": str(self.rustc), "CARGO_TERM_COLOR": "never"}


def rust(needed: str, on_line: OnLine) -> Rust:
    """A Rust at least as new as `needed`, unpacked into the cache if PATH has none."""
    return find_rust(parse_version(needed)) or _unpack_rust(parse_version(needed), on_line)


def find_rust(needed: Version) -> Rust | None:
    """The first Rust that is new enough: the one on PATH, then the one in the cache."""
    for candidate in (_rust_on_path(), _cached_rust()):
        if candidate is not None and (candidate.version() or ()) >= needed:
            return candidate
    return None


def users_settings() -> list[str]:
    """Cargo's options that take in the user's own settings, mirrors among them, which it would look for in ~/.cargo."""
    if "CARGO_HOME" in os.environ:
        return []
    try:
        settings = Path.home() / ".cargo" / "config.toml"
    except RuntimeError:
        return []
    return ["--config", str(settings)] if settings.is_file() else []


def _rust_on_path() -> Rust | None:
    cargo, rustc = shutil.which("cargo"), shutil.which("rustc")
    return Rust(Path(cargo), Path(rustc)) if cargo and rustc else None


def _cached_rust() -> Rust | None:
    programs = _tree() / "usr" / "bin"
    libraries = ":".join(sorted(str(path) for path in (_tree() / "usr" / "lib").glob("*-linux-gnu*")))
    found = Rust(programs / "cargo", programs / "rustc", {"LD_LIBRARY_PATH": libraries})
    return found if found.cargo.exists() else None


def _tree() -> Path:
    return directory(Area.TOOLCHAINS) / "rust-debian"


def _unpack_rust(needed: Version, on_line: OnLine) -> Rust:
    wanted = version_text(needed)
    with locked(_tree(), on_line):
        found = find_rust(needed)  # by another run, while we waited
        if found is None:
            try:
                with building(_tree()) as part:
                    unpack(PACKAGES, part, on_line)
            except ToolFailed as error:
                raise Unavailable(
                    f"no Rust {wanted} or newer is on PATH, and Debian's cannot be had: {error}"
                ) from error
            found = find_rust(needed)
    if found is None:
        has = _cached_rust()
        version = has.version() if has else None
        said = f"is {version_text(version)}" if version else "does not run here"
        raise Unavailable(f"no Rust {wanted} or newer: Debian's {said}; put a newer rustc and cargo on PATH")
    return found
