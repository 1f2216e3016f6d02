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
    """A kernel that kernels.toml names. package: a Debian package that depends on the current kernel's package."""

    package: str
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLists:
    """The modules that guests load; kernels.toml explains each list."""

    transport: tuple[str, ...]
    needed: tuple[str, ...]
    wanted: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """The content of kernels.toml, except `noise` (kernel_log.py)."""

    default: str
    """The name of the kernel that boots without `--kernel`."""
    version_packages: tuple[str, ...]
    """Patterns of package names, with {} for a version."""
    kernels: Mapping[str, NamedKernel]
    modules: ModuleLists


def read_catalogue(path: Path) -> Catalogue:
    """Read kernels.toml; UsageError for a mistake in it."""
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
    """As `uname -r` prints it in the guest."""
    image: Path
    modules: Path | None
    """Folder with its modules, at any depth; None for a bzImage alone."""
    builtin: frozenset[str] | None
    """Names of the modules built into it; None if that is unknown."""
    replaced: tuple[Path, ...] = ()
    """Files of modules to load instead of the kernel's own ones."""

    def identity(self) -> str:
        """Return a name for caches, which differs for another kernel at the same path or with other modules."""
        files = [(path, path.stat()) for path in (self.image, *self.replaced)]
        stamp = " ".join(f"{path} {status.st_size} {status.st_mtime_ns}" for path, status in files)
        stamp += f" {self.modules}"
        return f"{self.release}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"


def find(which: str, cache: Path) -> Kernel:
    """Find a kernel, and download it if it is a package that the cache lacks.

    which: a name or alias of kernels.toml, a version that apt has, a package name, the path of a bzImage or of a
    build tree. cache: folder for packages. Raises UsageError if there is no such kernel, Unavailable if a download
    fails.
    """
    path = Path(which)
    if path.is_dir():
        return from_build_tree(path)
    if path.is_file():
        return Kernel(release=release_of(path), image=path.resolve(), modules=None, builtin=None)
    if "/" in which:
        raise UsageError(f"kernel {which}: no such file or folder")
    return from_package(find_package(which, cache), cache)


def from_build_tree(tree: Path) -> Kernel:
    """Return the kernel of a build tree; UsageError if it has not been built."""
    image = tree / "arch/x86/boot/bzImage"
    if not image.is_file():
        raise UsageError(f"kernel {tree}: not built for x86 yet, it has no {image.relative_to(tree)}")
    return Kernel(release=release_of(image), image=image.resolve(), modules=tree, builtin=read_builtin(tree))


def release_of(image: Path) -> str:
    """Read the release from a bzImage's header (kernel_version in Documentation/arch/x86/boot.rst)."""
    head = image.read_bytes()[:0x10000]
    if head[0x202:0x206] != b"HdrS":
        raise UsageError(f"kernel {image}: not a bzImage, it has no boot header")
    start = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    return head[start : head.index(b"\0", start)].split(b" ")[0].decode()


def read_builtin(folder: Path) -> frozenset[str] | None:
    """Read the names of built-in modules from modules.builtin; None if the folder has no such file."""
    listing = folder / "modules.builtin"
    if not listing.is_file():
        return None
    return frozenset(module_name(line) for line in listing.read_text().split())


def module_name(path: str | Path) -> str:
    """Return the kernel's name of the module in a file: `sch_netem` for `sch-netem.ko.xz`."""
    return Path(path).name.partition(".ko")[0].replace("-", "_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One version of a Debian package, as apt describes it."""

    name: str
    version: str
    sha256: str

    def folder(self, cache: Path) -> Path:
        """Return the folder of the cache into which the package is unpacked."""
        return cache / "kernels" / f"{self.name}_{self.version.replace(':', '%3a')}_{self.sha256[:12]}"


def find_package(which: str, cache: Path) -> Package:
    """Find the package for a name or version; apt is called again only when its lists have changed.

    Raises UsageError if apt has no such package.
    """
    resolved = cache / "kernels" / "resolved.json"
    known: dict[str, list[str]] = json.loads(resolved.read_text()) if resolved.exists() else {}
    stamp = str(APT_LISTS.stat().st_mtime_ns) if APT_LISTS.exists() else ""
    if which in known and known[which][0] == stamp:
        return recall(known[which])
    try:
        package = ask_apt(which)
    except UsageError:
        # Container images come without apt's lists; a package that was found earlier is still valid.
        if which not in known:
            raise
        return recall(known[which])
    known[which] = [stamp, package.name, package.version, package.sha256]
    resolved.parent.mkdir(parents=True, exist_ok=True)
    partial = resolved.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(known, indent=1))
    partial.replace(resolved)
    return package


