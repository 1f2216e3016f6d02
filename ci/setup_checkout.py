"""Set up a fresh checkout: Debian packages, virtual environment, programs under test.

Only missing parts are installed: a second run does nothing, needs no network and takes a fraction of a second.
This module imports only the standard library, and modules of `harness` that do the same.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError, Unavailable
from harness.install.cache import cache_root, wait_for_lock
from harness.install.debian import apt_install
from harness.install.installer import on_request, recipes
from harness.install.progress import Step, step_line
from harness.install.tools import ToolFailed, ended, exit_on_sigterm, run_tool

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from harness.install.progress import OnLine

ROOT: Final = Path(__file__).resolve().parent.parent
VENV: Final = ROOT / ".venv"
STAMP: Final = VENV / "wg-interop.json"

CLEAN_UP_TIMEOUT: Final = 15  # seconds for a program to clean up after Ctrl-C
EXIT_COULD_NOT: Final = 125
EXIT_INTERRUPTED: Final = 130

HELP: Final = f"""\
Set up this checkout. Run it after cloning and after pulling. It installs what is missing of:

  1. the Debian packages of ci/packages.txt, by apt-get (as root, or through sudo)
  2. .venv, with the packages of requirements.lock, whose hashes are checked, and this project (editable)
  3. the programs under test, in {cache_root()} (XDG_CACHE_HOME moves it);
     those in Rust take minutes to build, so they are installed only if you name them

The settings of pip, Go, cargo and apt for registries, proxies and certificates are used (PIP_INDEX_URL, GOPROXY, ...).
To start again from nothing: rm -r .venv
exit status: 0 ready, 2 wrong usage, 125 something is missing and could not be installed, 130 interrupted
"""


class State(StrEnum):
    """How a step ended."""

    OK = "ok"
    FAILED = "FAILED"
    COULD_NOT = "could not"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The result of a step, a row of the summary. note: details or the reason of a failure."""

    name: str
    state: State
    seconds: float
    note: str = ""

    def line(self) -> str:
        """Format the row."""
        return step_line(self.state, self.name, self.seconds, self.note)


def prepare(peers: Collection[str] = ()) -> Iterator[StepResult]:
    """Do all steps, and yield the result of each.

    peers: programs under test to install besides those that always are. Raises Unavailable if packages or the virtual
    environment are missing; a program under test that cannot be installed only fails its step.
    """
    yield _step("packages", ensure_packages)
    yield _step("virtual environment", ensure_venv)
    yield ensure_peers(peers)


def ensure_packages(step: Step) -> None:
    """Install the Debian packages that are missing; Unavailable, with the command to run, if that fails."""
    step.note = "all installed"
    if not (missing := missing_packages()):
        return
    command = f"apt-get install --no-install-recommends {' '.join(missing)}"
    become = _become_root() if shutil.which("apt-get") else None
    if become is None:
        raise Unavailable(f"missing: {', '.join(missing)}; as root: {command}")
    try:
        apt_install(missing, step.on_line, become=become)
    except ToolFailed as error:
        raise Unavailable(f"packages could not be installed: {error}; try: {command}") from error
    if still_missing := missing_packages():
        raise Unavailable(
            f"{', '.join(still_missing)}: installed, but the program or file of ci/packages.txt is missing"
        )
    step.note = f"installed {', '.join(missing)}"


def missing_packages() -> list[str]:
    """Return the packages of packages.txt whose program, file or module is missing."""
    lines = (ROOT / "ci" / "packages.txt").read_text().splitlines()
    needs = [line.split() for line in lines if line and not line.startswith("#")]
    return [package for package, sign in needs if not _exists(sign)]


def ensure_venv(step: Step) -> None:
    """Create .venv, or create it again if the lock file or the Python has changed since; Unavailable if that fails."""
    with _checkout_locked(step.on_line):
        stamp = _read_stamp()
        wanted = {"packages": _packages_stamp(), "project": _project_stamp()}
        step.note = "up to date"
        if stamp == wanted and os.access(VENV / "bin" / "python", os.X_OK):
            return
        try:
            if stamp.get("packages") != wanted["packages"]:
                install_packages(step.on_line)
            _pip(step.on_line, "--no-deps", "--no-build-isolation", "-e", ".")
        except ToolFailed as error:
            raise Unavailable(
                f".venv could not be created: {error}; check the network and pip's index (PIP_INDEX_URL)"
            ) from error
        STAMP.write_text(json.dumps(wanted))
        step.note = "installed requirements.lock and the project"


def ensure_peers(asked: Collection[str] = ()) -> StepResult:
    """Install the programs under test, and print the result of the step.

    asked: names to install besides those that always are. A failure does not raise: tests of a missing program are
    skipped.
    """
    started = time.monotonic()
    try:
        wanted = {name: recipe for name, recipe in recipes().items() if name in asked or not on_request(recipe)}
        missing = [name for name, recipe in wanted.items() if recipe.installed(name) is None]
        # By the Python of the virtual environment: it has pip, which installs Go; the system's may not have it.
        status = _run_install(missing) if missing else 0
    except HarnessError as error:
        print(f"ci/setup: {error}", file=sys.stderr)
        missing, status = [], EXIT_COULD_NOT
    note = f"installed {', '.join(missing)}" if missing else "all installed"
    if status != 0:
        note = "some could not be installed, see above"
    state = State.OK if status == 0 else State.COULD_NOT
    result = StepResult(name="peers", state=state, seconds=time.monotonic() - started, note=note)
    print(result.line(), flush=True)
    return result


