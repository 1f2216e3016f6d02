"""Build the guest's root: this Python, our code, packages and tools, at equal paths.

All paths in the guest are those of the host, so scripts, `.pth` files, compiled Python, arguments and reports are valid
in both. The root consists of three archives (cpio.py): the base (built once, kept in the cache), the kernel's modules
(modules.py), and our own code with the files of one run.
"""

from __future__ import annotations

import compileall
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from packaging.requirements import Requirement

from harness import suite
from harness.errors import Unavailable
from harness.install.packages import install_command
from harness.tables import read_toml
from harness.vm import bytecode
from harness.vm.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

HERE: Final = Path(__file__).resolve().parent
# The packages of this distribution, below `suite.PACKAGES`.
OWN: Final = ("harness", "refwg")
DISTRIBUTION: Final = "wg-interop"
EXTRAS: Final = ("", "test")
KEPT_IMAGES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RootContents:
    """The content of image.toml; its comments give the reasons."""

    needed_tools: Mapping[str, str]
    """Required programs -> the Debian package that contains each."""
    wanted_tools: tuple[str, ...]
    """Programs that are copied if the host has them."""
    files: tuple[str, ...]
    libraries: tuple[str, ...]
    left_out: tuple[str, ...]
    """Names of files and folders of Python's standard library that are not copied."""
    code_only: tuple[str, ...]
    """Names of distributions of which only Python files are copied."""
    without: tuple[str, ...]
    """Names of distributions that are not copied."""
    etc: Mapping[str, str]
    """File names below /etc -> content."""


def read_contents(path: Path) -> RootContents:
    """Read image.toml; UsageError for a mistake in it."""
    top = read_toml(path, path.name)
    tools, python = top.table("tools"), top.table("python")
    return RootContents(
        needed_tools=tools.strings("needed"),
        wanted_tools=tools.words("wanted"),
        files=tools.words("files"),
        libraries=tools.words("libraries"),
        left_out=python.words("left_out"),
        code_only=python.words("code_only"),
        without=python.words("without"),
        etc=top.strings("etc"),
    )


CONTENTS: Final = read_contents(HERE / "image.toml")


class Tree:
    """Host files to copy to the same path in the guest, and the symlinks on the way to them.

    members: path in the guest -> file on the host, or target of a symlink.
    """

    def __init__(self) -> None:
        self.members: dict[Path, Path | str] = {}

    def add(self, path: Path) -> None:
        """Add an absolute path: every symlink on the way, and the file it leads to."""
        prefix = Path("/")
        for number, part in enumerate(path.parts[1:], start=1):
            prefix /= part
            if prefix.is_symlink():
                target = str(prefix.readlink())
                self.members[prefix] = target
                self.add(Path(os.path.normpath(prefix.parent.joinpath(target, *path.parts[number + 1 :]))))
                return
        self.members[path] = path

    def add_python(self, path: Path, prefix: Path) -> None:
        """Add a source file and its valid compiled files (bytecode.py); prefix: see bytecode.forms."""
        self.add(path)
        for compiled in bytecode.forms(path, prefix):
            self.members[path.parent.resolve() / "__pycache__" / compiled.name] = compiled

    def add_libraries(self) -> None:
        """Add the shared libraries of all programs and extension modules added so far (ldd(1))."""
        programs = [str(file) for file in self.members.values() if isinstance(file, Path) and is_elf(file)]
        if not programs:
            return
        listing = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
        for library in sorted(set(re.findall(r"(/\S+) \(0x", listing))):
            self.add(Path(library))

    def write(self, archive: Archive) -> None:
        """Write all members into an archive."""
        for path, content in self.members.items():
            if isinstance(content, str):
                archive.symlink(str(path), content)
            else:
                archive.copy(str(path), content)


def is_elf(path: Path) -> bool:
    """Return whether a file is a program or shared library, by its first four bytes (elf(5))."""
    with path.open("rb") as content:
        return content.read(4) == b"\x7fELF"


