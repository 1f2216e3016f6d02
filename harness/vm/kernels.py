"""Find or fetch the kernel that a guest boots: Debian's package, a bzImage, a build tree.

A package is downloaded and unpacked into the cache, and never installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import Unavailable, UsageError
from harness.install.cache import building, locked
from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Mapping

APT_LISTS: Final = Path("/var/lib/apt/lists")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedKernel:
    """A kernel that has a name here: Debian's package that stands for the kernel of the day."""

    package: str
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLists:
    """The modules that go with every kernel; kernels.toml says what each list is for."""

    transport: tuple[str, ...]
    needed: tuple[str, ...]
    wanted: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """What kernels.toml holds beside the noise (kernel_log.py)."""

    default: str
    """The name of the kernel that is booted where none is asked for."""
    version_packages: tuple[str, ...]
    """Patterns of package names, which a version is put into."""
    kernels: Mapping[str, NamedKernel]
    modules: ModuleLists


def read_catalogue(path: Path) -> Catalogue:
    """Read kernels.toml; a mistake in it is a UsageError."""
    top = read_toml(path, path.name)
    kernels, modules = top.table("kernels"), top.table("modules")
    named = {name: kernels.table(name) for name in kernels.rest()}
    return Catalogue(
        default=top.text("default"),
        version_packages=top.words("version_packages"),
        kernels={
            name: NamedKernel(package=entry.text("package"), aliases=entry.words("aliases"))
            for name, entry in named.items()
        },
        modules=ModuleLists(
            transport=modules.words("transport"), needed=modules.words("needed"), wanted=modules.words("wanted")
        ),
    )