def python_environment() -> dict[str, str]:
    """Return the environment for the project's programs: PATH begins with .venv/bin."""
    return os.environ | {"PATH": f"{VENV / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(VENV)}


def run_program(command: Sequence[str], deadline: float, output: int | None = None) -> int | None:
    """Run a program of the virtual environment; return its exit status, None if it was stopped at the deadline.

    deadline: seconds. output: descriptor for stdout and stderr, None for ours.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=python_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )
    with process, ended(process):
        try:
            return process.wait(timeout=deadline)
        except subprocess.TimeoutExpired:
            return None
        except KeyboardInterrupt:
            # The terminal has sent SIGINT to the program too; wait while it cleans up.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=CLEAN_UP_TIMEOUT)
            raise


def main() -> int:
    """Set up the checkout, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="ci/setup", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", metavar="NAME", help="also install this program under test")
    peers = parser.parse_args().peers
    if unknown := set(peers) - recipes().keys():
        parser.error(f"{', '.join(sorted(unknown))}: unknown program; there are: {', '.join(recipes())}")
    exit_on_sigterm()
    try:
        results = list(prepare(peers))
    except HarnessError as error:
        print(f"ci/setup: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    except OSError as error:
        print(f"ci/setup: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_COULD_NOT
    except KeyboardInterrupt:
        print("ci/setup: interrupted; run it again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0 if all(result.state is State.OK for result in results) else EXIT_COULD_NOT


def _step(name: str, work: Callable[[Step], None]) -> StepResult:
    with Step(name) as step:
        work(step)
    return StepResult(name=name, state=State.OK, seconds=step.seconds, note=step.note)


def _exists(sign: str) -> bool:
    """Return whether a program on PATH, an absolute path or a `module:NAME` exists (ci/packages.txt)."""
    if sign.startswith("module:"):
        return importlib.util.find_spec(sign.removeprefix("module:")) is not None
    return shutil.which(sign) is not None or (sign.startswith("/") and Path(sign).exists())


def _become_root() -> list[str] | None:
    """Return the words to put before a command that needs root, None if we cannot become root."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        return None
    without_password = subprocess.run(
        ["sudo", "-n", "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    # On a terminal sudo may ask for the password: once, now.
    if without_password.returncode == 0:
        return ["sudo", "-n"]
    if sys.stdin.isatty() and subprocess.run(["sudo", "-v"], check=False).returncode == 0:
        return ["sudo", "-n"]
    return None


@contextmanager
def _checkout_locked(on_line: OnLine) -> Iterator[None]:
    # flock(2) on the directory itself needs no lock file, and the kernel releases it if the process dies.
    descriptor = os.open(ROOT, os.O_RDONLY | os.O_CLOEXEC)
    try:
        wait_for_lock(descriptor, ROOT, on_line)
        yield
    finally:
        os.close(descriptor)


def _read_stamp() -> dict[str, str]:
    try:
        stamp: dict[str, str] = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp


def _packages_stamp() -> str:
    # A virtual environment's scripts contain its path, and its packages have code for one version of Python.
    return _digest((ROOT / "requirements.lock").read_text(), str(ROOT), sys.executable, str(sys.version_info[:2]))


def _project_stamp() -> str:
    # Only the tables that end up in the installed metadata: after a new lint rule nothing must be installed.
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return _digest(*(json.dumps(tables.get(key)) for key in ("project", "build-system")))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def install_packages(on_line: OnLine) -> None:
    """Make the virtual environment from nothing, and install the packages of requirements.lock.

    Raises Unavailable if it is a symbolic link or belongs to another user.
    """
    # venv --clear follows the link and would delete the packages of another checkout.
    if VENV.is_symlink():
        raise Unavailable(f"{VENV} is a symbolic link to {VENV.readlink()}, which this would empty; remove the link")
    if VENV.exists() and not os.access(VENV, os.W_OK):
        raise Unavailable(f"{VENV}: not writable, another user owns it; remove it, or work in a clone of your own")
    STAMP.unlink(missing_ok=True)
    # --clear: create it from nothing, so that no package stays that the lock file does not name any more.
    on_line("creating .venv")
    run_tool([sys.executable, "-m", "venv", "--clear", VENV], on_line)
    _pip(on_line, "--require-hashes", "-r", "requirements.lock")


def _pip(on_line: OnLine, *arguments: str) -> None:
    # --compile: without byte code each start of a program would take half a second longer.
    options = ["--compile", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    run_tool([VENV / "bin" / "python", "-m", "pip", "install", *options, *arguments], on_line, cwd=ROOT)


def _run_install(names: Sequence[str]) -> int:
    command = [str(VENV / "bin" / "python"), "-m", "harness.install", *names]
    process = subprocess.Popen(command, cwd=ROOT, env=python_environment(), stdin=subprocess.DEVNULL)
    with process, ended(process):
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())
