"""Find Rust for building peers: on PATH if new enough, else Debian's in the cache.

Debian has packages of a newer Rust than its release's, for building web browsers: `rustc-web` and `cargo-web`. They
find their files relative to their own path, so they work wherever they are unpacked; only the path of the shared
libraries must be set.
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
from harness.install.tools import ToolFailed, parse_version, printed_version, version_text

if TYPE_CHECKING:
    from harness.install.progress import OnLine
    from harness.install.tools import Version

PACKAGES: Final = ("rustc-web", "cargo-web")
_VERSION: Final = re.compile(r"^rustc (\d+)\.(\d+)\.(\d+) ")
# Variables that would build the program for another machine, or install it somewhere else.
_UNWANTED: Final = ("CARGO_BUILD_TARGET", "CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR", "CARGO_INSTALL_ROOT")


@dataclass(frozen=True, slots=True)
class Rust:
    """A compiler and its cargo. variables: environment variables that both need."""

    cargo: Path
    rustc: Path
    variables: dict[str, str] = field(default_factory=dict)

    def version(self) -> Version | None:
        """Return the version that `rustc --version` prints; None for a nightly or beta version, or no Rust."""
        return printed_version([self.rustc, "--version"], self.variables, _VERSION)

    def environment(self, scratch: Path) -> dict[str, str]:
        """Return the environment for a build, with the user's proxies and registries; scratch: folder for crates."""
        variables = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
        # By default Cargo writes to ~/.cargo, outside our cache.
        variables.setdefault("CARGO_HOME", str(scratch / "cargo"))
        return variables | self.variables | {"RUSTC": str(self.rustc), "CARGO_TERM_COLOR": "never"}


def rust(needed: str, on_line: OnLine) -> Rust:
    """Find a Rust that is new enough, or unpack Debian's into the cache; Unavailable if neither is new enough."""
    return find_rust(parse_version(needed)) or _unpack_rust(parse_version(needed), on_line)


def find_rust(needed: Version) -> Rust | None:
    """Return the first Rust that is new enough, of the one on PATH and the one in the cache; None if neither is."""
    for candidate in (_rust_on_path(), _cached_rust()):
        if candidate is not None and (candidate.version() or ()) >= needed:
            return candidate
    return None


def users_settings() -> list[str]:
    """Return options by which Cargo reads the user's ~/.cargo/config.toml, which may name a mirror.

    Needed because `Rust.environment` sets CARGO_HOME; empty if the user has set it, or has no such file.
    """
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
    cached = Rust(programs / "cargo", programs / "rustc", {"LD_LIBRARY_PATH": libraries})
    return cached if cached.cargo.exists() else None


def _tree() -> Path:
    return directory(Area.TOOLCHAINS) / "rust-debian"


def _unpack_rust(needed: Version, on_line: OnLine) -> Rust:
    wanted = version_text(needed)
    with locked(_tree(), on_line):
        usable = find_rust(needed)  # another run may have unpacked it while we waited for the lock
        if usable is None:
            try:
                with building(_tree()) as part:
                    unpack(PACKAGES, part, on_line)
            except ToolFailed as error:
                raise Unavailable(
                    f"no Rust {wanted} or newer is on PATH, and Debian's could not be installed: {error}"
                ) from error
            usable = find_rust(needed)
    if usable is None:
        cached = _cached_rust()
        version = cached.version() if cached else None
        problem = f"is {version_text(version)}" if version else "does not run here"
        raise Unavailable(f"no Rust {wanted} or newer: Debian's {problem}; put a newer rustc and cargo on PATH")
    return usable
