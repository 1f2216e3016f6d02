"""Define the fixtures: the lab, the implementations, and a tunnel in each topology."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.errors import HarnessError, Unavailable, Unsupported
from harness.plugin.session import INTERACTIVE, LAB, UNDONE, file_name, state_of_run
from harness.sandbox.launch import refused

if TYPE_CHECKING:
    from collections.abc import Generator

    from harness.implementations.manifest import Manifest
    from harness.lab.lab import Lab
    from harness.lab.target import Target
    from harness.lab.topology import Topology
    from harness.lab.tunnel import Tunnel
    from harness.plugin.options import Pair
    from harness.wire.wire import Wire


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Generator[Lab]:
    """The lab of this test: makes nodes, links and interfaces, and undoes them afterwards."""
    from harness.lab.kernel_log import note_test
    from harness.lab.lab import Lab
    from harness.lab.leaks import check_leaks, take_inventory
    from harness.sandbox.launch import require_sandbox

    try:
        require_sandbox()
    except HarnessError as error:
        pytest.skip(str(error))
    state = state_of_run(request.config)
    before = take_inventory()
    made = Lab(state.scratch() / file_name(request.node.nodeid), state.seed)
    request.node.stash[LAB], request.node.stash[UNDONE] = made, False
    if lane := state.plan.lane_of_guest:
        # A warning is on the console too, where it names the test even after a panic. In lane warp that takes time.
        note_test(request.node.nodeid, level=4 if lane == "vm" else 6)
    if watching := request.config.pluginmanager.getplugin(INTERACTIVE):
        watching.watch(request.node, made)
    yield made
    # Its directory stays until the report of the tear-down (verdicts.py), which may need it as evidence.
    made.close()
    # Now all fixtures that use the lab have ended. A failed test is not checked: its traceback keeps objects alive.
    if request.node.stash[UNDONE]:
        check_leaks(before, made.steps)


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    """The two implementations under test, in each order (`--impl`, `--pair`)."""
    chosen: Pair = request.param
    for manifest in dict.fromkeys(chosen):
        _require(request, manifest)
    for manifest in dict.fromkeys(chosen):
        _require_smoke(request, manifest)
    return chosen


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Manifest:
    """The one implementation under test (`--impl`)."""
    manifest: Manifest = request.param
    _require(request, manifest)
    _require_smoke(request, manifest)
    return manifest


def _require(request: pytest.FixtureRequest, manifest: Manifest) -> None:
    reason = refused() if manifest.kind == "kernel" else None
    reason = reason or manifest.why_unavailable()
    if reason:
        pytest.skip(reason)
    for marker in request.node.iter_markers("capability"):
        for name in marker.args:
            if name not in manifest.capabilities:
                raise Unsupported(f"{manifest.name} does not declare the capability {name}")


def _require_smoke(request: pytest.FixtureRequest, manifest: Manifest) -> None:
    from harness.plugin.smoke import require_smoke

    require_smoke(request.node, manifest)


def _tunnel(lab: Lab, topology: Topology, pair: Pair) -> Tunnel:
    from harness.lab.tunnel import Tunnel

    return Tunnel(lab, topology, pair.a, pair.b)


@pytest.fixture
def loopback(lab: Lab, pair: Pair) -> Tunnel:
    """A and B in ns1 and ns2, their sockets in ns0 (topology `loopback`)."""
    from harness.lab.topology import LOOPBACK

    return _tunnel(lab, LOOPBACK, pair)


@pytest.fixture
def nat(lab: Lab, pair: Pair) -> Tunnel:
    """A behind a NAT in ns0, B in front of it (topology `nat`)."""
    from harness.lab.topology import NAT

    return _tunnel(lab, NAT, pair)


@pytest.fixture
def direct(lab: Lab, pair: Pair) -> Tunnel:
    """A and B connected by one veth pair without addresses (topology `direct`)."""
    from harness.lab.topology import DIRECT

    return _tunnel(lab, DIRECT, pair)


@pytest.fixture
def link_local(lab: Lab, pair: Pair) -> Tunnel:
    """A and B connected by two links with the same link-local addresses (topology `link-local`)."""
    from harness.lab.topology import LINK_LOCAL

    return _tunnel(lab, LINK_LOCAL, pair)


@pytest.fixture
def wired(lab: Lab, pair: Pair) -> Tunnel:
    """A and B with a wire between them (topology `wired`)."""
    from harness.lab.topology import WIRED

    return _tunnel(lab, WIRED, pair)


@pytest.fixture
def tunnel(lab: Lab, topology: Topology, pair: Pair) -> Tunnel:
    """A and B in the topology of `@pytest.mark.parametrize("topology", ...)`; skipped if this kernel lacks a device."""
    try:
        return _tunnel(lab, topology, pair)
    except Unavailable as error:
        pytest.skip(f"topology {topology.name}: {error}")


@pytest.fixture
def wire(wired: Tunnel) -> Wire:
    """The wire between A and B, with no faults yet."""
    return wired.lab.wires[0]


@pytest.fixture
def target(lab: Lab, implementation: Manifest) -> Target:
    """The implementation under test with no peer yet; `target.peer()` makes scripted ones."""
    from harness.lab.target import Target

    return Target(lab, implementation)
