"""Check the guest's root: files at their paths, links as links, compiled Python in place."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from harness import suite
from harness.vm import image
from harness.vm.bytecode import compile_imports
from harness.vm.image import Tree, closure, extra_tree


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/libx.so.1.2").write_bytes(b"\x7fELF")
    (tmp_path / "usr/lib/libx.so.1").symlink_to("libx.so.1.2")
    (tmp_path / "lib").symlink_to("usr/lib")
    return tmp_path


def test_file_is_added_with_all_symlinks_on_its_path(place: Path) -> None:
    tree = Tree()
    tree.add(place / "lib/libx.so.1")
    assert tree.members == {
        place / "lib": "usr/lib",
        place / "usr/lib/libx.so.1": "libx.so.1.2",
        place / "usr/lib/libx.so.1.2": place / "usr/lib/libx.so.1.2",
    }


def test_compiled_python_is_added_in_pycache_of_its_source(tmp_path: Path) -> None:
    source, prefix = tmp_path / "m.py", tmp_path / "prefix"
    source.write_text("x = 1\n")
    compile_imports([source], prefix)
    tree = Tree()
    tree.add_python(source, prefix)
    names = {str(path.relative_to(tmp_path)) for path in tree.members}
    assert names == {"m.py", f"__pycache__/m.{sys.implementation.cache_tag}.pyc"}


def test_program_of_extra_tree_is_added_with_its_libraries(tmp_path: Path) -> None:
    ip = shutil.which("ip")
    assert ip is not None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "wg").write_bytes(Path(ip).read_bytes())
    members = extra_tree([(tmp_path / "mine", "/opt/mine")]).members
    assert members[Path("/opt/mine/wg")] == tmp_path / "mine/wg"
    assert "libmnl.so.0" in {path.name for path in members}


def test_guest_packages_include_test_but_not_developer_tools() -> None:
    packages = closure("wg-interop", ("", "test"))
    assert {"wg-interop", "pyroute2", "pytest", "pluggy", "cffi"} <= packages
    assert not {"mypy", "ruff", "pre-commit"} & packages


def test_guest_has_packages_suite_and_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("harness/report/results.py", "pyproject.toml", "refwg/ip.py", "selftests/netns/test_it.py")
    others = ("report/results.json", ".venv/bin/python", "ci/test", "harness/__pycache__/x.pyc", "selftests/.cache/x")
    for name in (*names, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(suite, "PACKAGES", tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in image.project_files()] == list(names)
    (tmp_path / suite.INSTALLED).touch()
    assert tmp_path / "pyproject.toml" not in image.project_files()
    assert tmp_path / suite.INSTALLED in image.project_files()


def test_extra_that_is_not_installed_is_left_out_of_guest() -> None:
    assert "wg-interop" in closure("wg-interop", ("", "no-such-extra"))
    assert closure("no-such-distribution", ("",)) == set()
