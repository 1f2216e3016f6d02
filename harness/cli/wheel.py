"""Make the wheel of the lab that runs here, to install the same one on another machine."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness import suite
from harness.errors import Unavailable, UsageError

if TYPE_CHECKING:
    from pathlib import Path

_NAME: Final = "wg-interop"
# Files that pip writes when it installs a wheel, besides scripts and bytecode.
_OF_PIP: Final = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
# The earliest time that an archive can hold: the same files make the same wheel.
_TIME: Final = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel. digest: its SHA-256."""

    path: Path
    digest: str

    @property
    def data(self) -> bytes:
        return self.path.read_bytes()


def make_wheel(folder: Path) -> Wheel:
    """Build the wheel in a checkout, or pack what is installed; raises HarnessError if that cannot be done."""
    if suite.root() != suite.PACKAGES:
        raise UsageError(
            f"{suite.SUITE} is set: hosts would run the tests of another suite; unset it, or leave out --on"
        )
    path = _build(folder) if (suite.PACKAGES / "pyproject.toml").exists() else pack(folder)
    return Wheel(path, hashlib.sha256(path.read_bytes()).hexdigest())


def _build(folder: Path) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        raise Unavailable("hatchling is not installed, which builds the wheel of a checkout: pip install hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=suite.PACKAGES,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        raise Unavailable(f"cannot build the wheel: {(done.stderr or done.stdout).strip()[-500:]}")
    return found[0]


def pack(folder: Path) -> Path:
    """Pack the files that a wheel has installed into a wheel again."""
    distribution = importlib.metadata.distribution(_NAME)
    files = sorted(
        file
        for file in distribution.files or ()
        if ".." not in file.parts and file.suffix != ".pyc" and file.name not in _OF_PIP
    )
    [info] = {file.parts[0] for file in files if file.parts[0].endswith(".dist-info")}
    path = folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl"
    rows = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            data = file.read_binary()
            archive.writestr(zipfile.ZipInfo(str(file), _TIME), data, zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{file},sha256={digest},{len(data)}\n")
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD", _TIME), "".join([*rows, f"{info}/RECORD,,\n"]))
    return path
