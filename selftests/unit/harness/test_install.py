"""Check the installer of implementations: tables, builds, look-ups and errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.errors import Unavailable, UsageError
from harness.implementations.manifest import load_manifest
from harness.install import installer
from harness.install.cache import REMEDY
from harness.install.go import find_go, go_environment, go_version
from harness.install.installer import install, install_each, on_request, recipes, why_not_installed
from harness.install.recipes import CargoProgram, DebianProgram, GoProgram, parse_recipe
from harness.install.tools import parse_version, reason
from harness.tables import Table

if TYPE_CHECKING:
    from collections.abc import Mapping

GO_TABLE = {"kind": "go", "module": "example.org/wg", "version": "v1.2.3", "binary": "wg", "go": "1.23.1"}
DEBIAN_TABLE = {"kind": "debian", "package": "some-wg", "binary": "/usr/bin/some-wg-that-is-not-there"}
CARGO_TABLE = {"kind": "cargo", "crate": "some-wg", "version": "1.2.3", "binary": "wg", "rust": "1.85"}
GO = GoProgram(module="example.org/wg", version="v1.2.3", binary="wg", go="1.23.1")
DEBIAN = DebianProgram(package="some-wg", binary="/usr/bin/some-wg-that-is-not-there")
CARGO = CargoProgram(crate="some-wg", version="1.2.3", binary="wg", rust="1.85")
VERSION = "[ $1 = version ] && echo go version go1.99.0 linux/amd64 && exit"
FAILING_GO = f"""#!/bin/sh
{VERSION}
echo trouble; echo no net; exit 1
"""
WORKING_GO = f"""#!/bin/sh
{VERSION}
cp /bin/true $GOBIN/wg
env > $GOBIN/env
echo $@ > $GOBIN/arguments
"""
APT = """#!/bin/sh
for word; do case $word in Dir::Cache::archives=*) : > "${word#*=}/some-wg_1_amd64.deb";; esac; done
"""
DPKG = """#!/bin/sh
mkdir -p $3/usr/bin
cp /bin/true $3/usr/bin/some-wg-that-is-not-there
"""
RUSTC = """#!/bin/sh
echo "rustc 1.95.0 (59807616e 2026-04-14)"
"""
WORKING_CARGO = """#!/bin/sh
for word; do [ "$before" = --root ] && root=$word; before=$word; done
mkdir -p $root/bin $CARGO_HOME/registry
cp /bin/true $root/bin/wg
env > $root/env
echo $@ > $root/arguments
"""


# Every test uses it: none may touch the real cache.
@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "wg-interop"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first directory on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path / "bin"


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({}, "kind: None is not one of go, cargo, debian"),
        (GO_TABLE | {"kind": "snap"}, "kind: 'snap' is not one of go, cargo, debian"),
        (GO_TABLE | {"kind": ["go"]}, "kind: ['go'] is not one of go, cargo, debian"),
        (GO_TABLE | {"flavour": "sweet"}, "unknown key: flavour"),
        ({"kind": "go", "module": "m"}, "missing: binary, go, version"),
        (GO_TABLE | {"version": 1}, "version: 1 is not a string"),
        (GO_TABLE | {"version": "latest"}, "version: 'latest' is not a fixed version such as v1.2.3"),
        (GO_TABLE | {"version": "v1/../../x"}, "version: 'v1/../../x' is not a fixed version such as v1.2.3"),
        (GO_TABLE | {"binary": "../wg"}, "binary: '../wg' is not a file name"),
        (GO_TABLE | {"go": "new"}, "go: 'new' is not a Go version such as 1.23.1"),
        (CARGO_TABLE | {"crate": "--git"}, "crate: '--git' is not the name of a crate"),
        (CARGO_TABLE | {"version": "1.2"}, "version: '1.2' is not a fixed version such as 1.2.3"),
        (CARGO_TABLE | {"binary": "../wg"}, "binary: '../wg' is not a file name"),
        (CARGO_TABLE | {"rust": "stable"}, "rust: 'stable' is not a Rust version such as 1.85"),
        (DEBIAN_TABLE | {"package": "-o evil"}, "package: '-o evil' is not the name of a Debian package"),
        (DEBIAN_TABLE | {"binary": "wg"}, "binary: 'wg' is not an absolute path"),
        (DEBIAN_TABLE | {"binary": "/usr/../wg"}, "binary: '/usr/../wg' is not an absolute path"),
    ],
)
def test_bad_install_table_is_refused_with_its_key_named(table: Mapping[str, object], complaint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_recipe(Table("peer", table))
    assert str(refusal.value) == f"peer: [install] {complaint}"


def test_shipped_install_tables_can_be_parsed() -> None:
    kinds = {name: type(recipe) for name, recipe in recipes().items()}
    expected = {
        "wireguard-go": GoProgram,
        "wireguard-go-debian": DebianProgram,
        "boringtun": CargoProgram,
        "gotatun": CargoProgram,
    }
    assert kinds | expected == kinds


def test_broken_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "peer.toml").write_text("[install\n")
    with pytest.raises(UsageError, match=r"peer\.toml: .*line 1"):
        recipes(tmp_path)


def test_manifest_without_install_table_has_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "kernel.toml").write_text("kind = 'kernel'\n")
    assert recipes(tmp_path) == {}


def test_lookup_without_cache_finds_nothing_and_creates_nothing(cache: Path) -> None:
    assert GO.installed("peer") is None
    assert DEBIAN.installed("peer") is None
    assert not cache.exists()


def test_distribution_program_is_used_in_its_place(cache: Path) -> None:
    assert replace(DEBIAN, binary="/bin/sh").installed("peer") == Path("/bin/sh")
    assert not cache.exists()


def test_go_program_is_built_into_cache_once(cache: Path, programs: Path) -> None:
    write_program(programs / "go", WORKING_GO)
    built = install("peer", GO)
    assert built == cache / "peers" / "peer" / "v1.2.3" / "wg"
    write_program(programs / "go", FAILING_GO)
    assert install("peer", GO) == GO.installed("peer") == built


def test_go_build_uses_trimpath_and_private_module_cache(cache: Path, programs: Path) -> None:
    write_program(programs / "go", WORKING_GO)
    target = install("peer", GO).parent
    assert (target / "arguments").read_text().startswith("install -trimpath ")
    assert (target / "arguments").read_text().endswith(" example.org/wg@v1.2.3\n")
    environment = (target / "env").read_text()
    assert re.search(rf"^GOMODCACHE={cache}/peers/peer/\.v1\.2\.3\..*\.part/\.build/mod$", environment, re.MULTILINE)
    assert {"GOTOOLCHAIN=local", "CGO_ENABLED=0"} <= set(environment.split("\n"))


def test_rust_program_is_built_into_cache_with_locked_option(cache: Path, programs: Path) -> None:
    write_program(programs / "rustc", RUSTC)
    write_program(programs / "cargo", WORKING_CARGO)
    built = install("peer", CARGO)
    target = cache / "peers" / "peer" / "1.2.3"
    assert built == CARGO.installed("peer") == target / "bin" / "wg"
    arguments = (target / "arguments").read_text()
    assert re.search(r"install --locked --root \S+ --target-dir \S+ some-wg@1\.2\.3\n$", arguments)
    # Nothing else that was fetched or compiled is left.
    assert {path.name for path in target.iterdir()} == {"bin", "env", "arguments"}


def test_rust_program_is_refused_without_c_compiler(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(programs))
    write_program(programs / "rustc", RUSTC)
    write_program(programs / "cargo", WORKING_CARGO)
    with pytest.raises(Unavailable, match=r"no C compiler to link with: .*\bgcc\b"):
        install("peer", CARGO)


def test_rust_programs_are_marked_for_install_on_request_only() -> None:
    assert {name for name, recipe in recipes().items() if on_request(recipe)} == {"boringtun", "gotatun"}


def test_build_leaves_no_fetched_modules(programs: Path) -> None:
    write_program(programs / "go", WORKING_GO + "mkdir -p $GOMODCACHE/some@v1; chmod 500 $GOMODCACHE/some@v1\n")
    assert {path.name for path in install("peer", GO).parent.iterdir()} == {"wg", "env", "arguments"}


def test_failure_names_peer_last_line_and_remedy(cache: Path, programs: Path) -> None:
    write_program(programs / "go", FAILING_GO)
    with pytest.raises(
        Unavailable, match=r"^peer could not be installed: no net; check the network .*--impl peer=PATH$"
    ):
        install("peer", GO)
    assert {path.name for path in (cache / "peers" / "peer").iterdir()} == {".v1.2.3.lock", "why-not"}


def test_unwritable_file_is_not_reported_as_network_problem(cache: Path, programs: Path) -> None:
    write_program(programs / "go", WORKING_GO)
    # The lock's name is just short enough for the file system, that of the directory beside it is not.
    version = f"v1.2.3-{'x' * 238}"
    with pytest.raises(Unavailable, match=r"^peer could not be installed: .*File name too long") as refusal:
        install("peer", replace(GO, version=version))
    assert "network" not in str(refusal.value)
    assert f"; {REMEDY}, or name a program of your own: " in str(refusal.value)
    assert (cache / "peers" / "peer" / "why-not").exists()


def test_failure_is_remembered_until_installation_succeeds(programs: Path) -> None:
    write_program(programs / "go", FAILING_GO)
    with pytest.raises(Unavailable):
        install("peer", GO)
    assert why_not_installed("peer") == "no net"
    write_program(programs / "go", WORKING_GO)
    install("peer", GO)
    assert why_not_installed("peer") is None


def test_program_missing_from_go_module_is_named_in_error(programs: Path) -> None:
    write_program(programs / "go", WORKING_GO)
    with pytest.raises(Unavailable, match=r"example\.org/wg v1\.2\.3 builds no program named other"):
        install("peer", replace(GO, binary="other"))


def test_ordinary_user_unpacks_package_into_cache(cache: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    write_program(programs / "apt-get", APT)
    write_program(programs / "dpkg-deb", DPKG)
    unpacked = cache / "peers" / "peer" / "debian" / "usr" / "bin" / "some-wg-that-is-not-there"
    assert install("peer", DEBIAN) == DEBIAN.installed("peer") == unpacked


def test_root_installs_package_with_apt_get(cache: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    binary = cache.parent / "some-wg"
    write_program(programs / "apt-get", f'#!/bin/sh\ncase "$*" in *install*some-wg) cp /bin/true {binary};; esac\n')
    assert install("peer", replace(DEBIAN, binary=str(binary))) == binary


def test_command_line_refuses_unknown_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install_each(["wireguard-goo"]) == 2
    assert "wireguard-goo: no implementation of this name can be installed; known: " in capsys.readouterr().err
    assert not cache.exists()


def test_command_line_installs_from_user_manifest(
    tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(programs / "go", WORKING_GO)
    table = "\n".join(f"{key} = {value!r}" for key, value in GO_TABLE.items())
    (tmp_path / "file.toml").write_text(f"name = 'mine'\nkind = 'uapi'\n[install]\n{table}\n")
    assert install_each([str(tmp_path / "file.toml")]) == 0
    assert GO.installed("mine")
    assert f"{GO.installed('mine')}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "manifest {}: No such file or directory"),
        ("name = 'mine'\nkind = 'uapi'", "manifest {}: has no table [install]"),
        ("name = '../mine'\nkind = 'uapi'", "manifest {}: name must be lower-case letters"),
    ],
)
def test_command_line_refuses_unusable_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, complaint: str
) -> None:
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text)
    assert install_each([str(path)]) == 2
    assert f"wg-interop install: {complaint.format(path)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "name = ",
        "name = 5\nkind = 'uapi'",
        "name = 'mine'\nkind = 'uapi'\ninstall = 'go'",
        "name = 'mine'\nkind = 'uapi'\n[install]\nkind = 'snap'",
        "name = 'mine'\nkind = 'uapi'\n[install]\nkind = 'debian'\npackage = 'wg'\nbinary = 1",
    ],
)
def test_mistake_in_manifest_has_one_wording_in_run_and_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as refusal:
        load_manifest(path)
    assert install_each([str(path)]) == 2
    assert capsys.readouterr().err == f"wg-interop install: {refusal.value}\n"


def test_command_line_continues_after_failed_peer(
    cache: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(programs / "go", FAILING_GO)
    monkeypatch.setattr(installer, "recipes", lambda: {"bad": GO, "good": replace(DEBIAN, binary="/bin/sh")})
    assert install_each([]) == 125
    assert "/bin/sh\n" in capsys.readouterr().out
    assert cache.exists()


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        ("go version go1.26.8 linux/amd64", (1, 26, 8)),
        ("go version go1.21 linux/amd64", (1, 21, 0)),
        ("go version go1.23.1 X:nocoverageredesign linux/amd64", (1, 23, 1)),
        ("go version go1.27rc1 linux/amd64", None),
        ("go version devel go1.28-0123abcd linux/amd64", None),
        ("usage: go fish", None),
    ],
)
def test_version_of_go_is_read(answer: str, version: tuple[int, ...] | None, programs: Path) -> None:
    write_program(programs / "go", f"#!/bin/sh\necho {answer}\n")
    assert go_version(programs / "go") == version


def test_go_on_path_counts_only_if_new_enough(cache: Path, programs: Path) -> None:
    write_program(programs / "go", "#!/bin/sh\necho go version go1.23.1 linux/amd64\n")
    assert find_go(parse_version("1.23.1")) == programs / "go"
    assert find_go(parse_version("1.23.2")) is None
    assert cache.exists()


def test_users_own_go_caches_and_checks_are_respected(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMODCACHE", "/my/mod")
    monkeypatch.setenv("GONOSUMDB", "example.org")
    monkeypatch.delenv("GOCACHE", raising=False)
    environment = go_environment(Path("/usr/bin/go"), cache)
    assert environment["GOMODCACHE"] == "/my/mod"
    assert environment["GONOSUMDB"] == "example.org"
    assert environment["GOCACHE"] == str(cache / "toolchains" / "go-build")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["E: Unable to locate package x", "trailing chatter"], "E: Unable to locate package x"),
        (["error: failed to compile `x`", "Caused by:", "  z"], "error: failed to compile `x`"),
        (
            [
                "error: download of config.json failed",
                "Caused by:",
                "  [6] Could not resolve hostname (index.crates.io)",
            ],
            "error: download of config.json failed (Could not resolve hostname)",
        ),
        (["one", "two", ""], "two"),
        (
            ["WARNING: Retrying: 'Failed to establish a new connection: [Errno -3] no name')'", "ERROR: No matching x"],
            "ERROR: No matching x (Failed to establish a new connection: [Errno -3] no name)",
        ),
        ([], ""),
    ],
)
def test_failure_reason_is_error_line_or_last_line(lines: list[str], expected: str) -> None:
    assert reason(lines) == expected


def test_setup_imports_only_standard_library() -> None:
    # ci/setup runs under the bare Python of the system: -S keeps site-packages away.
    command = [sys.executable, "-S", "-c", "import ci.gates, harness.install.installer"]
    root = Path(__file__).parents[3]
    assert subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stderr == ""
