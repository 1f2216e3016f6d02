"""Set up a fresh checkout: Debian packages, virtual environment, programs under test.

What is there is left alone: a second run does nothing, needs no network and takes a fraction of a second.
Only the standard library is imported here, and of `harness` only modules that hold to the same.
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

PATIENCE: Final = 15  # seconds for a program to clean up after Ctrl-C
EXIT_COULD_NOT: Final = 125
EXIT_INTERRUPTED: Final = 130

HELP: Final = f"""\
Make this checkout ready to test with: run it after cloning and after pulling.

  1. Debian packages named in ci/packages.txt, those that are missing, by apt-get (as root, or through sudo)
  2. .venv: the packages of requirements.lock, checked against its hashes, and this project, editable
  3. the programs under test, in {cache_root()} (XDG_CACHE_HOME moves it);
     those in Rust take minutes to build and are installed only if you name them

Variables of pip, Go, cargo and apt that name registries, proxies or certificates are honoured (PIP_INDEX_URL,
GOPROXY, ...).
To start over: rm -r .venv
exit status: 0 ready, 2 wrong usage, 125 something is missing and could not be installed, 130 interrupted
"""


class State(StrEnum):
    """How a step ended."""

    OK = "ok"
    FAILED = "FAILED"
    COULD_NOT = "could not"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """A step that is over, as a row of the summary."""

    name: str
    state: State
    seconds: float
    note: str = ""

    def line(self) -> str:
        return step_line(self.state, self.name, self.seconds, self.note)


def prepare(peers: Collection[str] = ()) -> Iterator[StepResult]:
    """Do all steps; raise Unavailable where nothing can go on, but a missing peer is only told.

    peers: to be installed beside those that always are.
    """
    yield _step("packages", ensure_packages)
    yield _step("virtual environment", ensure_venv)
    yield ensure_peers(peers)


def ensure_packages(step: Step) -> None:
    """Install the Debian packages of which there is no sign."""
    step.note = "all there"
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
    if still := missing_packages():
        raise Unavailable(f"installed, and yet there is no sign of: {', '.join(still)}; see ci/packages.txt")
    step.note = f"installed {', '.join(missing)}"


def missing_packages() -> list[str]:
    """The packages of packages.txt of which nothing shows that they are there."""
    lines = (ROOT / "ci" / "packages.txt").read_text().splitlines()
    needs = [line.split() for line in lines if line and not line.startswith("#")]
    return [package for package, sign in needs if not _there(sign)]


def ensure_venv(step: Step) -> None:
    """Make .venv, or make it anew where the lock file or the Python has changed since."""
    with _checkout_locked(step.on_line):
        stamp = _read_stamp()
        wanted = {"packages": _packages_stamp(), "project": _project_stamp()}
        step.note = "up to date"
        if stamp == wanted and os.access(VENV / "bin" / "python", os.X_OK):
            return
        try:
            if stamp.get("packages") != wanted["packages"]:
                _install_packages(step.on_line)
            _pip(step.on_line, "--no-deps", "--no-build-isolation", "-e", ".")
        except ToolFailed as error:
            raise Unavailable(
                f".venv could not be made: {error}; check the network and pip's index (PIP_INDEX_URL)"
            ) from error
        STAMP.write_text(json.dumps(wanted))
        step.note = "installed requirements.lock and the project"


def ensure_peers(asked: Collection[str] = ()) -> StepResult:
    """Install the programs under test; the tests of one that cannot be had are skipped, so the others go on."""
    started = time.monotonic()
    try:
        wanted = {name: recipe for name, recipe in recipes().items() if name in asked or not on_request(recipe)}
        missing = [name for name, recipe in wanted.items() if recipe.installed(name) is None]
        # The Python of the virtual environment has a pip, to fetch toolchains with; the system's may have none.
        status = _run_install(missing) if missing else 0
    except HarnessError as error:
        print(f"ci/setup: {error}", file=sys.stderr)
        missing, status = [], EXIT_COULD_NOT
    note = f"installed {', '.join(missing)}" if missing else "all there"
    if status != 0:
        note = "not all could be installed, see above"
    state = State.OK if status == 0 else State.COULD_NOT
    result = StepResult(name="peers", state=state, seconds=time.monotonic() - started, note=note)
    print(result.line(), flush=True)
    return result


def python_environment() -> dict[str, str]:
    """The environment for the project's own programs: those of .venv first."""
    return os.environ | {"PATH": f"{VENV / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(VENV)}


def run_program(command: Sequence[str], deadline: float, output: int | None = None) -> int | None:
    """Run a program of the virtual environment; its exit status, None if it had to be stopped.

    deadline: in seconds. output: a descriptor for what it prints, instead of ours.
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
            # The terminal has told it as well: let it undo what it did to the machine.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE)
            raise


def main() -> int:
    """Prepare the checkout; the exit status."""
    parser = argparse.ArgumentParser(
        prog="ci/setup", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", metavar="NAME", help="a program under test to install as well")
    peers = parser.parse_args().peers
    if unknown := set(peers) - recipes().keys():
        parser.error(f"{', '.join(sorted(unknown))}: cannot be installed; there are: {', '.join(recipes())}")
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
        print("ci/setup: interrupted; run it again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0 if all(result.state is State.OK for result in results) else EXIT_COULD_NOT


def _step(name: str, work: Callable[[Step], None]) -> StepResult:
    with Step(name) as step:
        work(step)
    return StepResult(name=name, state=State.OK, seconds=step.seconds, note=step.note)


def _there(sign: str) -> bool:
    if sign.startswith("module:"):
        return importlib.util.find_spec(sign.removeprefix("module:")) is not None
    return shutil.which(sign) is not None or (sign.startswith("/") and Path(sign).exists())


def _become_root() -> list[str] | None:
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        return None
    silent = subprocess.run(["sudo", "-n", "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    # With someone at the terminal sudo may ask, once and before the step needs it.
    if silent.returncode == 0 or (sys.stdin.isatty() and subprocess.run(["sudo", "-v"], check=False).returncode == 0):
        return ["sudo", "-n"]
    return None


@contextmanager
def _checkout_locked(on_line: OnLine) -> Iterator[None]:
    # The directory itself is the lock: nothing is left in it, and it falls with the process.
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
    # Scripts in a virtual environment name its path, and its packages hold code for one version of Python.
    return _digest((ROOT / "requirements.lock").read_text(), str(ROOT), sys.executable, str(sys.version_info[:2]))


def _project_stamp() -> str:
    # Only what ends up in the installed metadata: a new lint rule is no reason to install anything.
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return _digest(*(json.dumps(tables.get(key)) for key in ("project", "build-system")))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _install_packages(on_line: OnLine) -> None:
    if VENV.exists() and not os.access(VENV, os.W_OK):
        raise Unavailable(f"{VENV} belongs to someone else; remove it, or work in a clone of your own")
    STAMP.unlink(missing_ok=True)
    # Made anew rather than brought up to date, so that nothing stays behind that the lock file no longer names.
    on_line("making .venv")
    run_tool([sys.executable, "-m", "venv", "--clear", VENV], on_line)
    _pip(on_line, "--require-hashes", "-r", "requirements.lock")


def _pip(on_line: OnLine, *arguments: str) -> None:
    # --compile: without byte code each start of each program would cost half a second more.
    options = ["--compile", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    run_tool([VENV / "bin" / "python", "-m", "pip", "install", *options, *arguments], on_line, cwd=ROOT)


def _run_install(names: Sequence[str]) -> int:
    command = [str(VENV / "bin" / "python"), "-m", "harness.install", *names]
    process = subprocess.Popen(command, cwd=ROOT, env=python_environment(), stdin=subprocess.DEVNULL)
    with process, ended(process):
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())
