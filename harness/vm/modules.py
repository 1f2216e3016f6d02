"""Choose the kernel modules that a guest loads, with all they depend on, in order.

A Debian package holds no modules.dep (depmod makes that when a package is installed), and a build tree has one only
after `make modules_install`; so dependencies are read where depmod reads them, in each module's own `.modinfo`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import Unavailable, UsageError
from harness.vm.cpio import Archive
from harness.vm.kernels import CATALOGUE, module_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from harness.vm.kernels import Kernel

MODULE_SUFFIX: Final = re.compile(r"\.ko(\.xz|\.gz|\.zst)?$")


def archive(kernel: Kernel, cache: Path, more: Sequence[str] = ()) -> Path:
    """A cpio of the modules to load, with `/lab/modules` naming them in order; built once for a kernel.

    more: to be loaded beside those that every guest has, where the kernel has them.
    """
    lists = json.dumps([asdict(CATALOGUE.modules), *more])
    recipe = hashlib.sha256(lists.encode() + Path(__file__).read_bytes()).hexdigest()
    made = cache / "modules" / f"{kernel.identity()}-{recipe[:12]}.cpio"
    if made.exists():
        return made
    contents = {path: read_module(path) for path in resolve(kernel, more)}
    made.parent.mkdir(parents=True, exist_ok=True)
    partial = made.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as out, Archive(out) as cpio:
        for path, content in contents.items():
            cpio.file(f"lab/{module_name(path)}.ko", content)
        cpio.file("lab/modules", "\n".join(module_name(path) for path in contents).encode())
    partial.replace(made)
    return made


def resolve(kernel: Kernel, more: Sequence[str] = ()) -> list[Path]:
    """The files of the modules that the lanes use, each after those that it depends on."""
    if kernel.modules is None:
        return []
    lists, builtin = CATALOGUE.modules, kernel.builtin or frozenset()
    found = (path for path in sorted(kernel.modules.rglob("*.ko*")) if MODULE_SUFFIX.search(path.name))
    files = {name: path for path in found if (name := module_name(path)) not in builtin}
    # Of a kernel that does not tell what it has built in, the guest will find out.
    lacking = [name for name in lists.needed if name not in files and name not in builtin]
    if lacking and kernel.builtin is not None:
        raise UsageError(f"kernel {kernel.release}: lacks {', '.join(lacking)}, neither built in nor as a module")
    return [files[name] for name in in_order([*lists.transport, *lists.needed, *lists.wanted, *more], files)]


def in_order(wanted: Iterable[str], files: Mapping[str, Path]) -> list[str]:
    """`wanted` and all that it depends on, dependencies first; what has no file is built in and left out."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or name not in files:
            return
        for dependency in dependencies(read_module(files[name])):
            visit(dependency)
        order.append(name)

    for name in wanted:
        visit(name)
    return order


def read_module(path: Path) -> bytes:
    content = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(content)
        case ".gz":
            return gzip.decompress(content)
        case ".zst":
            return unzstd(content)
        case _:
            return content


def unzstd(content: bytes) -> bytes:
    program = shutil.which("zstd")
    if program is None:
        raise Unavailable("this kernel's modules are compressed by zstd; install it: apt-get install zstd")
    return subprocess.run([program, "-dc"], input=content, capture_output=True, check=True).stdout


def dependencies(module: bytes) -> list[str]:
    """The modules that must be loaded before this one: its symbols' owners, and what it asks for by `softdep`."""
    info = [line.partition(b"=") for line in section(module, b".modinfo").split(b"\0")]
    names = [name for key, _, value in info if key == b"depends" for name in value.split(b",")]
    for key, _, value in info:
        if key == b"softdep":
            names += [name for name in value.split() if not name.endswith(b":")]
    return [name.decode().replace("-", "_") for name in names if name]


def section(elf: bytes, wanted: bytes) -> bytes:
    """The content of a section of a 64-bit little-endian ELF file (elf(5)); empty if there is none of that name."""
    offset, size, count, names = struct.unpack_from("<40xQ10xHHH", elf)
    table = [struct.unpack_from("<I20xQQ", elf, offset + size * number) for number in range(count)]
    start = table[names][1]
    for name, where, length in table:
        if elf[start + name : elf.index(b"\0", start + name)] == wanted:
            return elf[where : where + length]
    return b""
