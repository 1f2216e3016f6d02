"""What tests of the lab share: a pytest of their own inside the sandbox of the outer one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from harness import Lab


@pytest.fixture
def inner_pytest(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that runs a pytest of its own, in the sandbox of the outer one, with our plugin alone."""
    assert lab.nodes == {}
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin")
    # The outer pytest looks for what is left behind, too; each search would cost 50 ms.
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:unraisableexception -p no:threadexception")
    # An inner one forgets what it has imported; so that not each has to read the template of the report anew:
    importlib.import_module("harness.report.gather")
