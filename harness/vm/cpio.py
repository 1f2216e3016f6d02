"""Write cpio archives (format newc), which the guest's kernel unpacks into its RAM.

Source of the format: Documentation/driver-api/early-userspace/buffer-format.rst.
An initramfs may consist of several archives one after another; so the parts of the guest's root are concatenated.
"""

from __future__ import annotations

import shutil
import stat
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Self

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
ALIGNMENT = 4


class Archive:
    """Writes one archive; a context manager that writes the trailer at its end.

    Parent directories of a member are added as needed. Everything belongs to root. Copied files keep their mtime,
    because compiled Python is valid for one mtime of its source.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._directories: set[PurePosixPath] = {PurePosixPath("/")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._header(TRAILER, mode=0)

    def directory(self, path: str, permissions: int = 0o755) -> None:
        """Add a directory, unless the archive has it already."""
        absolute = PurePosixPath("/", path)
        if absolute in self._directories:
            return
        self._parents(absolute)
        self._directories.add(absolute)
        self._header(str(absolute), mode=stat.S_IFDIR | permissions)

    def file(self, path: str, content: bytes, permissions: int = 0o644, mtime: int = 0) -> None:
        """Add a file with this content; mtime: seconds since 1970."""
        self._parents(PurePosixPath("/", path))
        self._header(path, mode=stat.S_IFREG | permissions, size=len(content), mtime=mtime)
        self._out.write(content)
        self._pad(len(content))

    def copy(self, path: str, source: Path) -> None:
        """Add the host's file `source` as `path`, with its permissions and mtime."""
        self._parents(PurePosixPath("/", path))
        with source.open("rb") as content:
            status = source.stat()
            mode = stat.S_IFREG | stat.S_IMODE(status.st_mode)
            self._header(path, mode=mode, size=status.st_size, mtime=int(status.st_mtime))
            shutil.copyfileobj(content, self._out)
        self._pad(status.st_size)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link; target: its content, which need not exist."""
        self._parents(PurePosixPath("/", path))
        content = target.encode()
        self._header(path, mode=stat.S_IFLNK | 0o777, size=len(content))
        self._out.write(content)
        self._pad(len(content))

    def character_device(self, path: str, major: int, minor: int, permissions: int = 0o600) -> None:
        """Add a character device, as mknod(1) would create it; writing it here needs no privilege."""
        self._parents(PurePosixPath("/", path))
        self._header(path, mode=stat.S_IFCHR | permissions, device=(major, minor))

    def _parents(self, path: PurePosixPath) -> None:
        if path.parent not in self._directories:
            self.directory(str(path.parent))

    def _header(self, path: str, *, mode: int, size: int = 0, mtime: int = 0, device: tuple[int, int] = (0, 0)) -> None:
        name = path.lstrip("/").encode() + b"\0"
        # ino, mode, uid, gid, nlink, mtime, filesize, maj, min, rmaj, rmin, namesize, chksum
        fields = (0, mode, 0, 0, 1, mtime & 0xFFFFFFFF, size, 0, 0, *device, len(name), 0)
        head = MAGIC + b"".join(b"%08X" % field for field in fields) + name
        self._out.write(head)
        self._pad(len(head))

    def _pad(self, length: int) -> None:
        self._out.write(bytes(-length % ALIGNMENT))