def base(cache: Path) -> Path:
    """Return the archive of all files that are the same in every run; build it if one of them has changed.

    Raises Unavailable if a required program is missing.
    """
    tools = find_tools()
    image = cache / "images" / f"{base_key(tools)}.cpio"
    if image.exists():
        os.utime(image)
        return image
    image.parent.mkdir(parents=True, exist_ok=True)
    tree = base_tree(tools, cache / "pycache")
    partial = image.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as out, Archive(out) as archive:
        write_skeleton(archive)
        tree.write(archive)
    partial.replace(image)
    forget_old(image.parent)
    return image


def forget_old(folder: Path) -> None:
    """Delete all archives but the KEPT_IMAGES last used."""
    newest_first = sorted(folder.glob("*.cpio"), key=lambda image: image.stat().st_mtime, reverse=True)
    for image in newest_first[KEPT_IMAGES:]:
        image.unlink(missing_ok=True)


def find_tools() -> list[Path]:
    """Find the programs of image.toml; Unavailable names the packages to install if a required one is missing."""
    path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    needed = CONTENTS.needed_tools
    programs = {name: shutil.which(name, path=path) for name in [*needed, *CONTENTS.wanted_tools]}
    missing = sorted({package for name, package in needed.items() if not programs[name]})
    if missing:
        raise Unavailable(f"a guest needs programs that are not installed: {install_command(missing)}")
    return [Path(program) for program in programs.values() if program]


def base_key(tools: Iterable[Path]) -> str:
    """Hash everything that the base is made from: image.toml, this code, the interpreter, its packages, the tools."""
    key = hashlib.sha256()
    for source in (
        __file__,
        HERE / "bytecode.py",
        HERE / "cpio.py",
        HERE / "image.toml",
    ):
        key.update(Path(source).read_bytes())
    for distribution in sorted(closure(DISTRIBUTION, EXTRAS)):
        key.update(f"{distribution} {importlib.metadata.version(distribution)}\n".encode())
    packages = Path(sysconfig.get_path("purelib"))
    key.update(f"{sys.version} {sys.prefix} {sys.base_prefix} {packages.stat().st_mtime_ns}".encode())
    for path in (Path(sys.executable).resolve(), *tools):
        status = path.stat()
        key.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return key.hexdigest()[:24]


def base_tree(tools: Iterable[Path], prefix: Path) -> Tree:
    """Collect the files of the base; prefix: folder for compiled files (bytecode.py)."""
    files = [*standard_library(), *packages()]
    # Some package managers (uv) do not compile on installation.
    site = sysconfig.get_path("purelib")
    if os.access(site, os.W_OK):
        compileall.compile_dir(site, quiet=2, workers=0)
    else:
        bytecode.compile_imports((path for path in files if path.suffix == ".py"), prefix)
    # HERE contains no tests: this run of pytest rewrites only its plugins.
    bytecode.collect([HERE], prefix, suite.root(), suite.pytest_options())
    tree = Tree()
    for path in (*tools, Path(sys.executable), *interpreter_links()):
        tree.add(path)
    for path in files:
        if path.suffix == ".py":
            tree.add_python(path, prefix)
        else:
            tree.add(path)
    for path in map(Path, CONTENTS.files):
        for member in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if member.is_file():
                tree.add(member)
    for library in find_libraries(CONTENTS.libraries):
        tree.add(library)
    tree.add_libraries()
    return tree


def interpreter_links() -> Iterator[Path]:
    """Yield the files of a virtual environment besides its packages: pyvenv.cfg and its names of the interpreter."""
    if sys.prefix == sys.base_prefix:
        return
    yield Path(sys.prefix, "pyvenv.cfg")
    for name in ("python", "python3"):
        yield Path(sys.prefix, "bin", name)


def standard_library() -> Iterator[Path]:
    """Yield the files of Python's standard library, without those that image.toml leaves out."""
    left_out = {*CONTENTS.left_out, "__pycache__"}
    for root in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars={"platbase": sys.base_prefix})}:
        # config-3.11-x86_64-linux-gnu (24 MB) is only needed to embed Python in another program.
        paths = walk(root, lambda name: name in left_out or name.startswith("config-"))
        yield from (path for path in paths if path.suffix not in {".a", ".pyc"})


