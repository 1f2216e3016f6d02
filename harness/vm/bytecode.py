"""Compile Python for the guest ahead of time; the guest would take ten times as long.

An import leaves compiled code in `__pycache__`. pytest has its own compiled form of the modules whose assertions it
rewrites: all tests, and all of its plugins. So we run pytest here, with a folder of the cache as PYTHONPYCACHEPREFIX,
and copy the files from there into the guest, beside their sources. Nothing is written beside the sources.
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
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

COLLECT_TIMEOUT: Final = 60.0  # seconds
REWRITTEN: Final = "-pytest-"  # in the name of a file that pytest rewrote
TESTS: Final = ("test_*.py", "conftest.py")
HASHED, CHECKED = 1, 2


def program(source: Path) -> bytes:
    """Compile a program into the content of a .pyc file; `python FILE.pyc` checks only its magic number (PEP 552)."""
    code = compile(source.read_bytes(), str(source), "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def is_current(compiled: Path, source: Path) -> bool:
    """Return whether an import would use `compiled`: the source's mtime and size, or its hash, match (PEP 552)."""
    with compiled.open("rb") as content:
        head = content.read(16)
    if head[:4] != importlib.util.MAGIC_NUMBER:
        return False
    flags = int.from_bytes(head[4:8], "little")
    if flags & CHECKED:
        return head[8:16] == importlib.util.source_hash(source.read_bytes())
    stat = source.stat()
    stamp = struct.pack("<II", int(stat.st_mtime) & 0xFFFFFFFF, stat.st_size & 0xFFFFFFFF)
    return bool(flags & HASHED) or head[8:16] == stamp


def forms(source: Path, prefix: Path) -> Iterator[Path]:
    """Yield the valid compiled files of a source, from its `__pycache__` and from below `prefix`."""
    pattern = f"{source.stem}.{sys.implementation.cache_tag}*.pyc"
    for folder in (source.parent / "__pycache__", below(prefix, source.parent)):
        yield from (path for path in sorted(folder.glob(pattern)) if is_current(path, source))


def below(prefix: Path, path: Path) -> Path:
    """Return where Python puts the compiled files of a folder with PYTHONPYCACHEPREFIX=prefix."""
    return prefix / path.relative_to("/")


def compile_imports(sources: Iterable[Path], prefix: Path) -> None:
    """Compile the sources that have no valid compiled file below `prefix`; one with a syntax error is skipped."""
    for source in sources:
        compiled = below(prefix, source.parent) / f"{source.stem}.{sys.implementation.cache_tag}.pyc"
        if not (compiled.exists() and is_current(compiled, source)):
            compiled.parent.mkdir(parents=True, exist_ok=True)
            py_compile.compile(str(source), str(compiled), quiet=2)


def rewrite_tests(sources: Iterable[Path], prefix: Path, root: Path, options: Sequence[str] = ()) -> None:
    """Let pytest rewrite those test modules that have no valid rewritten file below `prefix`; see `collect`."""
    stale = [source for source in sources if is_test(source) and not is_rewritten(source, prefix)]
    if stale:
        collect(stale, prefix, root, options)


def is_test(source: Path) -> bool:
    """Return whether pytest takes this file for a test module or a conftest, by its name."""
    return any(fnmatch(source.name, pattern) for pattern in TESTS)


def is_rewritten(source: Path, prefix: Path) -> bool:
    """Return whether a valid file that pytest rewrote exists for this source."""
    return any(REWRITTEN in path.name for path in forms(source, prefix))


def collect(paths: Iterable[Path], prefix: Path, root: Path, options: Sequence[str] = ()) -> None:
    """Let pytest collect `paths`, and so write the modules that it rewrites below `prefix`, its plugins too.

    root: the current directory of that pytest. options: of pytest.

    Errors of pytest are ignored: pytest in the guest rewrites what is missing, and reports the error there.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONDONT"))}
    look = ["--collect-only", "-qq", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *look, *map(str, paths)]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command,
            cwd=root,
            env=clean | {"PYTHONPYCACHEPREFIX": str(prefix)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=COLLECT_TIMEOUT,
            check=False,
        )
