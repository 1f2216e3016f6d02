"""Print where suite and cache are, and pytest's options: `wg-interop where`."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from typing import TYPE_CHECKING, Any

from harness import suite
from harness.cli.terminal import OK
from harness.install.cache import cache_root

if TYPE_CHECKING:
    from typing import TextIO


def places() -> dict[str, Any]:
    """Return the places by name, the version, and the words that follow `pytest`."""
    root = suite.root()
    return {
        "root": str(root),
        "suite": str(root / suite.FOLDER),
        "catalogue": str(root / suite.CATALOGUES),
        "expectations": str(root / suite.EXPECTATIONS),
        "cache": str(cache_root()),
        "report": str(suite.workplace() / "report"),
        "version": importlib.metadata.version("wg-interop"),
        "pytest": [*suite.pytest_options(), f"-ocache_dir={suite.workplace() / '.pytest_cache'}"],
    }


def show(out: TextIO, *, as_json: bool) -> int:
    """Print them, one per line or as JSON; returns the exit status."""
    found = places()
    if as_json:
        out.write(json.dumps(found, indent=1) + "\n")
    else:
        lines = found | {"pytest": shlex.join(["pytest", *found["pytest"]])}
        out.write("".join(f"{name:<13} {value}\n" for name, value in lines.items()))
    return OK
