"""Install Debian packages by apt-get as root, or unpack them into a directory as anyone."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from harness.errors import Unavailable
from harness.install.cache import Area, directory, remove
from harness.install.tools import ToolFailed, run_tool

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from harness.install.progress import OnLine


def apt_install(packages: Sequence[str], on_line: OnLine, *, become: Sequence[str] = ()) -> None:
    """Install Debian packages as root, without what they merely recommend; `become` is put before apt-get."""
    _require_apt()
    # Two set-ups at once wait for each other instead of failing on dpkg's lock.
    apt = [*become, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=600"]
    try:
        run_tool([*apt, "update"], on_line)
    except ToolFailed as error:
        # A broken source among several is no reason to stop; the next command says if it was the one that matters.
        on_line(str(error))
    run_tool([*apt, "install", "-y", "--no-install-recommends", *packages], on_line)


def unpack(packages: Sequence[str], target: Path, on_line: OnLine) -> None:
    """Unpack packages, and what they need and this machine lacks, below `target`; the machine stays as it is."""
    _require_apt()
    archives = target / ".archives"
    (archives / "partial").mkdir(parents=True)
    try:
        _download(packages, archives, on_line)
    except ToolFailed:
        # The machine's package lists are absent or old, and only root may renew them: use lists of our own.
        lists = directory(Area.TOOLCHAINS) / "apt"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        ours = ("-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={lists}")
        run_tool(["apt-get", "-q", *ours, "update"], on_line)
        _download(packages, archives, on_line, *ours)
    for archive in sorted(archives.glob("*.deb")):
        run_tool(["dpkg-deb", "-x", archive, target], on_line)
    remove(archives)


def _download(packages: Sequence[str], archives: Path, on_line: OnLine, *options: str) -> None:
    # The lock is dpkg's own, whose files stay untouched; as root, apt would change to a user who may not write here.
    ours = ["Debug::NoLocking=1", "APT::Sandbox::User=root", f"Dir::Cache::archives={archives}"]
    words = [word for setting in ours for word in ("-o", setting)]
    fetch = ["install", "--download-only", "-y", "--no-install-recommends"]
    run_tool(["apt-get", "-q", *options, *words, *fetch, *packages], on_line)


def _require_apt() -> None:
    if shutil.which("apt-get") is None:
        raise Unavailable("apt-get is not on this machine")
