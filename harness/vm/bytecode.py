"""Compile Python for the guest ahead of time; the guest would take ten times as long.

Besides what imports leave in `__pycache__` there are the modules that pytest rewrites: all tests, and all of its
plugins. Only pytest knows which and how, so it is run here to fill a folder in the cache (PYTHONPYCACHEPREFIX), from
where the guest gets them beside their sources. Nothing is written into the checkout.
"""

from __future__ import annotations

import importlib.util
import marshal
import os
import py_compile
import struct
import subprocess
import sys
from contextlib import suppress
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

PATIENCE: Final = 60.0
REWRITTEN: Final = "-pytest-"
TESTS: Final = ("test_*.py", "conftest.py")
HASHED, CHECKED = 1, 2


def program(source: Path) -> bytes:
    """A program as `python FILE.pyc` takes it (PEP 552; of the header it reads the magic number alone)."""
    code = compile(source.read_bytes(), str(source), "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def is_current(compiled: Path, source: Path) -> bool:
    """Whether an import would take `compiled` as it is (PEP 552): by its source's time and size, or by its hash."""
    with compiled.open("rb") as content:
        head = content.read(16)
    if head[:4] != importlib.util.MAGIC_NUMBER:
        return False
    flags = int.from_bytes(head[4:8], "little")
    if flags & CHECKED:
        return head[8:16] == importlib.util.source_hash(source.read_bytes())
    found = source.stat()
    stamp = struct.pack("<II", int(found.st_mtime) & 0xFFFFFFFF, found.st_size & 0xFFFFFFFF)
    return bool(flags & HASHED) or head[8:16] == stamp


def forms(source: Path, prefix: Path) -> Iterator[Path]:
    """The current compiled forms of a file, beside it and below `prefix`."""
    pattern = f"{source.stem}.{sys.implementation.cache_tag}*.pyc"
    for folder in (source.parent / "__pycache__", below(prefix, source.parent)):
        yield from (path for path in sorted(folder.glob(pattern)) if is_current(path, source))


def below(prefix: Path, path: Path) -> Path:
    return prefix / path.relative_to("/")


def compile_imports(sources: Iterable[Path], prefix: Path) -> None:
    """Compile, below `prefix`, what is not there yet or has changed; what cannot be compiled is left to the guest."""
    for source in sources:
        compiled = below(prefix, source.parent) / f"{source.stem}.{sys.implementation.cache_tag}.pyc"
        if not (compiled.exists() and is_current(compiled, source)):
            compiled.parent.mkdir(parents=True, exist_ok=True)
            py_compile.compile(str(source), str(compiled), quiet=2)


def rewrite_tests(sources: Iterable[Path], prefix: Path, project: Path) -> None:
    """Have pytest collect those tests of which there is no current rewritten form below `prefix`."""
    stale = [source for source in sources if is_test(source) and not is_rewritten(source, prefix)]
    if stale:
        collect(stale, prefix, project)


def is_test(source: Path) -> bool:
    return any(fnmatch(source.name, pattern) for pattern in TESTS)


def is_rewritten(source: Path, prefix: Path) -> bool:
    return any(REWRITTEN in path.name for path in forms(source, prefix))


def collect(paths: Iterable[Path], prefix: Path, project: Path) -> None:
    """Let pytest collect `paths` and keep, below `prefix`, what it rewrites on the way, its plugins too.

    Its failure is none of ours: the guest does itself what is missing, and tells if it cannot.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONDONT"))}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", *map(str, paths)]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command,
            cwd=project,
            env=clean | {"PYTHONPYCACHEPREFIX": str(prefix)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=False,
        )
