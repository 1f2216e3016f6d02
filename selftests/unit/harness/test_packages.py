"""Check the command that installs packages, for each distribution of the table, and that the table is complete."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

import pytest

from harness.cli import doctor
from harness.install import packages
from harness.install.packages import families, install_command
from harness.vm import image

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = ["iproute2", "iputils-ping", "tshark", "iproute2", "qemu-system-x86"]
DEBIAN = "apt-get install -y iproute2 iputils-ping tshark qemu-system-x86"
FEDORA = "dnf install -y iproute iproute-tc iputils wireshark-cli qemu-system-x86-core"
ARCH = "pacman -S --needed iproute2 iputils wireshark-cli qemu-system-x86"
# os-release(5) of each distribution, and the command.
RELEASES = {
    "debian": ("ID=debian", DEBIAN),
    "ubuntu": ("ID=ubuntu\nID_LIKE=debian", DEBIAN),
    "mint": ('ID=linuxmint\nID_LIKE="ubuntu debian"', DEBIAN),
    "fedora": ("ID=fedora", FEDORA),
    "rocky": ('ID="rocky"\nID_LIKE="rhel centos fedora"', FEDORA),
    "arch": ("ID=arch", ARCH),
    "endeavour": ("ID=endeavouros\nID_LIKE=arch", ARCH),
}


def pretend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str | None, *, uid: int = 0, users: int = 9
) -> None:
    """Take this text for os-release(5), this user id, and a user namespace with so many users."""
    file = tmp_path / "os-release"
    uid_map = tmp_path / "uid_map"
    if release is not None:
        file.write_text(f"NAME=x\n{release}\n")
    uid_map.write_text(f"         0       1000          1\n         1     100000 {users - 1:10}\n")
    monkeypatch.setattr(platform, "_os_release_candidates", (str(file),))
    monkeypatch.setattr(platform, "_os_release_cache", None)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(packages, "_UID_MAP", uid_map)


@pytest.mark.parametrize("name", RELEASES)
def test_command_is_that_of_distribution(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    release, command = RELEASES[name]
    pretend(monkeypatch, tmp_path, release, uid=1000)
    assert install_command(PACKAGES) == f"sudo {command}"


@pytest.mark.parametrize(
    ("uid", "users", "sudo"), [(0, 9, ""), (0, 1, "sudo "), (1000, 9, "sudo ")], ids=["root", "sandbox", "user"]
)
def test_root_needs_no_sudo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uid: int, users: int, sudo: str) -> None:
    pretend(monkeypatch, tmp_path, "ID=debian", uid=uid, users=users)
    assert install_command(["iperf3"]) == f"{sudo}apt-get install -y iperf3"


@pytest.mark.parametrize("release", ["ID=nixos", "ID=suse\nID_LIKE=opensuse", None])
def test_unknown_distribution_gets_names_of_debian(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str | None
) -> None:
    pretend(monkeypatch, tmp_path, release)
    wanted = "install iproute2 nftables (Debian's names) with the package manager of this distribution"
    assert install_command(["iproute2", "nftables"]) == wanted


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_family_names_each_package_that_lab_asks_for(family: packages.Family) -> None:
    asked = {probe.package for probe in doctor._PROBES if probe.package}  # noqa: SLF001
    asked |= set(image.CONTENTS.needed_tools.values()) | {"gcc", "libc6-dev", "util-linux", "zstd", "strace", "gdb"}
    asked |= {"valgrind"}
    # The same everywhere, as the head of the table says.
    same = {"bash", "coreutils", "gcc", "gdb", "iperf3", "nftables", "strace", "util-linux", "wireguard-tools", "zstd"}
    same |= {"valgrind"}
    other = {"arch": {"iproute2", "qemu-system-x86"}}.get(family.name, set())
    assert family.name == "debian" or asked - same - other == set(family.packages)


def test_doctor_prints_one_command_for_all_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_SBIN", [])
    pretend(monkeypatch, tmp_path, "ID=fedora")
    bench = doctor.Bench(tmp_path)
    programs = [probe.run(bench) for probe in doctor._PROBES if probe.kind == "program"]  # noqa: SLF001
    monkeypatch.setattr(doctor, "findings", lambda: iter(programs))
    with (tmp_path / "output").open("w+") as stream:
        assert doctor.examine(stream, as_json=False) == 125
        stream.seek(0)
        lines = stream.read().splitlines()
    names = "iperf3 iproute iproute-tc iputils nftables qemu-system-x86-core wireshark-cli wireguard-tools"
    assert f"to install all of them: dnf install -y {names}" in lines
    assert sum("to fix: dnf install -y iproute iproute-tc" in line for line in lines) == 1
