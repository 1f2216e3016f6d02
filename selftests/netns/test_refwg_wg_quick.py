"""Run refwg from an unmodified wg-quick(8) where the kernel has no WireGuard (`direct`)."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from harness import DIRECT, DeviceConfig, PeerConfig, Registry, allowed_ips, must_ping
from harness.implementations.interface import CONTROL_SOCKETS
from harness.sandbox.namespace import NamespaceThread, enter_network, enter_new_mounts
from harness.sandbox.process import run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Key, Lab, NetNS
    from harness.sandbox.process import Completed

PROGRAM: Final = Path(sys.executable).with_name("refwg")
FAR_V4, FAR_V6 = "192.168.99.7", "abab::1111"
CONFIGURATION: Final = """\
[Interface]
PrivateKey = {key}
Address = 192.168.241.1/24, fd00::1/112

[Peer]
PublicKey = {peer}
AllowedIPs = {allowed}
Endpoint = {endpoint}
PersistentKeepalive = 25
"""


class Quick:
    """Run wg-quick in a node, with refwg as its userspace implementation."""

    def __init__(self, node: NetNS, configuration: Path) -> None:
        self._configuration = configuration
        self.thread = NamespaceThread("wg-quick", lambda: self._enter(node))

    def __call__(self, verb: str) -> Completed:
        path = f"{PROGRAM.parent}:/usr/bin:/bin:/usr/sbin:/sbin"
        environment = {"WG_QUICK_USERSPACE_IMPLEMENTATION": "refwg", "PATH": path}
        return run(self.thread, ["wg-quick", verb, str(self._configuration)], env=environment, deadline=30)

    def wg(self, *words: str) -> str:
        return run(self.thread, ["wg", *words]).stdout.strip()

    @staticmethod
    def _enter(node: NetNS) -> None:
        enter_network(node.handle)
        enter_new_mounts(CONTROL_SOCKETS)


@pytest.fixture
def nodes(lab: Lab) -> dict[str, NetNS]:
    """Two nodes that reach each other without a tunnel; ns2 also has the addresses behind the tunnel."""
    if Path("/sys/module/wireguard").exists():
        pytest.skip("the kernel has WireGuard, so wg-quick does not start refwg")
    if not PROGRAM.exists() or shutil.which("wg-quick") is None:
        pytest.skip(f"needs wg-quick and {PROGRAM}; ./ci/setup installs both")
    nodes = DIRECT.build(lab)
    for number, node in enumerate(nodes.values(), 1):
        node.add_address(f"veth{number}", f"10.0.0.{number}/24", f"fd00:aa::{number}/96")
        node.set_link(f"veth{number}", up=True)
    nodes["ns2"].add_address("lo", f"{FAR_V4}/32", f"{FAR_V6}/128")
    return nodes


def far_side(lab: Lab, node: NetNS, peer: Key) -> Key:
    """Start a refwg on the other side; return its public key."""
    key = lab.key("far")
    other = lab.interface("wg0", Registry().get("refwg"), node)
    peers = (PeerConfig(public_key=peer, allowed_ips=allowed_ips("192.168.241.1/32", "fd00::1/128")),)
    other.set(DeviceConfig(private_key=key, listen_port=2, peers=peers))
    other.up("192.168.241.2/24", "fd00::2/112")
    return key.public()


@pytest.fixture
def quick(lab: Lab, nodes: dict[str, NetNS], request: pytest.FixtureRequest) -> Iterator[Quick]:
    """wg-quick with a configuration for the far side: its endpoint and its allowed-ips are the parameter."""
    endpoint, allowed = request.param
    key = lab.key("near")
    file = lab.directory / "wg1.conf"
    peer = far_side(lab, nodes["ns2"], key.public())
    file.write_text(CONFIGURATION.format(key=key, peer=peer, allowed=allowed, endpoint=endpoint))
    file.chmod(0o600)
    runner = Quick(nodes["ns1"], file)
    yield runner
    runner.thread.close()


EVERYTHING: Final = "0.0.0.0/0, ::/0"


def has_rules(node: NetNS) -> bool:
    return any("51820" in node.run(["ip", family, "rule"]).stdout for family in ("-4", "-6"))


@pytest.mark.scenario("N23")
@pytest.mark.requirement("RT-17", "CFG-42")
@pytest.mark.parametrize(
    "quick", [("10.0.0.2:2", EVERYTHING), ("[fd00:aa::2]:2", EVERYTHING)], ids=["v4", "v6"], indirect=True
)
def test_wg_quick_routes_all_but_outer_datagrams_into_tunnel(nodes: dict[str, NetNS], quick: Quick) -> None:
    assert "userspace implementation" in quick("up").stderr
    assert quick.wg("show", "wg1", "fwmark") == "0xca6c"
    for address in (FAR_V4, FAR_V6, "192.168.241.2", "fd00::2"):
        must_ping(nodes["ns1"], address, count=3)
    assert int(quick.wg("show", "wg1", "transfer").split()[1]) > 12 * 96
    quick("down")
    assert "wg1" not in nodes["ns1"].links()
    assert not has_rules(nodes["ns1"])


@pytest.mark.requirement("CFG-54")
@pytest.mark.parametrize("quick", [("10.0.0.2:2", f"{FAR_V4}/32, {FAR_V6}/128")], ids=["routes"], indirect=True)
def test_wg_quick_up_and_down_can_be_repeated(nodes: dict[str, NetNS], quick: Quick) -> None:
    for _ in range(3):
        quick("up")
        must_ping(nodes["ns1"], FAR_V4)
        must_ping(nodes["ns1"], FAR_V6)
        assert quick.wg("show", "interfaces") == "wg1"
        quick("down")
