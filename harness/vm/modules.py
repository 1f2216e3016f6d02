"""Choose the kernel modules that a guest loads, with all they depend on, in order.

A Debian package contains no modules.dep (depmod(8) writes it on installation), and a build tree has one only after
`make modules_install`. So the dependencies are read from each module's section `.modinfo`, as depmod does.
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
from harness.install.packages import install_command
from harness.vm.cpio import Archive
from harness.vm.kernels import CATALOGUE, module_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from harness.vm.kernels import Kernel

MODULE_SUFFIX: Final = re.compile(r"\.ko(\.xz|\.gz|\.zst)?$")


def archive(kernel: Kernel, cache: Path, more: Sequence[str] = ()) -> Path:
    """Return a cpio archive with the modules to load, and their order in `/lab/modules`; built once per kernel.

    more: names of modules to load besides those of kernels.toml; one that the kernel lacks is skipped. Raises
    UsageError if the kernel lacks a required module.
    """
    lists = json.dumps([asdict(CATALOGUE.modules), *more])
    recipe = hashlib.sha256(lists.encode() + Path(__file__).read_bytes()).hexdigest()
    target = cache / "modules" / f"{kernel.identity()}-{recipe[:12]}.cpio"
    if target.exists():
        return target
    contents = {name: read_module(path) for name, path in resolve(kernel, more).items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as out, Archive(out) as cpio:
        for name, content in contents.items():
            cpio.file(f"lab/{name}.ko", content)
        cpio.file("lab/modules", "\n".join(contents).encode())
    partial.replace(target)
    return target


def resolve(kernel: Kernel, more: Sequence[str] = ()) -> dict[str, Path]:
    """Return the files of the modules to load by name, each after its dependencies; more: see `archive`.

    Raises UsageError if the kernel lacks a required module.
    """
    if kernel.modules is None:
        return {}
    lists, builtin = CATALOGUE.modules, kernel.builtin or frozenset()
    paths = (path for path in sorted(kernel.modules.rglob("*.ko*")) if MODULE_SUFFIX.search(path.name))
    files = {name: path for path in paths if (name := module_name(path)) not in builtin}
    files |= replacements(kernel, files)
    # If the list of built-in modules is unknown, a missing module can only show in the guest.
    lacking = [name for name in lists.needed if name not in files and name not in builtin]
    if lacking and kernel.builtin is not None:
        raise UsageError(f"kernel {kernel.release}: lacks {', '.join(lacking)}, neither built in nor as a module")
    return {name: files[name] for name in in_order([*lists.transport, *lists.needed, *lists.wanted, *more], files)}


def replacements(kernel: Kernel, files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files of `kernel.replaced` by the names of their modules.

    Raises UsageError for a file that is not a module of this kernel: the guest could not load it.
    """
    found = {}
    for path in kernel.replaced:
        content = read_module(path)
        if content[:4] != b"\x7fELF":
            raise UsageError(f"{path}: not a kernel module")
        info = dict(line.partition(b"=")[::2] for line in section(content, b".modinfo").split(b"\0"))
        release = info.get(b"vermagic", b"").decode().partition(" ")[0]
        if release != kernel.release:
            raise UsageError(f"{path}: built for kernel {release or 'unknown'}, not for {kernel.release}")
        name = info.get(b"name", b"").decode() or module_name(path)
        if name not in files:
            raise UsageError(f"{path}: kernel {kernel.release} has no module {name} that it could replace")
        found[name] = path
    return found


def in_order(wanted: Iterable[str], files: Mapping[str, Path]) -> list[str]:
    """Return the modules `wanted` and their dependencies, dependencies first.

    files: module name -> file; a module without a file is taken as built in, and left out.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        """Append a module after its dependencies."""
        if name in order or name not in files:
            return
        for dependency in dependencies(read_module(files[name])):
            visit(dependency)
        order.append(name)

    for name in wanted:
        visit(name)
    return order


def read_module(path: Path) -> bytes:
    """Return a module's content, decompressed if it is a .xz, .gz or .zst file."""
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
    """Decompress by zstd(1), which Python's standard library lacks; Unavailable if it is not installed."""
    program = shutil.which("zstd")
    if program is None:
        raise Unavailable(f"zstd is not installed, and this kernel's modules need it: {install_command(['zstd'])}")
    return subprocess.run([program, "-dc"], input=content, capture_output=True, check=True).stdout


def dependencies(module: bytes) -> list[str]:
    """Return the modules to load before this one: `depends` and `softdep` of its .modinfo (modprobe.d(5))."""
    info = [line.partition(b"=") for line in section(module, b".modinfo").split(b"\0")]
    names = [name for key, _, value in info if key == b"depends" for name in value.split(b",")]
    for key, _, value in info:
        if key == b"softdep":
            names += [name for name in value.split() if not name.endswith(b":")]
    return [name.decode().replace("-", "_") for name in names if name]


def section(elf: bytes, wanted: bytes) -> bytes:
    """Return a section of a 64-bit little-endian ELF file (elf(5)), empty if there is none of this name."""
    offset, size, count, names = struct.unpack_from("<40xQ10xHHH", elf)
    table = [struct.unpack_from("<I20xQQ", elf, offset + size * number) for number in range(count)]
    start = table[names][1]
    for name, where, length in table:
        if elf[start + name : elf.index(b"\0", start + name)] == wanted:
            return elf[where : where + length]
    return b""
