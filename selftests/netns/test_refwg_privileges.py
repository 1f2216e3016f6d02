"""Check that refwg works as before once it has given up root's rights (`direct`)."""

from __future__ import annotations

import dataclasses
import pwd
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from harness import (
    DIRECT,
    V4_OF_A,
    V4_OF_B,
    V6_OF_B,
    DeviceConfig,
    Endpoint,
    ProgramInterface,
    Registry,
    Tunnel,
    let_pass,
    must_ping,
)

if TYPE_CHECKING:
    from harness import Lab

USER: Final = "nobody"
# CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW.
KEPT: Final = 1 << 10 | 1 << 12 | 1 << 13


@pytest.fixture
def tunnel(lab: Lab) -> Tunnel:
    """A is refwg as nobody, B refwg as root, both with two addresses of either family."""
    nobody = pwd.getpwnam(USER).pw_uid
    ranges = [[int(word) for word in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    if not any(first <= nobody < first + count for first, _, count in ranges):
        pytest.skip(f"the user namespace of this run has no user {USER}; run as root")
    refwg = Registry().get("refwg")
    command = (*refwg.command[:-1], "--drop-privileges", USER, refwg.command[-1])
    direct = Tunnel(lab, DIRECT, dataclasses.replace(refwg, command=command), refwg)
    for number, node in enumerate(direct.nodes.values(), 1):
        addresses = (f"10.0.0.{number}/24", f"10.0.0.{number}0/24", f"fd00:aa::{number}/96", f"fd00:aa::{number}0/96")
        node.add_address(f"veth{number}", *addresses)
        node.set_link(f"veth{number}", up=True)
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint.parse("10.0.0.2:2"))
    return direct


def status(tunnel: Tunnel) -> dict[str, list[str]]:
    assert isinstance(tunnel.a, ProgramInterface)
    lines = Path(f"/proc/{tunnel.a.process.pid}/status").read_text().splitlines()
    return {name: words.split() for name, _, words in (line.partition(":") for line in lines)}


@pytest.mark.requirement("CFG-22", "RT-03")
def test_refwg_roams_and_changes_port_and_link_without_root(tunnel: Tunnel) -> None:
    seen = status(tunnel)
    nobody = pwd.getpwnam(USER)
    assert seen["Uid"] == [str(nobody.pw_uid)] * 4
    assert (seen["Gid"], seen["Groups"]) == ([str(nobody.pw_gid)] * 4, [str(nobody.pw_gid)])
    assert {int(seen[name][0], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {KEPT}
    tunnel.must_ping("ns1", V4_OF_B)
    tunnel.a.set(DeviceConfig(listen_port=77, fwmark=5))
    tunnel.must_ping("ns1", V6_OF_B)
    assert str(tunnel.seen_by_b().endpoint) == "10.0.0.1:77"
    tunnel.b.set(DeviceConfig(listen_port=78))
    tunnel.b.set_peer(tunnel.pub_a, endpoint=Endpoint.parse("[fd00:aa::10]:77"))
    tunnel.must_ping("ns2", V4_OF_A)
    assert str(tunnel.seen_by_a().endpoint) in {"[fd00:aa::2]:78", "[fd00:aa::20]:78"}
    let_pass(0.05, "B refuses a second initiation within 20 ms")
    tunnel.nodes["ns1"].set_link("wg0", up=False)
    tunnel.nodes["ns1"].set_link("wg0", up=True, mtu=1300)
    tunnel.must_ping("ns1", V4_OF_B)
    must_ping(tunnel.nodes["ns1"], V4_OF_B, size=1272)
