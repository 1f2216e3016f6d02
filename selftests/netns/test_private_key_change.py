"""Change the private key: the new identity applies at once (`loopback`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import DATA, INITIATION, V4_OF_A, V4_OF_B, V6_OF_A, Capture, DeviceConfig, PeerConfig, allowed_ips, twin

if TYPE_CHECKING:
    from harness import Tunnel

PORT_OF_A = 1


@pytest.mark.scenario("N16")
@pytest.mark.requirement("HS-29")
@pytest.mark.bug("IB-22")
def test_new_private_key_forces_handshake_before_data(loopback: Tunnel) -> None:
    a, b, old = loopback.a, loopback.b, loopback.pub_a
    with twin("the tunnel works with the old key"):
        loopback.must_ping("ns1", V4_OF_B)
    loopback.key_a = loopback.lab.key("key3")
    allowed = allowed_ips(f"{V4_OF_A}/32", f"{V6_OF_A}/128")
    newcomer = PeerConfig(public_key=loopback.pub_a, preshared_key=loopback.psk, allowed_ips=allowed)
    with Capture(loopback.nodes["ns0"], "lo") as wire:
        # B gets the new key first: wireguard-go may initiate as soon as A has the key. If B refused this initiation,
        # the retry 5 s later would come too late for the ping.
        b.set(DeviceConfig(peers=(newcomer,)))
        a.set(DeviceConfig(private_key=loopback.key_a))
        b.set_peer(old, remove=True)
        loopback.must_ping("ns1", V4_OF_B)
        sent = [message.kind for message in wire.messages(port=PORT_OF_A)]
    assert sent[:2] == [INITIATION, DATA], f"with its new key A sent messages of the types {sent}"
    assert loopback.seen_by_b().latest_handshake > 0
    assert {peer.public_key for peer in b.get().peers} == {loopback.pub_a}
