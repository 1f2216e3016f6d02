"""Build the wheel, install it with its run-time dependencies only, and run its suite from an empty directory.

The site directory is read-only. No network is used: the dependencies are links to those of this environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from ci.build_hook import LEFT_OUT, configuration
from ci.setup_checkout import ROOT
from selftests.support.dependencies import link_dependencies

if TYPE_CHECKING:
    from collections.abc import Mapping

# Folders of the suite in the wheel, and the tests that stay in the checkout: of bench/, of documents, of the action,
# and with packages that only the environment of the checkout has.
FOLDERS: Final = ("netns", "conformance", "lab", "faults", "mutants")
NOT_IN_WHEEL: Final = (
    "selftests/lab/test_bench.py",
    "selftests/lab/test_docs.py",
    "selftests/lab/test_results_schema.py",
    "selftests/faults/test_action.py",
    "selftests/faults/test_hosts.py",
)
ONE_TEST: Final = "selftests/netns/test_ping_and_counters.py::test_transfer_counters_are_exact_after_ten_pings"
# A mount namespace in which the first argument is read-only.
READ_ONLY: Final = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


def output(command: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a command to its end, without the variables of this pytest and of its environment; return its output."""
    mine = ("PYTEST", "WG_INTEROP", *(() if env is None else ("PYTHONPATH",)))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(mine)} | dict(env or {})
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


class Installed:
    """The wheel in a virtual environment, and an empty directory."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "empty"
        self.home.mkdir()
        self._venv = folder / "venv"
        self._python = self._venv / "bin" / "python"
        output([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], ROOT)
        [self.wheel] = folder.glob("*.whl")
        venv.create(self._venv, with_pip=False)
        pip = [sys.executable, "-m", "pip", "--python", str(self._python), "install", "--disable-pip-version-check"]
        output([*pip, "--no-input", "--no-deps", "--no-index", str(self.wheel)], folder)
        [self.site] = (self._venv / "lib").glob("python*/site-packages")
        links = folder / "dependencies"
        [info] = self.site.glob("wg_interop-*.dist-info")
        link_dependencies(importlib.metadata.Distribution.at(info).requires or [], links)
        (self.site / "dependencies.pth").write_text(f"{links}\n")

    def run(self, *words: str, home: Path | None = None) -> str:
        """Run the environment's Python in a directory, with its files read-only; return the output.

        home: the directory; None: the empty one, in which the tests of this file leave their reports.
        """
        unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, str(self._venv)]
        return output([*unshare, str(self._python), *words], home or self.home, {"PYTHONDONTWRITEBYTECODE": "1"})

    def places(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("-m", "harness", "where", "--json"))
        return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    probe = ["unshare", "--user", "--map-root-user", "--mount", "true"]
    if subprocess.run(probe, check=False).returncode:
        pytest.skip("no user namespace here: allow kernel.unprivileged_userns_clone")
    return Installed(tmp_path_factory.mktemp("wheel"))


def ids(text: str) -> list[str]:
    return sorted(line for line in text.splitlines() if "::" in line)


def test_wheel_has_ids_of_checkout_without_extra_packages(installed: Installed) -> None:
    absent = "import importlib.util as u; print([n for n in ('hypothesis', 'noise', 'ci', 'bench') if u.find_spec(n)])"
    assert installed.run("-c", absent) == "[]\n"
    # Two implementations are enough: their names are in the ids of all tests that have some.
    names = ["--impl", "refwg", "--impl", "wireguard-go"]
    look = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *names]
    folders = [f"selftests/{name}" for name in FOLDERS]
    places = installed.places()
    options = [word for word in places["pytest"] if "cache_dir" not in word]
    with ThreadPoolExecutor() as pool:
        command = [sys.executable, *look, *(f"--ignore={name}" for name in NOT_IN_WHEEL), *folders]
        collecting = pool.submit(output, command, ROOT)
        theirs = installed.run(*look, *options, *(f"{places['root']}/{name}" for name in folders))
        here = collecting.result()
    assert len(ids(here)) > 1500
    assert ids(theirs) == ids(here)


def test_installed_suite_runs_from_empty_directory(installed: Installed) -> None:
    installed.run("-m", "harness", "run", ONE_TEST, "--pair", "refwg~refwg")
    assert {path.name for path in installed.home.iterdir()} == {"report", ".pytest_cache"}
    document = json.loads((installed.home / "report/results.json").read_text())
    # The oracle has results, too.
    [result] = [result for result in document["results"] if result["id"].startswith("selftests/")]
    assert (result["id"], result["state"]) == (f"{ONE_TEST}[refwg~refwg]", "passed")
    assert document["run"]["root"] == str(installed.site)
    again = f"wg-interop run &#39;{ONE_TEST}[refwg~refwg]&#39;"
    assert again in (installed.home / "report/index.html").read_text()


def test_coverage_of_wheel_is_that_of_checkout(installed: Installed, tmp_path: Path) -> None:
    command = ["-m", "harness", "coverage", "--json"]
    # Elsewhere, so that no report of this checkout and of another test counts.
    assert json.loads(installed.run(*command, home=tmp_path)) == json.loads(
        output([sys.executable, *command], tmp_path)
    )


def test_guest_of_wheel_gets_packages_suite_and_dist_info(installed: Installed) -> None:
    code = """
from harness.vm import image
for path in (*image.project_files(), *image.packages()):
    print(path)
"""
    names = {Path(line) for line in installed.run("-c", code).splitlines()}
    inside = {path.relative_to(installed.site).parts[0] for path in names if path.is_relative_to(installed.site)}
    [info] = {name for name in inside if name.endswith(".dist-info")}
    assert inside == {"harness", "refwg", "selftests", info}
    assert installed.site / info / "entry_points.txt" in names
    assert {"refwg/ip.py", "selftests/pytest.toml", "selftests/netns/test_mtu.py"} <= {
        str(path.relative_to(installed.site)) for path in names if path.is_relative_to(installed.site)
    }


def test_installed_wheel_is_packed_again_for_hosts(installed: Installed) -> None:
    code = "import pathlib, harness.cli.wheel as w; print(w.make_wheel(pathlib.Path.cwd()).path)"
    first, second = (Path(installed.run("-c", code).strip()) for _ in range(2))
    packed, built = (
        {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}
        for archive in map(zipfile.ZipFile, (first, installed.wheel))
    )
    assert packed == built
    assert first.name == installed.wheel.name
    assert first.read_bytes() == second.read_bytes()
    first.unlink()


def test_configuration_of_wheel_is_that_of_checkout() -> None:
    text = '[tool.pytest]\nstrict = true\naddopts = ["-ra", "-q"]\npythonpath = ["."]\njunit_family = "x"\n'
    assert configuration(text) == '[pytest]\nstrict = true\naddopts = ["-ra", "-q"]\njunit_family = "x"\n'
    assert "pythonpath" in LEFT_OUT
