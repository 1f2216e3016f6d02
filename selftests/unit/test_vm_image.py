"""What the guest's root takes along: files at their own paths, links as links, compiled Python only if current."""

from __future__ import annotations

import os
import py_compile
import sys
from typing import TYPE_CHECKING

import pytest

from ci.vm_image import Tree, closure, is_current

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/libx.so.1.2").write_bytes(b"\x7fELF")
    (tmp_path / "usr/lib/libx.so.1").symlink_to("libx.so.1.2")
    (tmp_path / "lib").symlink_to("usr/lib")
    return tmp_path


def test_file_behind_links_comes_with_each_of_them(place: Path) -> None:
    tree = Tree()
    tree.add(place / "lib/libx.so.1")
    assert tree.members == {
        place / "lib": "usr/lib",
        place / "usr/lib/libx.so.1": "libx.so.1.2",
        place / "usr/lib/libx.so.1.2": place / "usr/lib/libx.so.1.2",
    }


@pytest.mark.parametrize(
    "mode", [py_compile.PycInvalidationMode.TIMESTAMP, py_compile.PycInvalidationMode.CHECKED_HASH]
)
def test_compiled_file_of_this_source_is_current(tmp_path: Path, mode: py_compile.PycInvalidationMode) -> None:
    source = tmp_path / "m.py"
    source.write_text("x = 1\n")
    compiled = tmp_path / "m.pyc"
    py_compile.compile(str(source), str(compiled), invalidation_mode=mode)
    assert is_current(compiled, source)


@pytest.mark.parametrize("change", ["time", "size", "magic"])
def test_compiled_file_of_another_source_or_python_is_stale(tmp_path: Path, change: str) -> None:
    source = tmp_path / "m.py"
    source.write_text("x = 1\n")
    compiled = tmp_path / "m.pyc"
    py_compile.compile(str(source), str(compiled))
    if change == "time":
        os.utime(source, (1, 1))
    elif change == "size":
        stamp = source.stat().st_mtime_ns
        source.write_text("x = 22\n")
        os.utime(source, ns=(stamp, stamp))
    else:
        compiled.write_bytes(b"\0" * 4 + compiled.read_bytes()[4:])
    assert not is_current(compiled, source)


def test_source_takes_its_current_compiled_forms_along(tmp_path: Path) -> None:
    source = tmp_path / "m.py"
    source.write_text("x = 1\n")
    compiled = py_compile.compile(str(source), doraise=True)
    (tmp_path / "__pycache__" / f"m.{sys.implementation.cache_tag}-pytest-9.pyc").write_bytes(b"stale" * 10)
    tree = Tree()
    tree.add_python(source)
    assert [str(path) for path in tree.members] == [str(source), compiled]


def test_guest_gets_what_the_tests_import_and_not_what_only_developers_use() -> None:
    found = closure("wg-interop", ("", "test"))
    assert {"wg-interop", "pyroute2", "pytest", "pluggy", "cffi"} <= found
    assert not {"mypy", "ruff", "pre-commit"} & found
