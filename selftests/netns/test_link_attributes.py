"""What kind of link an interface is, and which MTU it takes (one interface)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import HarnessError, Unsupported, offloads

if TYPE_CHECKING:
    from harness import Interface, Lab, Manifest

# The largest number of 31 bits less what a message adds, in whole units of padding; of a TUN device, by its driver.
MTUS = {"kernel": (0, 0x7FFFFFFF // 16 * 16 - 80), "uapi": (68, 65535)}


@pytest.fixture
def wg0(lab: Lab, implementation: Manifest) -> Interface:
    return lab.interface("wg0", implementation, lab.node("ns0"))


@pytest.mark.requirement("IF-01", "IF-02")
def test_link_is_point_to_point_without_link_layer_address(wg0: Interface) -> None:
    wg0.up()
    (shown,) = wg0.place.run_json(["ip", "-d", "-j", "link", "show", "wg0"])
    is_kernels = wg0.manifest.kind == "kernel"
    assert (shown["link_type"], "address" in shown) == ("none", False)
    assert shown["linkinfo"]["info_kind"] == ("wireguard" if is_kernels else "tun")
    flags = {*shown["flags"]}
    # A TUN device has a queue of its own, and takes part in multicast.
    assert flags - {"UP", "LOWER_UP"} == {"POINTOPOINT", "NOARP"} | (set() if is_kernels else {"MULTICAST"})
    assert (shown["qdisc"] == "noqueue") == is_kernels


@pytest.mark.requirement("IF-01")
def test_several_interfaces_are_created_in_one_namespace(lab: Lab, wg0: Interface) -> None:
    if wg0.manifest.kind != "kernel":
        raise Unsupported(f"of {wg0.manifest.name} each is a program of its own")
    for number in range(1, 4):
        lab.interface(f"wg{number}", wg0.manifest, wg0.place)
    assert {"wg0", "wg1", "wg2", "wg3"} <= wg0.place.links().keys()


@pytest.mark.requirement("IF-19")
def test_driver_enables_sg_tx_gso_and_tso_offload(wg0: Interface) -> None:
    if wg0.manifest.kind != "kernel":
        raise Unsupported(f"what the TUN device of {wg0.manifest.name} takes is its own choice")
    found = offloads(wg0.place, "wg0")
    assert {name: found[name] for name in ("sg", "tx", "gso", "tso")} == dict.fromkeys(("sg", "tx", "gso", "tso"), True)


@pytest.mark.requirement("MTU-11")
def test_mtu_is_accepted_only_within_bounds_of_link(wg0: Interface) -> None:
    lowest, highest = MTUS[wg0.manifest.kind]
    for mtu in (lowest, highest, 1420):
        wg0.place.set_link("wg0", mtu=mtu)
        assert wg0.place.links()["wg0"]["mtu"] == mtu
    for mtu in (lowest - 1, highest + 1):
        with pytest.raises(HarnessError, match="Invalid argument"):
            wg0.place.set_link("wg0", mtu=mtu)
    assert wg0.place.links()["wg0"]["mtu"] == 1420
