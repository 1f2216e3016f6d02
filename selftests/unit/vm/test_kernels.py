"""Check how `--kernel` finds its kernel, and the errors when there is none."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.install.packages import install_command
from harness.vm import kernels
from harness.vm.__main__ import main

APT = {
    "linux-image-cloud-amd64": {"Package": "linux-image-cloud-amd64", "Depends": "linux-image-6.1.0-56 (= 6.1.192-2)"},
    "linux-image-6.1.0-56": {"Package": "linux-image-6.1.0-56", "Version": "6.1.192-2", "SHA256": "ab" * 32},
    "linux-image-6.5-amd64": {"Package": "linux-image-6.5-amd64", "Version": "6.5-1", "SHA256": "cd" * 32},
}


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace apt by one that has the packages above; return the names that it was queried for."""
    queried: list[str] = []

    def record(package: str) -> dict[str, str]:
        queried.append(package)
        return APT.get(package, {})

    monkeypatch.setattr(kernels, "apt_record", record)
    monkeypatch.setattr(kernels, "APT_LISTS", Path("/"))
    return queried


def bzimage(path: Path, release: str) -> Path:
    """Write a bzImage header with a version (boot.rst: HdrS 0x202, kernel_version 0x20e)."""
    head = bytearray(0x1000)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = struct.pack("<H", 0x300)
    text = f"{release} (builder@host) #1 SMP".encode() + b"\0"
    head[0x500 : 0x500 + len(text)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head)
    return path


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("6.1", "linux-image-6.1.0-56_6.1.192-2_abababababab"),
        ("bookworm", "linux-image-6.1.0-56_6.1.192-2_abababababab"),
        ("linux-image-cloud-amd64", "linux-image-6.1.0-56_6.1.192-2_abababababab"),
        ("6.5", "linux-image-6.5-amd64_6.5-1_cdcdcdcdcdcd"),
    ],
)
@pytest.mark.usefixtures("apt")
def test_package_is_found_by_version_alias_or_package_name(which: str, expected: str, tmp_path: Path) -> None:
    assert kernels.find_package(which, tmp_path).folder(tmp_path).name == expected


def test_apt_is_queried_once_per_kernel(apt: list[str], tmp_path: Path) -> None:
    first = kernels.find_package("6.1", tmp_path)
    queries = len(apt)
    assert kernels.find_package("6.1", tmp_path) == first
    assert len(apt) == queries


@pytest.mark.usefixtures("apt")
def test_known_kernel_is_found_when_apt_no_longer_lists_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = kernels.find_package("6.1", tmp_path)
    monkeypatch.setattr(kernels, "APT_LISTS", tmp_path)
    monkeypatch.setattr(kernels, "apt_record", lambda _: {})
    assert kernels.find_package("6.1", tmp_path) == package


def test_kernel_release_is_read_from_bzimage(tmp_path: Path) -> None:
    image = bzimage(tmp_path / "bzImage", "6.13.0-mine")
    assert kernels.find(str(image), tmp_path).release == "6.13.0-mine"


def test_builtin_modules_are_read_from_build_tree(tmp_path: Path) -> None:
    bzimage(tmp_path / "arch/x86/boot/bzImage", "6.13.0-mine")
    (tmp_path / "modules.builtin").write_text("kernel/drivers/net/wireguard/wireguard.ko\nkernel/net/nf-x.ko\n")
    assert kernels.find(str(tmp_path), tmp_path).builtin == frozenset({"wireguard", "nf_x"})


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("9.9", "neither a file nor a package in apt's lists (names: 6.1, 6.12; apt-get update renews them)"),
        ("./no/such", "no such file or folder"),
        ("TMP/text", "not a bzImage, it has no boot header"),
        ("TMP", "not built for x86 yet, it has no arch/x86/boot/bzImage"),
    ],
)
@pytest.mark.usefixtures("apt")
def test_invalid_kernel_is_refused_in_one_line(which: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 1000)
    which = which.replace("TMP", str(tmp_path))
    with pytest.raises(UsageError) as error:
        kernels.find(which, tmp_path)
    assert str(error.value) == f"kernel {which}: {words}"


def test_missing_kernel_is_reported_as_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--kernel", "./no/such", "--", "true"]) == 2
    assert capsys.readouterr().err == "vm: kernel ./no/such: no such file or folder\n"


def test_missing_qemu_error_shows_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["run", "--", "true"]) == 125
    assert install_command(["qemu-system-x86"]) in capsys.readouterr().err


def test_kernel_identity_differs_with_and_without_modules(tmp_path: Path) -> None:
    image = bzimage(tmp_path / "arch/x86/boot/bzImage", "6.13.0-mine")
    with_modules, without = (kernels.find(str(path), tmp_path) for path in (tmp_path, image))
    assert with_modules.identity() != without.identity()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('default = "6.1"', "", "default is missing"),
        ('package = "linux-image-cloud-amd64"', "", "kernels.6.1.package is missing"),
        ('aliases = ["newest"]', 'aliases = "newest"', "kernels.6.12.aliases must be a list, not 'newest'"),
        ("[modules]", "[lists]", "modules.transport is missing"),
    ],
)
def test_mistake_in_kernel_catalogue_is_named_in_error(old: str, new: str, complaint: str, tmp_path: Path) -> None:
    shipped = Path(kernels.__file__).with_name("kernels.toml").read_text()
    assert old in shipped
    (tmp_path / "kernels.toml").write_text(shipped.replace(old, new))
    with pytest.raises(UsageError) as error:
        kernels.read_catalogue(tmp_path / "kernels.toml")
    assert str(error.value) == f"kernels.toml: {complaint}"