def packages() -> Iterator[Path]:
    """Yield the installed files of the distributions that ours depends on, without those of image.toml.

    Of our own only the scripts and the dist-info: `write_project` writes its code.
    """
    own = tuple(suite.PACKAGES / name for name in (*OWN, suite.FOLDER))
    for distribution in sorted(closure(DISTRIBUTION, EXTRAS) - {*CONTENTS.without}):
        code_only = distribution in CONTENTS.code_only
        for file in importlib.metadata.distribution(distribution).files or ():
            path = Path(os.path.normpath(str(file.locate())))
            wanted = path.suffix == ".py" or ".dist-info" in str(file) if code_only else path.suffix != ".pyc"
            if wanted and path.is_file() and not any(path.is_relative_to(folder) for folder in own):
                yield path


def closure(name: str, extras: tuple[str, ...]) -> set[str]:
    """Return the names of all distributions that `name` with `extras` depends on here, and `name` itself.

    Those that are not installed are left out: a user has no use for the packages of an extra.
    """
    names: set[str] = set()
    todo = [(name, extras)]
    while todo:
        name, extras = todo.pop()
        try:
            lines = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        names.add(name)
        for line in lines:
            requirement = Requirement(line)
            wanted = not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
            if wanted and requirement.name not in names:
                todo.append((requirement.name, ("", *requirement.extras)))
    return names


def find_libraries(names: Iterable[str]) -> Iterator[Path]:
    """Yield the paths at which the dynamic linker finds these libraries (`ldconfig -p`); unknown names are skipped."""
    table = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    for name in names:
        match = re.search(rf"^\s{re.escape(name)} \(libc6,x86-64.*\) => (/\S+)$", table, re.MULTILINE)
        if match:
            yield Path(match[1])


def write_skeleton(archive: Archive) -> None:
    """Write the folders, the device and the files of /etc that exist in every guest."""
    for folder in ("dev", "etc", "lab", "proc", "root", "run/netns", "run/wireguard", "sys", "var"):
        archive.directory(folder)
    archive.directory("tmp", permissions=0o1777)
    archive.symlink("var/run", "/run")
    archive.character_device("dev/console", 5, 1)
    for name, text in CONTENTS.etc.items():
        archive.file(f"etc/{name}", text.encode())


def write_project(archive: Archive, extra: Iterable[tuple[Path, str]], cache: Path, *, tests: bool) -> None:
    """Write our packages and the suite as they are now, and the files of `extra`.

    extra: (host path, guest path) of files and folders. cache: folder for compiled files. tests: the guest runs pytest,
    so let pytest rewrite its tests here.
    """
    tree, prefix, paths = Tree(), cache / "pycache", project_files()
    sources = [path for path in paths if path.suffix == ".py"]
    bytecode.compile_imports(sources, prefix)
    if tests:
        bytecode.rewrite_tests(sources, prefix, suite.root(), suite.pytest_options())
    for path in paths:
        tree.add(path)
    for path in sources:
        tree.add_python(path, prefix)
    tree.write(archive)
    extra_tree(extra).write(archive)


def extra_tree(extra: Iterable[tuple[Path, str]]) -> Tree:
    """Collect files and folders for other paths in the guest, and the shared libraries of the programs among them."""
    tree = Tree()
    for source, target in extra:
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file():
                tree.members[Path(target, path.relative_to(source))] = path
    tree.add_libraries()
    return tree


def project_files() -> list[Path]:
    """List the files of our packages and of the suite, and pytest's configuration; no hidden and no compiled ones."""
    tops = (*(suite.PACKAGES / name for name in OWN), suite.root() / suite.FOLDER)
    config = suite.config_file()
    found = {path for top in tops for path in walk(top, lambda name: name.startswith(".") or name == "__pycache__")}
    return sorted(found | ({config} if config else set()))


def walk(top: str | Path, leave_out: Callable[[str], bool]) -> Iterator[Path]:
    """Yield the files below `top`, without folders for whose name `leave_out` returns True."""
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if not leave_out(name))
        yield from (Path(folder, name) for name in sorted(files))
