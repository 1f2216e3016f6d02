"""Install Debian packages by apt-get as root, or unpack them into a directory as any user."""

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
    """Install Debian packages, without recommended ones.

    on_line: called with each line of output. become: command before apt-get, such as sudo. Raises ToolFailed if it
    fails, Unavailable without apt-get.
    """
    _require_apt()
    # If another process holds dpkg's lock, wait for it, for up to 600 s.
    apt = [*become, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=600"]
    try:
        run_tool([*apt, "update"], on_line)
    except ToolFailed as error:
        # One of several package sources may be broken; if a package is missing without it, the next command fails.
        on_line(str(error))
    run_tool([*apt, "install", "-y", "--no-install-recommends", *packages], on_line)


def unpack(packages: Sequence[str], target: Path, on_line: OnLine) -> None:
    """Download packages, and those dependencies that are not installed here, and unpack them below `target`.

    Nothing is installed, and no privilege is needed. Raises ToolFailed if a command fails, Unavailable without apt-get.
    """
    _require_apt()
    archives = target / ".archives"
    (archives / "partial").mkdir(parents=True)
    try:
        _download(packages, archives, on_line)
    except ToolFailed:
        # The machine's package lists are missing or old, and only root may update them: use lists in the cache.
        lists = directory(Area.TOOLCHAINS) / "apt"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        own_lists = ("-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={lists}")
        run_tool(["apt-get", "-q", *own_lists, "update"], on_line)
        _download(packages, archives, on_line, *own_lists)
    for archive in sorted(archives.glob("*.deb")):
        run_tool(["dpkg-deb", "-x", archive, target], on_line)
    remove(archives)


def _download(packages: Sequence[str], archives: Path, on_line: OnLine, *options: str) -> None:
    # NoLocking: a download does not change dpkg's files, so its lock is not needed. Sandbox::User: run as root, apt
    # would download as user _apt, who may not write here.
    settings = ["Debug::NoLocking=1", "APT::Sandbox::User=root", f"Dir::Cache::archives={archives}"]
    own_options = [word for setting in settings for word in ("-o", setting)]
    fetch = ["install", "--download-only", "-y", "--no-install-recommends"]
    run_tool(["apt-get", "-q", *options, *own_options, *fetch, *packages], on_line)


def _require_apt() -> None:
    if shutil.which("apt-get") is None:
        raise Unavailable("apt-get is not installed: this needs Debian or one of its derivatives")
