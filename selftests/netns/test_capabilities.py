"""Check that each program has the capabilities that its manifest declares, and no others.

The lab does not use a capability that is not declared. These tests do, on an interface without a health check.
"""

from __future__ import annotations

import errno
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

from harness import (
    DIRECT,
    V4_OF_A,
    V4_OF_B,
    ControlError,
    DeviceConfig,
    Endpoint,
    PeerConfig,
    Registry,
    Tunnel,
    Unsupported,
    scaled,
)
from harness.implementations import interface

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import Interface, Key, Lab, Manifest

ELSEWHERE: Final = Endpoint.parse("127.0.0.1:9")
ADDRESSED: Final = (Endpoint.parse("10.0.0.1:1"), Endpoint.parse("10.0.0.2:1"))
# Seconds within which an ICMP error arrives if the program sends one.
AT_ONCE: Final = 1.0
IP_RECVERR: Final = 11  # linux/in.h: report ICMP errors on the socket, transient ones too
# From an ICMP error, and from the driver to a local sender (ERR-02, ERR-03).
REFUSALS: Final = frozenset({errno.EHOSTUNREACH, errno.ENOKEY})


@pytest.fixture
def alice(lab: Lab) -> Key:
    return lab.key("alice").public()


@contextmanager
def unwatched(lab: Lab, implementation: Manifest) -> Iterator[tuple[Interface, list[str]]]:
    """Create an interface that the lab does not check; the list gets its health complaints after the block."""
    iface = interface.create("wg0", implementation, lab.node("ns0"), lab.directory / "probe.log")
    complaints: list[str] = []
    try:
        yield iface, complaints
    finally:
        complaints += iface.close()


def is_done(iface: Interface, config: DeviceConfig, wanted: Callable[[], bool]) -> bool:
    """Return whether a configuration is accepted and read back."""
    try:
        iface.control.set(config)
        return wanted()
    except ControlError:
        return False


def contradiction(capability: str, implementation: Manifest, works: bool, complaints: list[str]) -> str:
    """Describe how a program differs from its manifest, for the message of an assertion."""
    declares = "declares" if capability in implementation.capabilities else "does not declare"
    seen = "; ".join(complaints) or "no complaints"
    return f"{implementation.name} {declares} {capability}, and it {'works' if works else 'does not work'}: {seen}"


@pytest.mark.requirement("CFG-44")
@pytest.mark.bug("IB-61")
def test_peer_update_works_if_and_only_if_declared(lab: Lab, implementation: Manifest, alice: Key) -> None:
    declared = "update-peer" in implementation.capabilities
    change = DeviceConfig(peers=(PeerConfig(public_key=alice, endpoint=ELSEWHERE),))
    with unwatched(lab, implementation) as (iface, complaints):
        iface.set(DeviceConfig(private_key=lab.key("own"), peers=(PeerConfig(public_key=alice),)))
        done = is_done(iface, change, lambda: iface.peer(alice).endpoint == ELSEWHERE)
    assert (done, not complaints) == (declared, declared), contradiction(
        "update-peer", implementation, done, complaints
    )


@pytest.mark.requirement("CFG-44")
@pytest.mark.bug("IB-61")
def test_peer_before_private_key_works_if_and_only_if_declared(lab: Lab, implementation: Manifest, alice: Key) -> None:
    declared = "peer-before-key" in implementation.capabilities
    with unwatched(lab, implementation) as (iface, complaints):
        done = is_done(
            iface,
            DeviceConfig(peers=(PeerConfig(public_key=alice),)),
            lambda: [peer.public_key for peer in iface.get().peers] == [alice],
        )
    assert (done, not complaints) == (declared, declared), contradiction(
        "peer-before-key", implementation, done, complaints
    )


@pytest.mark.parametrize("capability", ["peer-before-key", "update-peer"])
def test_lab_refuses_to_use_undeclared_capability(
    lab: Lab, implementation: Manifest, alice: Key, capability: str
) -> None:
    if capability in implementation.capabilities:
        pytest.skip(f"{implementation.name} declares {capability}")
    wg0 = lab.interface("wg0", implementation, lab.node("ns0"))
    if capability == "update-peer":
        wg0.set(DeviceConfig(private_key=lab.key("own"), peers=(PeerConfig(public_key=alice),)))
    with pytest.raises(Unsupported, match=f"{implementation.name} does not declare the capability {capability}"):
        wg0.set_peer(alice, endpoint=ELSEWHERE)


@pytest.mark.requirement("ERR-02", "ERR-03")
def test_icmp_unreachable_is_sent_if_and_only_if_declared(lab: Lab, implementation: Manifest) -> None:
    wg0 = lab.interface("wg0", implementation, lab.node("ns0"))
    wg0.set(DeviceConfig(private_key=lab.key("own")))
    wg0.up(f"{V4_OF_A}/24")
    with wg0.place.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((V4_OF_B, 9))
        sender.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        sender.settimeout(scaled(AT_ONCE))
        try:
            sender.send(b"to nobody")
            sender.recv(1)
            answer = None
        except OSError as error:
            answer = error.errno
    declared = "icmp-unreachable" in implementation.capabilities
    refused, got = answer in REFUSALS, "no error" if answer is None else errno.errorcode[answer]
    assert refused == declared, contradiction("icmp-unreachable", implementation, refused, [f"the sender got {got}"])


@pytest.mark.requirement("RT-11")
@pytest.mark.bug("IB-38")
def test_source_address_is_not_sticky_when_not_declared(lab: Lab, implementation: Manifest) -> None:
    if "sticky-source" in implementation.capabilities:
        pytest.skip(f"{implementation.name} declares sticky-source, which test_source_address tests")
    direct = Tunnel(lab, DIRECT, implementation, Registry().get("refwg"))
    direct.nodes["ns1"].add_address("veth1", *(f"{endpoint.host}/24" for endpoint in ADDRESSED))
    direct.nodes["ns2"].add_address("veth2", "10.0.0.3/24")
    answered = []
    for endpoint in ADDRESSED:
        direct.b.set_peer(direct.pub_a, endpoint=endpoint)
        direct.must_ping("ns2", V4_OF_A)
        answered.append(direct.seen_by_b().endpoint)
    assert tuple(answered) != ADDRESSED