CATALOGUE: Final = read_catalogue(Path(__file__).resolve().parent / "kernels.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel to boot."""

    release: str
    """As `uname -r` says it in the guest."""
    image: Path
    modules: Path | None
    """Where its modules lie, at any depth; None if it came without."""
    builtin: frozenset[str] | None
    """The modules built into it; None where nothing tells."""

    def identity(self) -> str:
        """Changes whenever another kernel lies at the same path, or the same without its modules."""
        found = self.image.stat()
        stamp = f"{self.image} {found.st_size} {found.st_mtime_ns} {self.modules}"
        return f"{self.release}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"


def find(which: str, cache: Path) -> Kernel:
    """The kernel that `which` names: a name or alias of kernels.toml, a version, a bzImage, or a build tree."""
    path = Path(which)
    if path.is_dir():
        return from_build_tree(path)
    if path.is_file():
        return Kernel(release=release_of(path), image=path.resolve(), modules=None, builtin=None)
    if "/" in which:
        raise UsageError(f"kernel {which}: no such file or folder")
    return from_package(find_package(which, cache), cache)


def from_build_tree(tree: Path) -> Kernel:
    image = tree / "arch/x86/boot/bzImage"
    if not image.is_file():
        raise UsageError(f"kernel {tree}: not built for x86 yet, it has no {image.relative_to(tree)}")
    return Kernel(release=release_of(image), image=image.resolve(), modules=tree, builtin=read_builtin(tree))


def release_of(image: Path) -> str:
    """The release that a bzImage names in its header (Documentation/arch/x86/boot.rst, kernel_version)."""
    head = image.read_bytes()[:0x10000]
    if head[0x202:0x206] != b"HdrS":
        raise UsageError(f"kernel {image}: not a bzImage, it has no boot header")
    start = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    return head[start : head.index(b"\0", start)].split(b" ")[0].decode()


def read_builtin(folder: Path) -> frozenset[str] | None:
    listing = folder / "modules.builtin"
    if not listing.is_file():
        return None
    return frozenset(module_name(line) for line in listing.read_text().split())


def module_name(path: str | Path) -> str:
    """The kernel's name for the module in this file: `sch-netem.ko.xz` is `sch_netem`."""
    return Path(path).name.partition(".ko")[0].replace("-", "_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One version of a Debian package, as apt describes it."""

    name: str
    version: str
    sha256: str

    def folder(self, cache: Path) -> Path:
        return cache / "kernels" / f"{self.name}_{self.version.replace(':', '%3a')}_{self.sha256[:12]}"


def find_package(which: str, cache: Path) -> Package:
    """The package that `which` stands for; apt is asked again only when its lists have changed."""
    notes = cache / "kernels" / "resolved.json"
    known: dict[str, list[str]] = json.loads(notes.read_text()) if notes.exists() else {}
    stamp = str(APT_LISTS.stat().st_mtime_ns) if APT_LISTS.exists() else ""
    if which in known and known[which][0] == stamp:
        return recall(known[which])
    try:
        package = ask_apt(which)
    except UsageError:
        # Images of containers come with apt's lists removed; what was fetched before is still good.
        if which not in known:
            raise
        return recall(known[which])
    known[which] = [stamp, package.name, package.version, package.sha256]
    notes.parent.mkdir(parents=True, exist_ok=True)
    partial = notes.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(known, indent=1))
    partial.replace(notes)
    return package


def recall(note: list[str]) -> Package:
    return Package(name=note[1], version=note[2], sha256=note[3])


def ask_apt(which: str) -> Package:
    for name in candidate_names(which):
        record = apt_record(name)
        # A package without a kernel of its own depends on the one that has it.
        depends = re.search(r"\b(linux-image-\d[^ ,]*)", record.get("Depends", ""))
        if depends:
            record = apt_record(depends[1])
        if record:
            return Package(name=record["Package"], version=record["Version"], sha256=record["SHA256"])
    names = ", ".join(CATALOGUE.kernels)
    raise UsageError(
        f"kernel {which}: neither a file nor a package that apt knows (names: {names}; apt-get update renews the list)"
    )


def candidate_names(which: str) -> list[str]:
    """The packages that may be meant, the likeliest first."""
    for name, entry in CATALOGUE.kernels.items():
        if which == name or which in entry.aliases:
            return [entry.package]
    if which.startswith("linux-image-"):
        return [which]
    return [pattern.format(which) for pattern in CATALOGUE.version_packages]


def apt_record(package: str) -> dict[str, str]:
    """What apt's lists say of a package; empty if it is not in them."""
    command = ["apt-cache", "show", "--no-all-versions", package]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        raise Unavailable("kernels by name need apt; give a bzImage or a build tree instead") from None
    return dict(re.findall(r"^([A-Z][A-Za-z0-9-]*): (.*)$", listing.partition("\n\n")[0], re.MULTILINE))


def from_package(package: Package, cache: Path) -> Kernel:
    folder = package.folder(cache)
    if not folder.exists():
        unpack(package, folder)
    images = sorted(folder.glob("boot/vmlinuz-*"))
    if not images:
        raise UsageError(f"kernel {package.name}: the package holds no kernel")
    modules = next(folder.glob("lib/modules/*"), None)
    builtin = read_builtin(modules) if modules else None
    return Kernel(release=release_of(images[0]), image=images[0], modules=modules, builtin=builtin)


def unpack(package: Package, folder: Path) -> None:
    """Download and unpack a package into `folder`, which appears only when it is complete."""
    with locked(folder):
        if folder.exists():
            return
        with building(folder) as part:
            # As root apt would hand the download to a user that cannot write here.
            sandbox = ["-o", "APT::Sandbox::User=root"]
            run(["apt-get", *sandbox, "download", f"{package.name}={package.version}"], part)
            archive = next(part.glob("*.deb"))
            if hashlib.sha256(archive.read_bytes()).hexdigest() != package.sha256:
                raise Unavailable(f"kernel {package.name}: the download is not what apt's list names (SHA-256 differs)")
            run(["dpkg-deb", "-x", archive.name, "."], part)
            archive.unlink()


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no message"]
        raise Unavailable(f"{' '.join(command)} failed: {words[-1]}")
