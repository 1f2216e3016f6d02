"""Build docs/ as a site by MkDocs Material, with packages of its own in the cache.

This module imports only the standard library, and modules of `harness` that do the same.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from ci.setup_checkout import EXIT_COULD_NOT, EXIT_INTERRUPTED, ROOT
from harness.errors import HarnessError, Unavailable
from harness.install.cache import Area, directory, locked
from harness.install.tools import ToolFailed, run_tool

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LOCK: Final = ROOT / "ci" / "docs.lock"
HELP: Final = """\
Build the pages of docs/ as a site into site/. A broken link, a link to a missing heading, and a page without a place
in the navigation (mkdocs.yml) are errors. The first run downloads the packages of ci/docs.lock into the cache.

exit status: 0 built, 1 a page is wrong, 2 wrong usage, 125 the packages could not be installed, 130 interrupted
"""


def environment() -> Path:
    """Return the Python of the environment with the packages of LOCK, made if it is missing; Unavailable if that fails.

    Its name contains the hash of the lock file and of the Python that made it.
    """
    content = LOCK.read_bytes() + f"{sys.executable} {sys.version_info[:2]}".encode()
    target = directory(Area.TOOLCHAINS) / f"docs-{hashlib.sha256(content).hexdigest()[:12]}"
    python, ready = target / "bin" / "python", target / "ready"
    options = ("--no-input", "--disable-pip-version-check", "--require-hashes")
    with locked(target):
        if not ready.exists():
            print("ci/docs: installing the packages of ci/docs.lock", file=sys.stderr, flush=True)
            try:
                run_tool([sys.executable, "-m", "venv", "--clear", target], lambda _: None)
                run_tool([python, "-m", "pip", "install", *options, "-r", LOCK], lambda _: None)
            except ToolFailed as error:
                raise Unavailable(f"{error}; check the network and pip's index (PIP_INDEX_URL)") from error
            ready.touch()
    return python


def command(python: Path, *, serve: bool) -> list[str]:
    """Return the command that builds the site, or serves it while the pages change."""
    task = ["serve"] if serve else ["build", "--clean"]
    return [str(python), "-m", "mkdocs", *task, "--strict", "--config-file", str(ROOT / "mkdocs.yml")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Build or serve the site, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="ci/docs", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help="serve the site on localhost, and follow changes")
    serve = parser.parse_args(arguments).serve
    try:
        python = environment()
        quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
        status = subprocess.run(command(python, serve=serve), cwd=ROOT, env=quiet, check=False).returncode
    except HarnessError as error:
        print(f"ci/docs: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if status == 0:
        print(f"site: {ROOT / 'site' / 'index.html'}")
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
