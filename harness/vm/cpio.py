"""Write cpio archives (format newc), which the guest's kernel unpacks into its RAM.

The format is the kernel's own (Documentation/driver-api/early-userspace/buffer-format.rst).
An initramfs may be several archives one after another, which is how the parts of the guest's root are put together.
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
    """Writes one archive; directories on the way to a member come by themselves.

    Everything belongs to root. Times of files are kept, since compiled Python is valid for one mtime of its source.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._made: set[PurePosixPath] = {PurePosixPath("/")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._header(TRAILER, mode=0)

    def directory(self, path: str, permissions: int = 0o755) -> None:
        where = PurePosixPath("/", path)
        if where in self._made:
            return
        self._parents(where)
        self._made.add(where)
        self._header(str(where), mode=stat.S_IFDIR | permissions)

    def file(self, path: str, content: bytes, permissions: int = 0o644, mtime: int = 0) -> None:
        self._parents(PurePosixPath("/", path))
        self._header(path, mode=stat.S_IFREG | permissions, size=len(content), mtime=mtime)
        self._out.write(content)
        self._pad(len(content))

    def copy(self, path: str, source: Path) -> None:
        """Add the host's file `source`, with its permissions and time, as `path`."""
        self._parents(PurePosixPath("/", path))
        with source.open("rb") as content:
            found = source.stat()
            mode = stat.S_IFREG | stat.S_IMODE(found.st_mode)
            self._header(path, mode=mode, size=found.st_size, mtime=int(found.st_mtime))
            shutil.copyfileobj(content, self._out)
        self._pad(found.st_size)

    def symlink(self, path: str, target: str) -> None:
        self._parents(PurePosixPath("/", path))
        content = target.encode()
        self._header(path, mode=stat.S_IFLNK | 0o777, size=len(content))
        self._out.write(content)
        self._pad(len(content))

    def character_device(self, path: str, major: int, minor: int, permissions: int = 0o600) -> None:
        self._parents(PurePosixPath("/", path))
        self._header(path, mode=stat.S_IFCHR | permissions, device=(major, minor))

    def _parents(self, path: PurePosixPath) -> None:
        if path.parent not in self._made:
            self.directory(str(path.parent))

    def _header(self, path: str, *, mode: int, size: int = 0, mtime: int = 0, device: tuple[int, int] = (0, 0)) -> None:
        name = path.lstrip("/").encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, file size, device of the file, device it stands for, name size, checksum
        fields = (0, mode, 0, 0, 1, mtime & 0xFFFFFFFF, size, 0, 0, *device, len(name), 0)
        head = MAGIC + b"".join(b"%08X" % field for field in fields) + name
        self._out.write(head)
        self._pad(len(head))

    def _pad(self, length: int) -> None:
        self._out.write(bytes(-length % ALIGNMENT))
