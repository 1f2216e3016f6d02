"""Check that a replacement fits the driver's source, and that make compiles only what has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.errors import Unavailable, UsageError
from harness.vm import driver
from harness.vm.driver import Replacement, Tree, build

if TYPE_CHECKING:
    from pathlib import Path

# Stands for kbuild, which `make -C HEADERS M=FOLDER modules` starts; the module is a real object file.
MAKEFILE = """
modules: $(M)/wireguard.ko
$(M)/wireguard.ko: $(M)/main.o $(M)/peer.o
\tld -r -o $@ $^
%.o: %.c
\tcc -c -o $@ $<
\techo $(notdir $<) >> $(M)/../compiled
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    source, headers = tmp_path / "source", tmp_path / "src" / "headers"
    source.mkdir()
    headers.mkdir(parents=True)
    (source / "main.c").write_text("int one = 1, two = 2, more = 2;\n")
    (source / "peer.c").write_text("int peers = 3;\n")
    (headers / "Makefile").write_text(MAKEFILE)
    return Tree(headers=headers, source=source, compiler="cc")


ONE = Replacement(file="main.c", text="one = 1", replacement="one = 7")


def test_changed_driver_differs_and_is_built_once(tree: Tree, tmp_path: Path) -> None:
    plain, changed = build(tree, (), tmp_path), build(tree, (ONE,), tmp_path)
    assert plain.read_bytes() != changed.read_bytes()
    assert (build(tree, (), tmp_path), build(tree, (ONE,), tmp_path)) == (plain, changed)
    compiled = (tree.headers.parent / "compiled").read_text().split()
    assert sorted(compiled) == ["main.c", "main.c", "peer.c"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            Replacement(file="main.c", text="none", replacement=""),
            r"^main\.c contains 'none' 0 times, expected once$",
        ),
        (Replacement(file="main.c", text="= 2", replacement=""), r"^main\.c contains '= 2' 2 times, expected once$"),
        (Replacement(file="gone.c", text="", replacement=""), r"^the driver's source has no file gone\.c$"),
    ],
)
def test_replacement_that_does_not_fit_is_refused(
    tree: Tree, tmp_path: Path, change: Replacement, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        build(tree, (change,), tmp_path)


def test_error_of_compiler_is_reported(tree: Tree, tmp_path: Path) -> None:
    broken = Replacement(file="peer.c", text="3", replacement="unknown_name")
    with pytest.raises(Unavailable, match=r"^the driver does not compile: .*peer\.c:1:.*error: .*unknown_name"):
        build(tree, (broken,), tmp_path)


def test_driver_of_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^kernel /src/linux: only the driver of a Debian package can be built"):
        driver.fetch("/src/linux", tmp_path)
