"""List the versions of a program that exist: those of a Go module, and those of a crate.

Sources: `go list -m -versions`; the sparse index in the registry index format of Cargo's book.
"""

from __future__ import annotations

import json
import re
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.install import go
from harness.install.tools import ToolFailed, run_tool

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from harness.install.progress import OnLine

# A version, as it stands behind the @ of `NAME@VERSION`.
VERSION: Final = re.compile(r"\w[\w.+-]*")
_INDEX: Final = "https://index.crates.io"
_TIMEOUT: Final = 20.0  # seconds
_NUMBER: Final = re.compile(r"\d+")


def pick(version: str, known: Collection[str]) -> str:
    """Return the known version that the user means: one of this name, or the only one that ends in `.VERSION`.

    Without either, returns the version as it is. Raises UsageError if several end so.
    """
    ends = [name for name in known if name.endswith(f".{version}")]
    if version in known or not ends:
        return version
    if len(ends) > 1:
        raise UsageError(f"version {version}: could be {' or '.join(ends)}; write it in full")
    return ends[0]


def in_order(versions: Iterable[str]) -> list[str]:
    """Sort versions by their numbers, the oldest first, each once: `1.9` before `1.10`, `1.0-rc1` before `1.0`."""
    return sorted(dict.fromkeys(versions), key=_key)


def _key(version: str) -> tuple[list[int], int, list[int], str]:
    release, dash, rest = version.partition("-")
    return _numbers(release), 0 if dash else 1, _numbers(rest), version


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(text)]


def of_module(module: str, needed: str, on_line: OnLine) -> list[str]:
    """Ask the Go module proxy (GOPROXY) for the tagged versions of a module; ToolFailed if it does not answer."""
    compiler = go.go(needed, on_line)
    with tempfile.TemporaryDirectory(prefix="wg-interop-versions-") as scratch:
        environment = go.go_environment(compiler, Path(scratch)) | {"GOFLAGS": "-modcacherw"}
        printed = run_tool([compiler, "list", "-m", "-versions", module], on_line, env=environment, cwd=Path(scratch))
    return printed.split()[1:]


def of_crate(crate: str) -> list[str]:
    """Ask the index of crates.io for the versions of a crate that are not yanked; ToolFailed if it does not answer."""
    name = crate.lower()
    folder = {1: "1", 2: "2", 3: f"3/{name[:1]}"}.get(len(name), f"{name[:2]}/{name[2:4]}")
    try:
        with urllib.request.urlopen(f"{_INDEX}/{folder}/{name}", timeout=_TIMEOUT) as answer:  # noqa: S310 - https
            lines = answer.read().decode().splitlines()
    except (urllib.error.URLError, TimeoutError) as error:
        raise ToolFailed(f"{_INDEX}: {getattr(error, 'reason', error)}") from error
    entries = [json.loads(line) for line in lines]
    return [str(entry["vers"]) for entry in entries if not entry["yanked"]]
