"""Check which modules a guest loads, and in which order, with minimal ELF files."""

from __future__ import annotations

import lzma
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from harness.errors import UsageError
from harness.vm.kernels import Kernel
from harness.vm.modules import dependencies, in_order, read_module, resolve

if TYPE_CHECKING:
    from pathlib import Path


def module(*modinfo: str) -> bytes:
    """An ELF file (elf(5)) of three sections: the null section, the names, `.modinfo`."""
    names = b"\0.shstrtab\0.modinfo\0"
    info = b"".join(line.encode() + b"\0" for line in modinfo)
    sections = [(0, 0, 0), (1, 64, len(names)), (11, 64 + len(names), len(info))]
    table = b"".join(struct.pack("<I20xQQ24x", *section) for section in sections)
    return struct.pack("<40xQ10xHHH", 64 + len(names) + len(info), 64, 3, 1) + names + info + table


@pytest.mark.parametrize(
    ("modinfo", "expected"),
    [
        (["license=GPL", "depends="], []),
        (["depends=udp_tunnel,libcurve25519-generic", "name=wireguard"], ["udp_tunnel", "libcurve25519_generic"]),
        (["softdep=pre: nf-tables post: crc32c", "depends=a"], ["a", "nf_tables", "crc32c"]),
        (["description=depends=b"], []),
    ],
)
def test_dependencies_are_read_from_modinfo(modinfo: list[str], expected: list[str]) -> None:
    assert dependencies(module(*modinfo)) == expected


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    contents = {
        "wireguard.ko": module("depends=ip6_udp_tunnel,udp-tunnel"),
        "ip6_udp_tunnel.ko": module("depends=udp-tunnel"),
        "veth.ko": module("depends="),
        "tun.ko": module("depends=builtin_thing"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "udp-tunnel.ko.xz").write_bytes(lzma.compress(module("depends=")))
    return {path.name.partition(".")[0].replace("-", "_"): path for path in tmp_path.iterdir()}


def test_module_is_loaded_after_its_dependencies(files: dict[str, Path]) -> None:
    assert in_order(["wireguard", "veth"], files) == ["udp_tunnel", "ip6_udp_tunnel", "wireguard", "veth"]


def test_dependency_without_file_counts_as_built_in(files: dict[str, Path]) -> None:
    assert in_order(["tun"], files) == ["tun"]


def test_compressed_module_is_unpacked(files: dict[str, Path]) -> None:
    assert read_module(files["udp_tunnel"]) == module("depends=")


def kernel(folder: Path, builtin: frozenset[str]) -> Kernel:
    return Kernel(release="6.1", image=folder, modules=folder, builtin=builtin)


@pytest.mark.usefixtures("files")
def test_built_in_module_is_not_loaded_from_stale_file(tmp_path: Path) -> None:
    files = resolve(kernel(tmp_path, frozenset({"wireguard", "tun"})))
    assert {name: path.name for name, path in files.items()} == {"veth": "veth.ko"}


@pytest.mark.usefixtures("files")
def test_kernel_without_needed_module_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "wireguard.ko").unlink()
    with pytest.raises(UsageError, match=r"^kernel 6\.1: lacks wireguard, neither built in nor as a module$"):
        resolve(kernel(tmp_path, frozenset()))


@pytest.mark.usefixtures("files")
def test_own_module_replaces_that_of_same_name(tmp_path: Path) -> None:
    own = tmp_path / "build.module"
    own.write_bytes(b"\x7fELF" + module("name=wireguard", "depends=veth", "vermagic=6.1 SMP mod_unload")[4:])
    found = resolve(replace(kernel(tmp_path, frozenset()), replaced=(own,)))
    # The guest sets the parameters of a module by its name, whatever its file is called.
    assert list(found.items()) == [("veth", tmp_path / "veth.ko"), ("wireguard", own), ("tun", tmp_path / "tun.ko")]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"text", "not a kernel module"),
        (module("name=wireguard", "vermagic=6.12 SMP"), r"built for kernel 6\.12, not for 6\.1"),
        (module("name=mine", "vermagic=6.1 SMP"), r"kernel 6\.1 has no module mine that it could replace"),
    ],
)
@pytest.mark.usefixtures("files")
def test_module_of_other_kernel_or_name_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    own = tmp_path / "own.txt"
    own.write_bytes(b"\x7fELF" + content[4:] if content != b"text" else content)
    with pytest.raises(UsageError, match=complaint):
        resolve(replace(kernel(tmp_path, frozenset()), replaced=(own,)))


def test_bzimage_alone_has_no_modules_to_load(tmp_path: Path) -> None:
    assert resolve(Kernel(release="6.1", image=tmp_path, modules=None, builtin=None)) == {}
