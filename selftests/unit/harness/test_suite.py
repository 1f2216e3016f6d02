"""Check how the suite is found: in a checkout, beside an installed package, and by WG_INTEROP_SUITE."""

from __future__ import annotations

import importlib.metadata
import io
import json
from pathlib import Path

import pytest

from harness import suite
from harness.cli.where import show
from harness.errors import UsageError

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site directory with a suite, in place of this checkout; the current directory is another one."""
    site, here = tmp_path / "site", tmp_path / "here"
    (site / "selftests/netns").mkdir(parents=True)
    (site / suite.INSTALLED).touch()
    (site / "selftests/netns/test_it.py").touch()
    here.mkdir()
    monkeypatch.setattr(suite, "PACKAGES", site)
    monkeypatch.delenv(suite.SUITE, raising=False)
    monkeypatch.chdir(here)
    return site


def printed(*, as_json: bool) -> str:
    out = io.StringIO()
    assert show(out, as_json=as_json) == 0
    return out.getvalue()


def test_checkout_has_no_configuration_in_its_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(suite.SUITE, raising=False)
    assert suite.root() == CHECKOUT
    # pytest would take its directory for the root, and the ids of all tests would change.
    assert not suite.is_installed()
    assert suite.pytest_options() == ["-c", f"{CHECKOUT}/pyproject.toml", f"--rootdir={CHECKOUT}"]


def test_installed_suite_has_its_own_configuration(installed: Path) -> None:
    assert suite.pytest_options() == ["-c", f"{installed}/selftests/pytest.toml", f"--rootdir={installed}"]


@pytest.mark.parametrize("below", ["", "docs"])
def test_report_of_checkout_goes_to_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    (tmp_path / "selftests").mkdir()
    (tmp_path / "docs").mkdir()
    monkeypatch.setenv(suite.SUITE, str(tmp_path))
    monkeypatch.chdir(tmp_path / below)
    assert suite.workplace() == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert suite.workplace() == tmp_path.parent


def test_report_of_installed_suite_goes_to_current_directory(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert suite.workplace() == Path.cwd()
    monkeypatch.chdir(installed)
    assert suite.workplace() == installed


def test_test_of_suite_is_found_by_id_from_elsewhere(installed: Path) -> None:
    test = "selftests/netns/test_it.py::test_one[x::y]"
    assert suite.locate(test) == f"{installed}/{test}"
    assert suite.contains(suite.locate(test))
    Path("selftests/netns").mkdir(parents=True)
    Path("selftests/netns/test_it.py").touch()
    # A file of the user comes first.
    assert suite.locate(test) == f"{Path.cwd()}/{test}"
    assert not suite.contains(suite.locate(test))
    with pytest.raises(UsageError, match=r"^no test file or directory moon\.py$"):
        suite.locate("moon.py::test_it")


def test_command_where_prints_all_places_and_options(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    here = Path.cwd()
    options = [
        "-c",
        f"{installed}/selftests/pytest.toml",
        f"--rootdir={installed}",
        f"-ocache_dir={here}/.pytest_cache",
    ]
    assert json.loads(printed(as_json=True)) == {
        "root": f"{installed}",
        "suite": f"{installed}/selftests",
        "catalogue": f"{installed}/selftests/conformance",
        "expectations": f"{installed}/selftests/expectations",
        "cache": "/var/cache/wg-interop",
        "report": f"{here}/report",
        "version": importlib.metadata.version("wg-interop"),
        "pytest": options,
    }
    lines = printed(as_json=False).splitlines()
    assert lines[0] == f"root          {installed}"
    assert lines[-1] == f"pytest        pytest {' '.join(options)}"
