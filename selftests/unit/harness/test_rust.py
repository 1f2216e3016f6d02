"""Check the Rust for building peers: which is chosen, its source, and its settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import Unavailable
from harness.install.rust import Rust, find_rust, rust, users_settings
from harness.install.tools import parse_version

# Debian's packages, unpacked: the compiler works only with the libraries beside it.
UNPACK = """#!/bin/sh
[ -d "$3" ] || exit 1
mkdir -p $3/usr/bin $3/usr/lib/x86_64-linux-gnu
cat > $3/usr/bin/rustc <<'EOF'
#!/bin/sh
case $LD_LIBRARY_PATH in */usr/lib/x86_64-linux-gnu) echo "rustc 1.96.0 (ac68faa20 2026-05-25)";; *) exit 127;; esac
EOF
cp /bin/true $3/usr/bin/cargo
chmod +x $3/usr/bin/rustc
"""
FETCH = """#!/bin/sh
for word; do case $word in Dir::Cache::archives=*) : > "${word#*=}/rustc-web.deb";; esac; done
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "wg-interop"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first directory on PATH, the only one with a Rust."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    write_rust(tmp_path / "bin", "rustc 1.63.0 (x)")
    return tmp_path / "bin"


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def write_rust(programs: Path, answer: str) -> None:
    write_program(programs / "rustc", f"#!/bin/sh\necho '{answer}'\n")
    write_program(programs / "cargo", "#!/bin/sh\n")


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        ("rustc 1.95.0 (59807616e 2026-04-14)", (1, 95, 0)),
        ("rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)", (1, 96, 0)),
        ("rustc 1.98.0-nightly (0123abcd 2026-06-01)", None),
        ("error: no override and no default toolchain set", None),
    ],
)
def test_version_of_rust_is_read(answer: str, version: tuple[int, ...] | None, programs: Path) -> None:
    write_rust(programs, answer)
    assert Rust(programs / "cargo", programs / "rustc").version() == version


def test_rust_on_path_counts_only_if_new_enough(programs: Path) -> None:
    write_rust(programs, "rustc 1.95.0 (x)")
    assert find_rust(parse_version("1.95")) == Rust(programs / "cargo", programs / "rustc")
    assert find_rust(parse_version("1.95.1")) is None


def test_rust_of_debian_is_unpacked_into_cache_once(cache: Path, programs: Path) -> None:
    write_program(programs / "apt-get", FETCH)
    write_program(programs / "dpkg-deb", UNPACK)
    unpacked = rust("1.95", lambda _: None)
    assert unpacked.cargo == cache / "toolchains" / "rust-debian" / "usr" / "bin" / "cargo"
    write_program(programs / "apt-get", "#!/bin/sh\nexit 1\n")
    assert rust("1.95", lambda _: None) == unpacked


def test_too_old_rust_is_refused_with_available_version(programs: Path) -> None:
    write_program(programs / "apt-get", FETCH)
    write_program(programs / "dpkg-deb", UNPACK)
    with pytest.raises(Unavailable, match=r"^no Rust 2\.0 or newer: Debian's is 1\.96\.0; put a newer rustc and cargo"):
        rust("2.0", lambda _: None)


def test_failed_rust_download_is_reported_with_reason(programs: Path) -> None:
    write_program(programs / "apt-get", "#!/bin/sh\necho 'E: Unable to locate package rustc-web'; exit 100\n")
    with pytest.raises(Unavailable, match="Debian's could not be installed: E: Unable to locate package rustc-web"):
        rust("1.95", lambda _: None)


def test_build_uses_its_own_cargo_home_and_user_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CARGO_HOME", raising=False)
    monkeypatch.setenv("CARGO_TARGET_DIR", "/elsewhere")
    monkeypatch.setenv("CARGO_HTTP_PROXY", "http://proxy")
    (tmp_path / ".cargo").mkdir()
    (tmp_path / ".cargo" / "config.toml").touch()
    environment = Rust(Path("cargo"), Path("rustc")).environment(tmp_path / "scratch")
    assert environment["CARGO_HOME"] == str(tmp_path / "scratch" / "cargo")
    assert environment["CARGO_HTTP_PROXY"] == "http://proxy"
    assert "CARGO_TARGET_DIR" not in environment
    assert users_settings() == ["--config", str(tmp_path / ".cargo" / "config.toml")]


def test_cargo_home_set_by_user_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARGO_HOME", "/my/cargo")
    assert Rust(Path("cargo"), Path("rustc")).environment(tmp_path)["CARGO_HOME"] == "/my/cargo"
    assert users_settings() == []
