"""Prepare an inner pytest that loads the plugin alone: its environment, tests, catalogues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from harness import suite
from harness.sandbox.launcher import INSIDE, REFUSED

if TYPE_CHECKING:
    from pathlib import Path

OK, FAILED, USAGE = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.USAGE_ERROR
GO: Final = "wireguard-go"
DEBIAN: Final = "wireguard-go-debian"

LAB: Final = """
import pytest

def test_core(): pass

@pytest.mark.parametrize("family", ["v4", "v6"])
def test_pair(lab, pair, family): pass
"""
IMPLEMENTATION: Final = "def test(implementation): pass"
CATALOGUE: Final = """
[[requirement]]
id = "HS-07"
title = "replayed initiation is dropped"
[[requirement]]
id = "HS-08"
[[requirement]]
id = "R-0"
[[requirement]]
id = "R-1"
"""
BUGS: Final = """
[[bug]]
id = "IB-05"
topic = "handshake/spoofed-response"
"""


def leave_outer_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give an inner pytest no settings of the run around it, and a cache of its own. Tests make it their fixture."""
    for name in (INSIDE, REFUSED):
        # Only what was set is undone, and the inner pytest may set it in this process.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # Loading no other plugin saves a second per run; `test_unused_plugin_prints_and_imports_nothing` loads all.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refuse_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse the sandbox, so that the inner pytest does not enter one. Tests make it their fixture."""
    monkeypatch.setenv(REFUSED, "unit tests need no sandbox")


def add_catalogue(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a suite with a catalogue of requirements and of bugs; return its folder."""
    monkeypatch.setenv(suite.SUITE, str(pytester.path))
    pytester.mkdir("selftests").joinpath("conformance").mkdir()
    folder = pytester.path / "selftests" / "conformance"
    (folder / "requirements.toml").write_text(CATALOGUE)
    (folder / "real-bugs.toml").write_text(BUGS)
    return folder
