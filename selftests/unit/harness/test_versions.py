"""Check versions of programs: their names, their places in the cache, and what is expected of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.errors import Unavailable, UsageError
from harness.implementations.manifest import Manifest
from harness.implementations.registry import Registry
from harness.install import installer
from harness.install.recipes import GoProgram, parse_recipe
from harness.install.releases import in_order, pick
from harness.report import expectations
from harness.tables import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

GO = GoProgram(module="example.org/wg", version="v1.2.3", binary="wg", go="1.23.1", releases=(("1.0.7", "v0-7"),))
VERSION = "[ $1 = version ] && echo go version go1.99.0 linux/amd64 && exit\n"
# Links only with the option that allows go:linkname.
OLD_NET = f"""#!/bin/sh
{VERSION}
case "$*" in *-checklinkname=0*) cp /bin/true $GOBIN/wg; exit;; esac
echo link: golang.org/x/net/internal/socket: invalid reference to syscall.recvmsg; exit 1
"""
UNKNOWN = f"""#!/bin/sh
{VERSION}
[ $1 = list ] && echo example.org/wg v1.10.0 v1.9.0 && exit
echo go: unknown revision 9.9.9; exit 1
"""
EXPECTED = """
[[expect]]
test = "test_x.py::test_it[[]boringtun~refwg-v4]"
versions = "0.6.*"
requirement = "RT-11"
observed = "it answers from elsewhere"
message = "boringtun answers from elsewhere"
link = "https://example.org/1"
"""


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the only go on PATH; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    path = tmp_path / "bin" / "go"
    path.touch(mode=0o755)
    return path


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("0.0.20230223", "0.0.20230223"),
        ("20230223", "0.0.20230223"),
        ("230223", "230223"),
        ("v1.2.3", "v1.2.3"),
    ],
)
def test_end_of_release_names_it(version: str, name: str) -> None:
    assert pick(version, ["0.0.20220117", "0.0.20230223"]) == name


def test_end_of_two_releases_is_refused() -> None:
    with pytest.raises(UsageError, match=r"version 7: could be 1\.7 or 2\.7; write it in full"):
        pick("7", ["1.7", "2.7"])


def test_versions_are_sorted_by_their_numbers() -> None:
    assert in_order(["1.10.0", "v1.9.0", "1.10.0-rc1", "1.9.0-rc2", "1.10.0"]) == [
        "1.9.0-rc2", "v1.9.0", "1.10.0-rc1", "1.10.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("refwg@1.0", "refwg@1.0: refwg is a part of this project, so it has the version of this checkout alone; "),
        ("kernel@6.12", "kernel@6.12: kernel is not a program; for another kernel use --kernel 6.12"),
        ("wireguard-go-debian@1", "wireguard-go-debian@1: Debian's package has one version; give the program of this "),
        ("wireguard-go@latest", "wireguard-go@latest: version: 'latest' is not a fixed version such as v1.2.3; there"),
        ("wireguard-go@", "wireguard-go@: a version is letters, digits and . _ + -, not ''"),
        ("boringtun@six", "boringtun@six: version: 'six' is not a fixed version such as 1.2.3"),
        ("nope@1.0", "unknown implementation 'nope@1.0'; there are: boringtun, "),
        ("mine@a b=/bin/true", "--impl mine@a b=/bin/true: a name is lower-case letters, digits and . _ + -"),
    ],
)
def test_version_that_cannot_be_is_refused_with_reason(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Registry().choose(text)
    assert str(refusal.value).startswith(complaint)


def test_versions_are_implementations_beside_their_program() -> None:
    registry = Registry()
    old, new = registry.choose("wireguard-go@20230223"), registry.choose("wireguard-go")
    assert (old.name, old.base, new.name) == ("wireguard-go@0.0.20230223", "wireguard-go", "wireguard-go")
    assert registry.get("wireguard-go@0.0.20230223") is old
    assert registry.get("wireguard-go@20230223") is old
    assert registry.asked == ["wireguard-go@0.0.20230223", "wireguard-go"]
    assert old.capabilities == new.capabilities


def test_missing_version_is_reported_with_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, path in (("boringtun@0.6.0", "0.6.0"), ("boringtun", "0.7.1")):
        manifest = Registry().get(name)
        with pytest.raises(Unavailable, match=rf"^{name} is not installed; to install it: wg-interop install {name}$"):
            manifest.find_program()
        built = tmp_path / "wg-interop" / "peers" / "boringtun" / path / "bin" / "boringtun-cli"
        built.parent.mkdir(parents=True)
        built.touch(mode=0o755)
        assert manifest.find_program() == built


def test_own_program_may_be_named_as_version() -> None:
    registry = Registry()
    theirs, mine = registry.choose("wireguard-go@abc123=/bin/true"), registry.choose("mine@2=/bin/true")
    assert theirs.find_program() == mine.find_program() == Path("/bin/true")
    assert theirs.env == registry.get("wireguard-go").env
    assert "mine@2 has no manifest" in "".join(registry.remarks())


def test_old_go_program_is_linked_as_before_go_1_23(go: Path) -> None:
    go.write_text(OLD_NET)
    name, recipe = installer.at_version("peer", GO, "7")
    assert name == "peer@1.0.7"
    built = installer.install(name, recipe)
    assert built == go.parents[1] / "wg-interop" / "peers" / "peer" / "v0-7" / "wg"


def test_unknown_version_is_refused_with_those_that_exist(go: Path) -> None:
    go.write_text(UNKNOWN)
    name, recipe = installer.at_version("peer", GO, "9.9.9")
    with pytest.raises(Unavailable) as refusal:
        installer.install(name, recipe)
    assert "there is no version 9.9.9 that the lab knows; there are: 1.0.7, v1.9.0, v1.10.0, " in str(refusal.value)
    assert installer.why_not_installed(name)
    assert installer.why_not_installed("peer") is None


def test_releases_are_for_go_programs_only() -> None:
    table = {"kind": "cargo", "crate": "wg", "version": "1.2.3", "binary": "wg", "rust": "1.85", "releases": {}}
    with pytest.raises(UsageError, match=r"\[install\] unknown key: releases"):
        parse_recipe(Table("peer", table))


class _Version(Manifest):
    """A manifest whose program need not exist."""

    def version(self) -> str:
        return self.name.partition("@")[2] or "0.7.1"


@pytest.fixture
def known(tmp_path: Path) -> Iterator[Path]:
    expectations.load_expectations.cache_clear()
    (tmp_path / "boringtun.toml").write_text(EXPECTED)
    yield tmp_path
    expectations.load_expectations.cache_clear()


@pytest.mark.parametrize(("name", "expected"), [("boringtun@0.6.0", True), ("boringtun@0.7.0", False)])
def test_expectations_of_program_apply_to_its_versions(known: Path, name: str, expected: bool) -> None:
    sides = (_Version(name=name, kind="uapi"), _Version(name="refwg", kind="uapi"))
    found = expectations.applying(known, f"test_x.py::test_it[{name}~refwg-v4]", sides)
    assert bool(found) is expected
    assert bool(expectations.explains(found, f"{name} answers from elsewhere")) is expected
