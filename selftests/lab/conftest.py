"""Define fixtures for tests of the lab: two linked nodes, a pytest inside the sandbox."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest

from harness import add_veth

if TYPE_CHECKING:
    from harness import Lab, NetNS


@pytest.fixture
def left(lab: Lab) -> NetNS:
    """A node without links."""
    return lab.node("left")


@pytest.fixture
def right(lab: Lab, left: NetNS) -> NetNS:
    """A node with a link to the left one: 10.0.0.1 -- 10.0.0.2."""
    node = lab.node("right")
    add_veth(left, "eth0", node, "eth0")
    left.add_address("eth0", "10.0.0.1/24")
    node.add_address("eth0", "10.0.0.2/24")
    return node


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
