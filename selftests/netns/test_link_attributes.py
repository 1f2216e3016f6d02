"""Check link type, flags, offloads and MTU bounds of an interface (one interface)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import HarnessError, Unsupported, offloads

if TYPE_CHECKING:
    from harness import Interface, Lab, Manifest

# Kernel: the largest 31-bit multiple of the padding, less the overhead of a message. TUN: the bounds of its driver.
MTUS = {"kernel": (0, 0x7FFFFFFF // 16 * 16 - 80), "uapi": (68, 65535)}


@pytest.fixture
def wg0(lab: Lab, implementation: Manifest) -> Interface:
    return lab.interface("wg0", implementation, lab.node("ns0"))


@pytest.mark.requirement("IF-01", "IF-02")
def test_link_is_point_to_point_without_link_layer_address(wg0: Interface) -> None:
    wg0.up()
    (shown,) = wg0.place.run_json(["ip", "-d", "-j", "link", "show", "wg0"])
    is_kernel = wg0.manifest.kind == "kernel"
    assert (shown["link_type"], "address" in shown) == ("none", False)
    assert shown["linkinfo"]["info_kind"] == ("wireguard" if is_kernel else "tun")
    flags = {*shown["flags"]}
    # A TUN device has its own queue and the flag MULTICAST.
    assert flags - {"UP", "LOWER_UP"} == {"POINTOPOINT", "NOARP"} | (set() if is_kernel else {"MULTICAST"})
    assert (shown["qdisc"] == "noqueue") == is_kernel


@pytest.mark.requirement("IF-01")
def test_several_interfaces_are_created_in_one_namespace(lab: Lab, wg0: Interface) -> None:
    if wg0.manifest.kind != "kernel":
        raise Unsupported(f"each interface of {wg0.manifest.name} is a program")
    for number in range(1, 4):
        lab.interface(f"wg{number}", wg0.manifest, wg0.place)
    assert {"wg0", "wg1", "wg2", "wg3"} <= wg0.place.links().keys()


@pytest.mark.requirement("IF-19")
def test_driver_enables_sg_tx_gso_and_tso_offload(wg0: Interface) -> None:
    if wg0.manifest.kind != "kernel":
        raise Unsupported(f"{wg0.manifest.name} chooses the offloads of its TUN device")
    switches = offloads(wg0.place, "wg0")
    expected = dict.fromkeys(("sg", "tx", "gso", "tso"), True)
    assert {name: switches[name] for name in expected} == expected


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
