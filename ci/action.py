"""Do the steps of action.yml: install the lab, and run its tests on the caller's programs.

GitHub's runner starts them with the machine's own Python, in the caller's workspace. So this module imports only the
standard library, and modules of `ci` that do the same.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ci.setup_checkout import EXIT_COULD_NOT, ROOT, VENV
from harness.install.installer import on_request, recipes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

EXIT_USAGE: Final = 2
# Options of `wg-interop run` that may be given several times, once for each value of the input.
_REPEATED: Final = ("impl", "impl-manifest", "like", "pair", "lane", "suite", "must-include")
_FOLDERS: Final = {"pairs": "netns", "alone": "netns", "lab": "lab", "conformance": "conformance"}
# Variables that the tests need, and that sudo would remove: it is told each by name.
_KEPT: Final = ("PATH", "XDG_CACHE_HOME", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE")
PROGRAM: Final = VENV / "bin" / "wg-interop"


def main() -> int:
    """Do one step, `install` or `run`; return the exit status."""
    steps = {"install": install, "run": run}
    if len(sys.argv) != len(("program", "step")) or sys.argv[1] not in steps:
        print("usage: python3 -m ci.action install|run", file=sys.stderr)
        return EXIT_USAGE
    try:
        return steps[sys.argv[1]](os.environ)
    except ValueError as error:
        print(f"::error title=wg-interop::{error}", flush=True)
        return EXIT_USAGE


def install(environ: Mapping[str, str]) -> int:
    """Set up the checkout of the action, unless it is: a container may have done so."""
    if PROGRAM.exists() and subprocess.run([PROGRAM, "--version"], check=False).returncode == 0:
        print(f"the lab is installed: {PROGRAM}", flush=True)
        return 0
    known = recipes()
    extra = [name for name in values_of(environ, "impl") if name in known and on_request(known[name])]
    return subprocess.run([ROOT / "ci" / "setup", *extra], check=False).returncode


def run(environ: Mapping[str, str]) -> int:
    """Run the tests in the caller's workspace; returns the exit status of `wg-interop run`."""
    command = command_of(environ, Path.cwd())
    prefix = become_root(environ, os.geteuid())
    print(f"+ {shlex.join(command)}", flush=True)
    status = subprocess.run([*prefix, *command], check=False).returncode
    if prefix:
        # The next steps, which belong to the runner's user, read the report and store the cache.
        owned = [str(path) for path in (_report(environ, Path.cwd()), _cache(environ)) if path and path.exists()]
        subprocess.run(["sudo", "-n", "chown", "-R", f"{os.getuid()}:{os.getgid()}", *owned], check=False)
    return status if status >= 0 else EXIT_COULD_NOT


def command_of(environ: Mapping[str, str], workspace: Path) -> list[str]:
    """Return the command that the inputs ask for; ValueError as in `values_of`."""
    command = [str(PROGRAM), "run", f"--results={_report(environ, workspace) / 'results.json'}"]
    command += [f"--{name}={value}" for name in _REPEATED for value in values_of(environ, name)]
    for name, option in (("baseline", "--baseline"), ("workers", "-n")):
        if value := _input(environ, name):
            command += [option, value]
    return [*command, *values_of(environ, "args"), *_tests(values_of(environ, "suite"))]


def _tests(suites: Iterable[str]) -> list[str]:
    """Return the directories of the lab that have these suites, whatever directories the workspace has."""
    folders = {_FOLDERS.get(suite, "") for suite in suites} or {_FOLDERS["pairs"]}
    return [str(ROOT / "selftests" / folder) for folder in sorted({""} if "" in folders else folders)]


def values_of(environ: Mapping[str, str], name: str) -> list[str]:
    """Return the values of an input, which are separated as in a shell; ValueError for a quote that does not end."""
    try:
        return shlex.split(_input(environ, name))
    except ValueError as error:
        raise ValueError(f"input {name}: {error}") from error


def become_root(environ: Mapping[str, str], user: int) -> list[str]:
    """Return the words before a command that needs root, which kernel WireGuard does: sudo, with our variables."""
    if user == 0:
        return []
    return ["sudo", "-n", "env", *(f"{name}={environ[name]}" for name in _KEPT if name in environ)]


def _input(environ: Mapping[str, str], name: str) -> str:
    return environ.get(f"INPUT_{name.upper().replace('-', '_')}", "").strip()


def _report(environ: Mapping[str, str], workspace: Path) -> Path:
    return workspace / (_input(environ, "report") or "wg-interop-report")


def _cache(environ: Mapping[str, str]) -> Path | None:
    return Path(environ["XDG_CACHE_HOME"]) if "XDG_CACHE_HOME" in environ else None


if __name__ == "__main__":
    sys.exit(main())
