"""Build the guest's root: this Python, the project, packages and tools, at equal paths.

Equal paths inside and outside need no rewriting: scripts, `.pth` files, compiled Python, arguments and reports hold as
they are. Three archives (cpio.py) make up the root: the base (built once, kept in the cache), the kernel's modules
(modules.py), and the project with what one run needs.
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

from harness.errors import Unavailable
from harness.tables import read_toml
from harness.vm import bytecode
from harness.vm.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

HERE: Final = Path(__file__).resolve().parent
PROJECT: Final = HERE.parents[1]
DISTRIBUTION: Final = "wg-interop"
EXTRAS: Final = ("", "test")
KEPT_IMAGES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RootContents:
    """What image.toml says the root holds; its comments tell why."""

    needed_tools: Mapping[str, str]
    """Programs that must be there, each with the Debian package that brings it."""
    wanted_tools: tuple[str, ...]
    files: tuple[str, ...]
    libraries: tuple[str, ...]
    left_out: tuple[str, ...]
    """Names of files and folders of Python's library."""
    code_only: tuple[str, ...]
    """Names of distributions."""
    etc: Mapping[str, str]
    """Contents of files below /etc, by name."""


def read_contents(path: Path) -> RootContents:
    """Read image.toml; a mistake in it is a UsageError."""
    top = read_toml(path, path.name)
    tools, python = top.table("tools"), top.table("python")
    return RootContents(
        needed_tools=tools.strings("needed"),
        wanted_tools=tools.words("wanted"),
        files=tools.words("files"),
        libraries=tools.words("libraries"),
        left_out=python.words("left_out"),
        code_only=python.words("code_only"),
        etc=top.strings("etc"),
    )


CONTENTS: Final = read_contents(HERE / "image.toml")


class Tree:
    """Host files that keep their path in the guest, with the symlinks by which they are reached."""

    def __init__(self) -> None:
        self.members: dict[Path, Path | str] = {}

    def add(self, path: Path) -> None:
        here = Path("/")
        for number, part in enumerate(path.parts[1:], start=1):
            here /= part
            if here.is_symlink():
                target = str(here.readlink())
                self.members[here] = target
                self.add(Path(os.path.normpath(here.parent.joinpath(target, *path.parts[number + 1 :]))))
                return
        self.members[path] = path

    def add_python(self, path: Path, prefix: Path) -> None:
        """Add a source file, and beside it its compiled forms (bytecode.py)."""
        self.add(path)
        for compiled in bytecode.forms(path, prefix):
            self.members[path.parent.resolve() / "__pycache__" / compiled.name] = compiled

    def add_libraries(self) -> None:
        """Add the shared libraries that the programs and extension modules so far need."""
        programs = [str(file) for file in self.members.values() if isinstance(file, Path) and is_elf(file)]
        if not programs:
            return
        listing = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
        for library in sorted(set(re.findall(r"(/\S+) \(0x", listing))):
            self.add(Path(library))

    def write(self, archive: Archive) -> None:
        for path, content in self.members.items():
            if isinstance(content, str):
                archive.symlink(str(path), content)
            else:
                archive.copy(str(path), content)


def is_elf(path: Path) -> bool:
    with path.open("rb") as content:
        return content.read(4) == b"\x7fELF"


def base(cache: Path) -> Path:
    """The archive of everything that stays the same between runs; built now if anything in it has changed."""
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
    newest_first = sorted(folder.glob("*.cpio"), key=lambda image: image.stat().st_mtime, reverse=True)
    for image in newest_first[KEPT_IMAGES:]:
        image.unlink(missing_ok=True)


def find_tools() -> list[Path]:
    """Where the programs of image.toml lie; lacking one that is needed, say which package to install."""
    path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    needed = CONTENTS.needed_tools
    found = {name: shutil.which(name, path=path) for name in [*needed, *CONTENTS.wanted_tools]}
    missing = sorted({package for name, package in needed.items() if not found[name]})
    if missing:
        raise Unavailable(f"the guest lacks programs; install them: apt-get install {' '.join(missing)}")
    return [Path(where) for where in found.values() if where]


def base_key(tools: Iterable[Path]) -> str:
    """A hash of all that decides what the base holds: image.toml, the interpreter, its packages, the tools."""
    key = hashlib.sha256()
    for source in (
        __file__,
        HERE / "bytecode.py",
        HERE / "cpio.py",
        HERE / "image.toml",
        PROJECT / "requirements.lock",
    ):
        key.update(Path(source).read_bytes())
    packages = Path(sysconfig.get_path("purelib"))
    key.update(f"{sys.version} {sys.prefix} {sys.base_prefix} {packages.stat().st_mtime_ns}".encode())
    for path in (Path(sys.executable).resolve(), *tools):
        found = path.stat()
        key.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
    return key.hexdigest()[:24]


