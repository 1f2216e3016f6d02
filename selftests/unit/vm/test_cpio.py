"""Check the cpio archives of the guest's root by a second reader, and by cpio(1)."""

from __future__ import annotations

import io
import shutil
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from harness.vm.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def members(data: bytes) -> Iterator[tuple[str, list[int], bytes]]:
    """Name, thirteen numbers and content of each member (early-userspace/buffer-format.rst)."""
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        numbers = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = numbers[6], numbers[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        start = (at + 110 + name_size + 3) & ~3
        yield name, numbers, data[start : start + size]
        if name == "TRAILER!!!":
            return
        at = (start + size + 3) & ~3


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    source = tmp_path / "program"
    source.write_bytes(b"12345")
    source.chmod(0o755)
    out = io.BytesIO()
    with Archive(out) as writer:
        writer.file("/etc/deep/hosts", b"abc", mtime=77)
        writer.copy("bin/program", source)
        writer.symlink("sbin", "bin")
        writer.character_device("dev/console", 5, 1)
    return out.getvalue()


def test_members_keep_kind_permissions_time_and_content(archive: bytes) -> None:
    by_name = {name: (numbers, content) for name, numbers, content in members(archive)}
    assert by_name["etc/deep/hosts"][0][5] == 77
    assert by_name["etc/deep/hosts"][1] == b"abc"
    assert by_name["bin/program"][0][1] == stat.S_IFREG | 0o755
    assert by_name["bin/program"][1] == b"12345"
    assert (stat.S_ISLNK(by_name["sbin"][0][1]), by_name["sbin"][1]) == (True, b"bin")
    assert (stat.S_ISCHR(by_name["dev/console"][0][1]), by_name["dev/console"][0][9:11]) == (True, [5, 1])


def test_directories_come_once_and_before_their_content(archive: bytes) -> None:
    names = [name for name, _, _ in members(archive)]
    assert names[:3] == ["etc", "etc/deep", "etc/deep/hosts"]
    assert len(names) == len(set(names))


def test_archive_length_is_multiple_of_four(archive: bytes) -> None:
    assert len(archive) % 4 == 0


@pytest.mark.skipif(not shutil.which("cpio"), reason="cpio is not installed: apt-get install cpio")
def test_cpio_program_lists_same_members(archive: bytes) -> None:
    listing = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True).stdout
    assert listing.decode().split() == [name for name, _, _ in members(archive)][:-1]