def recall(entry: list[str]) -> Package:
    """Return the package of an entry of resolved.json: [stamp of apt's lists, name, version, SHA-256]."""
    return Package(name=entry[1], version=entry[2], sha256=entry[3])


def ask_apt(which: str) -> Package:
    """Look a name or version up in apt's lists; UsageError if there is no such package."""
    for name in candidate_names(which):
        record = apt_record(name)
        # A metapackage contains no kernel, but depends on the package that does.
        depends = re.search(r"\b(linux-image-\d[^ ,]*)", record.get("Depends", ""))
        if depends:
            record = apt_record(depends[1])
        if record:
            return Package(name=record["Package"], version=record["Version"], sha256=record["SHA256"])
    names = ", ".join(CATALOGUE.kernels)
    raise UsageError(
        f"kernel {which}: neither a file nor a package in apt's lists (names: {names}; apt-get update renews them)"
    )


def candidate_names(which: str) -> list[str]:
    """Return the names of packages that `which` may mean, the most likely first."""
    for name, entry in CATALOGUE.kernels.items():
        if which == name or which in entry.aliases:
            return [entry.package]
    if which.startswith("linux-image-"):
        return [which]
    return [pattern.format(which) for pattern in CATALOGUE.version_packages]


def apt_record(package: str) -> dict[str, str]:
    """Return the fields of a package from `apt-cache show`; empty for an unknown package.

    Raises Unavailable on a machine without apt.
    """
    command = ["apt-cache", "show", "--no-all-versions", package]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        raise Unavailable("apt-cache is not installed, so --kernel needs a bzImage or a build tree") from None
    return dict(re.findall(r"^([A-Z][A-Za-z0-9-]*): (.*)$", listing.partition("\n\n")[0], re.MULTILINE))


def from_package(package: Package, cache: Path) -> Kernel:
    """Return the kernel of a package, which is downloaded if the cache lacks it; UsageError if it contains none."""
    folder = package.folder(cache)
    if not folder.exists():
        unpack(package, folder)
    images = sorted(folder.glob("boot/vmlinuz-*"))
    if not images:
        raise UsageError(f"kernel {package.name}: the package contains no kernel")
    modules = next(folder.glob("lib/modules/*"), None)
    builtin = read_builtin(modules) if modules else None
    return Kernel(release=release_of(images[0]), image=images[0], modules=modules, builtin=builtin)


def unpack(package: Package, folder: Path) -> None:
    """Download and unpack a package into `folder`, which exists only once it is complete.

    Raises Unavailable if the download fails or has another hash than apt's list says.
    """
    with locked(folder):
        if folder.exists():
            return
        with building(folder) as part:
            # Run as root, apt would download as user _apt, who cannot write here.
            sandbox = ["-o", "APT::Sandbox::User=root"]
            run(["apt-get", *sandbox, "download", f"{package.name}={package.version}"], part)
            archive = next(part.glob("*.deb"))
            if hashlib.sha256(archive.read_bytes()).hexdigest() != package.sha256:
                raise Unavailable(f"kernel {package.name}: the download's SHA-256 differs from apt's; apt-get update")
            run(["dpkg-deb", "-x", archive.name, "."], part)
            archive.unlink()


def run(command: list[str], folder: Path) -> None:
    """Run a program in a folder; Unavailable, with the last line of its stderr, if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Unavailable(f"{' '.join(command)} failed: {lines[-1]}")
