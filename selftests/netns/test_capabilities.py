"""Check that each program has the capabilities that its manifest declares, and no others.

The lab does not use a capability that is not declared. These tests do, by the probes of `wg-interop probe`: each has a
lab of its own, so that a program that ends in one probe does not fail the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from harness import DeviceConfig, Endpoint, PeerConfig, Registry, Unsupported, differs
from harness.lab.probes import probe

if TYPE_CHECKING:
    from harness import Lab, Manifest
    from harness.lab.probes import Observation

ELSEWHERE: Final = Endpoint.parse("127.0.0.1:9")


def observe(lab: Lab, implementation: Manifest, capability: str) -> Observation:
    """Run the probe of a capability, with refwg as the peer."""
    return probe(lab.directory / "probe", lab.seed, implementation, Registry().get("refwg"), capability)


def contradiction(capability: str, implementation: Manifest, observed: Observation) -> str:
    """Describe how a program differs from its manifest, for the message of an assertion."""
    declares = "declares" if capability in implementation.capabilities else "does not declare"
    works = "works" if observed.works else "does not work"
    return f"{implementation.name} {declares} {capability}, and it {works}: {observed.seen}"


@pytest.mark.requirement("CFG-44")
@pytest.mark.bug("IB-61")
def test_peer_update_works_if_and_only_if_declared(lab: Lab, implementation: Manifest) -> None:
    declared = "update-peer" in implementation.capabilities
    observed = observe(lab, implementation, "update-peer")
    why = contradiction("update-peer", implementation, observed)
    assert (observed.works, not observed.complaints) == (declared, declared), why


@pytest.mark.requirement("CFG-44")
@pytest.mark.bug("IB-61")
def test_peer_before_private_key_works_if_and_only_if_declared(lab: Lab, implementation: Manifest) -> None:
    declared = "peer-before-key" in implementation.capabilities
    observed = observe(lab, implementation, "peer-before-key")
    why = contradiction("peer-before-key", implementation, observed)
    assert (observed.works, not observed.complaints) == (declared, declared), why


@pytest.mark.parametrize("capability", ["peer-before-key", "update-peer"])
def test_lab_refuses_to_use_undeclared_capability(lab: Lab, implementation: Manifest, capability: str) -> None:
    if capability in implementation.capabilities:
        pytest.skip(f"{implementation.name} declares {capability}")
    wg0, alice = lab.interface("wg0", implementation, lab.node("ns0")), lab.key("alice").public()
    if capability == "update-peer":
        wg0.set(DeviceConfig(private_key=lab.key("own"), peers=(PeerConfig(public_key=alice),)))
    with pytest.raises(Unsupported, match=f"{implementation.name} does not declare the capability {capability}"):
        wg0.set_peer(alice, endpoint=ELSEWHERE)


@pytest.mark.requirement("ERR-02", "ERR-03")
def test_icmp_unreachable_is_sent_if_and_only_if_declared(lab: Lab, implementation: Manifest) -> None:
    observed = observe(lab, implementation, "icmp-unreachable")
    why = contradiction("icmp-unreachable", implementation, observed)
    assert observed.works == ("icmp-unreachable" in implementation.capabilities), why


@pytest.mark.requirement("RT-11")
def test_source_address_is_not_sticky_when_not_declared(lab: Lab, implementation: Manifest) -> None:
    if "sticky-source" in implementation.capabilities:
        pytest.skip(f"{implementation.name} declares sticky-source, which test_source_address tests")
    observed = observe(lab, implementation, "sticky-source")
    assert not observed.works, contradiction("sticky-source", implementation, observed)
    differs(f"the source address is not sticky: {observed.seen}", by=[implementation.name])


@pytest.mark.parametrize(
    "capability",
    [
        "roaming",
        "ipv6-underlay",
        "listen-port-change",
        "persistent-keepalive",
        "remove-allowed-ip",
        "icmp-through-nat",
        "fwmark",
        pytest.param("bounded-loop", marks=pytest.mark.alone),
    ],
)
def test_capability_works_if_and_only_if_declared(lab: Lab, implementation: Manifest, capability: str) -> None:
    observed = observe(lab, implementation, capability)
    why = contradiction(capability, implementation, observed)
    assert observed.works == (capability in implementation.capabilities), why
