"""Run an inner pytest in the sandbox of the outer one, for tests of the lab."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from harness import Lab


@pytest.fixture
def inner_pytest(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare an inner pytest with the plugin of the lab alone, in the sandbox of the outer one."""
    assert lab.nodes == {}
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin")
    # The outer pytest also looks for leaks; each search takes 50 ms.
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:unraisableexception -p no:threadexception")
    # An inner pytest forgets the modules that it was the first to import. Imported here, the report's template is read
    # only once.
    importlib.import_module("harness.report.gather")
