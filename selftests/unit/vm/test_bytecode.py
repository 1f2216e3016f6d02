"""Check the compiled Python for a guest: accepted by its imports, rewritten by pytest."""

from __future__ import annotations

import os
import py_compile
from py_compile import PycInvalidationMode as Mode
from typing import TYPE_CHECKING

import pytest

from harness.vm.bytecode import compile_imports, forms, is_current, is_rewritten, rewrite_tests

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "test_m.py"
    path.write_text("def test_one() -> None:\n    assert True\n")
    return path


@pytest.fixture
def compiled(source: Path) -> Path:
    return source.with_suffix(".pyc")


@pytest.mark.parametrize("mode", list(Mode))
def test_compiled_file_of_this_source_is_current(source: Path, compiled: Path, mode: Mode) -> None:
    py_compile.compile(str(source), str(compiled), invalidation_mode=mode)
    assert is_current(compiled, source)


@pytest.mark.parametrize(
    ("mode", "current"), [(Mode.TIMESTAMP, False), (Mode.CHECKED_HASH, True), (Mode.UNCHECKED_HASH, True)]
)
def test_new_source_time_makes_only_timestamp_pyc_stale(
    source: Path, compiled: Path, mode: Mode, current: bool
) -> None:
    py_compile.compile(str(source), str(compiled), invalidation_mode=mode)
    os.utime(source, (1, 1))
    assert is_current(compiled, source) is current


@pytest.mark.parametrize(
    ("mode", "current"), [(Mode.TIMESTAMP, False), (Mode.CHECKED_HASH, False), (Mode.UNCHECKED_HASH, True)]
)
def test_new_source_content_leaves_only_unchecked_pyc_current(
    source: Path, compiled: Path, mode: Mode, current: bool
) -> None:
    py_compile.compile(str(source), str(compiled), invalidation_mode=mode)
    stamp = source.stat().st_mtime_ns
    source.write_text("x = 22\n")
    os.utime(source, ns=(stamp, stamp))
    assert is_current(compiled, source) is current


def test_compiled_file_of_another_python_is_stale(source: Path, compiled: Path) -> None:
    py_compile.compile(str(source), str(compiled))
    compiled.write_bytes(b"\0" * 4 + compiled.read_bytes()[4:])
    assert not is_current(compiled, source)


def test_checkout_stays_unchanged_when_imports_are_compiled(source: Path, tmp_path: Path) -> None:
    compile_imports([source], tmp_path / "prefix")
    assert len(list(forms(source, tmp_path / "prefix"))) == 1
    assert not (tmp_path / "__pycache__").exists()


def test_pytest_rewrites_test_file_once(source: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    rewrite_tests([source], prefix, tmp_path)
    assert is_rewritten(source, prefix)
    before = [path.stat().st_mtime_ns for path in forms(source, prefix)]
    rewrite_tests([source], prefix, tmp_path)
    assert [path.stat().st_mtime_ns for path in forms(source, prefix)] == before
