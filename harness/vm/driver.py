"""Build the WireGuard module of a Debian kernel from Debian's source, with texts replaced.

Source, headers and kbuild come from the packages of the same version as the kernel. They are unpacked into the cache,
and not installed. A replacement puts a defect into the driver, so that a test can be seen to fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import Unavailable, UsageError
from harness.install.cache import building, locked
from harness.install.packages import install_command
from harness.vm import kernels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.vm.kernels import Package

_SOURCE: Final = Path("drivers", "net", "wireguard")
_MODULE: Final = "wireguard.ko"
_TOOLS: Final = {"make": "make", "objcopy": "binutils", "tar": "tar", "xz": "xz-utils"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A text that occurs once in a file of the driver, for example `receive.c`, and the text in its place."""

    file: str
    text: str
    replacement: str

    def applied_to(self, source: str) -> str:
        """Return the content of the file with the replacement. Raises UsageError unless it contains the text once."""
        if (times := source.count(self.text)) != 1:
            raise UsageError(f"{self.file} contains {self.text!r} {times} times, expected once")
        return source.replace(self.text, self.replacement)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """What a build needs. headers: the folder that `make -C` takes. source: the driver's unchanged files."""

    headers: Path
    source: Path
    compiler: str


def fetch(which: str, cache: Path) -> Tree:
    """Download and unpack what builds the driver of a kernel, if the cache lacks it.

    which: a name or alias of kernels.toml, a version, or a package name. Raises UsageError for a path, Unavailable if a
    program is missing or a download fails.
    """
    if "/" in which or Path(which).exists():
        raise UsageError(f"kernel {which}: only the driver of a Debian package can be built, not that of a path")
    image = kernels.find_package(which, cache)
    release = image.name.removeprefix("linux-image-")
    headers = kernels.apt_record(f"linux-headers-{release}")
    parts = re.findall(r"linux-headers-[^ ]+-common|linux-kbuild-[^ ,]+", headers.get("Depends", ""))
    compiler = re.search(r"\bgcc-\d+", headers.get("Depends", ""))
    if len(parts) != 2 or compiler is None:  # noqa: PLR2004 - the common headers, and kbuild
        raise Unavailable(f"apt does not know linux-headers-{release}: apt-get update")
    tools = {**_TOOLS, compiler[0]: compiler[0]}
    if missing := sorted({package for name, package in tools.items() if not shutil.which(name)}):
        raise Unavailable(f"to build a kernel module, {install_command(missing)}")
    folder = cache / "kernels" / f"driver-{release}_{image.version.replace(':', '%3a')}"
    names = [headers["Package"], *parts, f"linux-source-{'.'.join(release.split('.')[:2])}"]
    with locked(folder):
        if not folder.exists():
            with building(folder) as part:
                for name in names:
                    _unpack(name, image, part)
    return Tree(headers=folder / "usr" / "src" / headers["Package"], source=folder / _SOURCE, compiler=compiler[0])


def _unpack(name: str, image: Package, folder: Path) -> None:
    """Download one package into the folder, and unpack it there; of the kernel's source, only the driver."""
    # Run as root, apt would download as user _apt, who cannot write here.
    kernels.run(["apt-get", "-o", "APT::Sandbox::User=root", "download", f"{name}={image.version}"], folder)
    archive = next(folder.glob("*.deb"))
    kernels.run(["dpkg-deb", "-x", archive.name, "."], folder)
    archive.unlink()
    for source in folder.glob("usr/src/linux-source-*.tar.xz"):
        members = ["--strip-components=1", "--wildcards", f"*/{_SOURCE}"]
        kernels.run(["tar", "-xf", str(source), *members], folder)
        source.unlink()
    # The headers include the common ones by an absolute path.
    for makefile in folder.glob("usr/src/linux-headers-*/Makefile"):
        text = makefile.read_text()
        if text.startswith("include /usr/src/"):
            makefile.write_text(text.replace("include /usr/src/", "include $(dir $(lastword $(MAKEFILE_LIST)))../"))


def build(tree: Tree, changes: Sequence[Replacement], cache: Path) -> Path:
    """Return the module with these changes, without debug information; built once.

    Raises UsageError for a change that does not fit the source, Unavailable if the compiler refuses it.
    """
    sources = {
        str(path.relative_to(tree.source)): path.read_text() for path in tree.source.rglob("*") if path.is_file()
    }
    for change in changes:
        if change.file not in sources:
            raise UsageError(f"the driver's source has no file {change.file}")
        sources[change.file] = change.applied_to(sources[change.file])
    recipe = json.dumps([str(tree.headers), sources]).encode() + Path(__file__).read_bytes()
    target = cache / "vm" / "drivers" / f"{hashlib.sha256(recipe).hexdigest()[:24]}.ko"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = tree.headers.parent / "build"
    with locked(folder):
        # Only what differs from the last build is written, so that make compiles only that again.
        for name, content in sources.items():
            path = folder / name
            if not path.exists() or path.read_text() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
        _make(tree, folder)
        partial = target.with_suffix(f".{os.getpid()}")
        kernels.run(["objcopy", "--strip-debug", _MODULE, str(partial)], folder)
    partial.replace(target)
    return target


def _make(tree: Tree, folder: Path) -> None:
    command = ["make", "-C", str(tree.headers), f"M={folder}", "CONFIG_WIREGUARD=m", f"-j{os.cpu_count()}", "modules"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.splitlines()
        errors = [line for line in said if "error:" in line.lower()] or said[:1] or ["no message"]
        raise Unavailable(f"the driver does not compile: {errors[0]}")