def base_tree(tools: Iterable[Path], prefix: Path) -> Tree:
    # A package manager may have left the compiling to the first import.
    compileall.compile_dir(sysconfig.get_path("purelib"), quiet=2, workers=0)
    # There is no test here: this is for pytest's plugins.
    bytecode.collect([HERE], prefix, PROJECT)
    tree = Tree()
    for path in (*tools, Path(sys.executable), *interpreter_links()):
        tree.add(path)
    for path in (*standard_library(), *packages()):
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
    """The virtual environment's other names for its interpreter, and the file that makes it one."""
    if sys.prefix == sys.base_prefix:
        return
    yield Path(sys.prefix, "pyvenv.cfg")
    for name in ("python", "python3"):
        yield Path(sys.prefix, "bin", name)


def standard_library() -> Iterator[Path]:
    left_out = {*CONTENTS.left_out, "__pycache__"}
    for root in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars={"platbase": sys.base_prefix})}:
        # config-3.11-x86_64-linux-gnu is what one needs to embed Python: 24 MB.
        found = walk(root, lambda name: name in left_out or name.startswith("config-"))
        yield from (path for path in found if path.suffix not in {".a", ".pyc"})


def packages() -> Iterator[Path]:
    """The files of all that the project and its tests depend on, as installed here."""
    for distribution in sorted(closure(DISTRIBUTION, EXTRAS)):
        code_only = distribution in CONTENTS.code_only
        for file in importlib.metadata.distribution(distribution).files or ():
            path = Path(os.path.normpath(str(file.locate())))
            wanted = path.suffix == ".py" or ".dist-info" in str(file) if code_only else path.suffix != ".pyc"
            if wanted and path.is_file():
                yield path


def closure(name: str, extras: tuple[str, ...]) -> set[str]:
    """The names of the distributions that `name` with `extras` needs here, itself included."""
    found: set[str] = set()
    todo = [(name, extras)]
    while todo:
        name, extras = todo.pop()
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            wanted = not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
            if wanted and requirement.name not in found:
                todo.append((requirement.name, ("", *requirement.extras)))
    return found


def find_libraries(names: Iterable[str]) -> Iterator[Path]:
    """Where the dynamic linker finds libraries of these names, by its own table."""
    table = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    for name in names:
        found = re.search(rf"^\s{re.escape(name)} \(libc6,x86-64.*\) => (/\S+)$", table, re.MULTILINE)
        if found:
            yield Path(found[1])


def write_skeleton(archive: Archive) -> None:
    for folder in ("dev", "etc", "lab", "proc", "root", "run/netns", "run/wireguard", "sys", "var"):
        archive.directory(folder)
    archive.directory("tmp", permissions=0o1777)
    archive.symlink("var/run", "/run")
    archive.character_device("dev/console", 5, 1)
    for name, text in CONTENTS.etc.items():
        archive.file(f"etc/{name}", text.encode())


def write_project(archive: Archive, extra: Iterable[tuple[Path, str]], cache: Path, *, tests: bool) -> None:
    """The checkout as it is now, uncommitted and untracked files too, and each `(host path, guest path)` of `extra`.

    tests: pytest is to run, so its rewritten tests are worth their making.
    """
    tree, prefix, paths = Tree(), cache / "pycache", project_files()
    sources = [path for path in paths if path.suffix == ".py"]
    bytecode.compile_imports(sources, prefix)
    if tests:
        bytecode.rewrite_tests(sources, prefix, PROJECT)
    for path in paths:
        tree.add(path)
    for path in sources:
        tree.add_python(path, prefix)
    tree.write(archive)
    extra_tree(extra).write(archive)


def extra_tree(extra: Iterable[tuple[Path, str]]) -> Tree:
    """Files and folders at other paths, and the shared libraries that programs among them need."""
    tree = Tree()
    for source, where in extra:
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file():
                tree.members[Path(where, path.relative_to(source))] = path
    tree.add_libraries()
    return tree


def project_files() -> list[Path]:
    """What git would have in the checkout; of a tree that git does not answer for, all but what is hidden."""
    listing = ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        found = walk(PROJECT, lambda name: name.startswith(".") or name == "__pycache__")
        # Only the one at the top is a run's report; harness/report is code.
        return sorted(path for path in found if path.relative_to(PROJECT).parts[0] != "report")
    return [path for name in names if name and (path := PROJECT / name).is_file()]


def walk(top: str | Path, leave_out: Callable[[str], bool]) -> Iterator[Path]:
    """The files below `top`, without the folders whose name says to leave them out."""
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if not leave_out(name))
        yield from (Path(folder, name) for name in sorted(files))
