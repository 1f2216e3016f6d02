"""Ping through sockets in the birth namespace, and check exact counters (`loopback`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import V4_OF_A, V4_OF_B, V6_OF_A, V6_OF_B

if TYPE_CHECKING:
    from harness import Interface, Tunnel

# Ten echo requests of 84 bytes are padded to 96 and sealed to 128 each; a handshake is 148 one way and 92 the other.
PINGS = 10
WITH_RESPONSE = PINGS * 128 + 92
WITH_INITIATION = PINGS * 128 + 148
KEEPALIVE = 32
INNER = PINGS * 84
SIZES = {KEEPALIVE: "a keepalive", 92: "a response", 128: "an echo", 148: "an initiation"}


@pytest.mark.core
@pytest.mark.scenario("N01")
@pytest.mark.requirement("NS-01")
def test_interface_keeps_its_socket_in_its_birth_namespace(loopback: Tunnel) -> None:
    loopback.a.place.run(["ip", "route", "get", V4_OF_B])
    assert set(loopback.nodes["ns1"].links()) == set(loopback.nodes["ns2"].links()) == {"lo", "wg0"}
    loopback.must_ping("ns2", V4_OF_A)
    assert {1, 2} <= loopback.nodes["ns0"].udp_ports()


@pytest.mark.core
@pytest.mark.scenario("N02")
@pytest.mark.requirement("IF-11", "IF-12")
@pytest.mark.bug("IB-64")
def test_transfer_counters_are_exact_after_ten_pings(loopback: Tunnel) -> None:
    loopback.must_ping("ns2", V4_OF_A, count=PINGS)
    a, b = loopback.counted()
    # A keepalive may confirm the session before the first echo request does.
    initiator = (WITH_INITIATION, WITH_INITIATION + KEEPALIVE)
    counters = {
        "B received": (b.rx_bytes, (WITH_RESPONSE,)),
        "A sent": (a.tx_bytes, (WITH_RESPONSE,)),
        "B sent": (b.tx_bytes, initiator),
        "A received": (a.rx_bytes, (b.tx_bytes,) if b.tx_bytes in initiator else initiator),
    }
    wrong = [f"{name} {off(n, right[0])}" for name, (n, right) in sorted(counters.items()) if n not in right]
    assert not wrong, "; ".join(wrong)
    assert min(a.latest_handshake, b.latest_handshake) > 0


def off(counted: int, expected: int) -> str:
    """Describe by how much a counter is wrong, and a message that would explain it."""
    by = abs(counted - expected)
    message = f", as long as {SIZES[by]}" if by in SIZES else ""
    return f"{counted} bytes, not {expected}: {by} too {'many' if counted > expected else 'few'}{message}"


@pytest.mark.core
@pytest.mark.scenario("N02")
@pytest.mark.requirement("IF-12")
def test_wg_and_ip_show_transfer_of_ten_pings(loopback: Tunnel) -> None:
    loopback.must_ping("ns2", V4_OF_A, count=PINGS)
    for side, peer in zip((loopback.a, loopback.b), loopback.counted(), strict=True):
        shown = side.wg("show", side.name, "transfer").stdout.split()
        assert shown == [str(peer.public_key), str(peer.rx_bytes), str(peer.tx_bytes)]
        assert _link_bytes(side) == _expected_link_bytes(side, (peer.rx_bytes, peer.tx_bytes))


def _link_bytes(side: Interface) -> tuple[int, int]:
    """Return the rx and tx bytes of the link by `ip -s`."""
    (link,) = side.place.run_json(["ip", "-j", "-s", "link", "show", side.name])
    return link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"]


def _expected_link_bytes(side: Interface, messages: tuple[int, int]) -> tuple[int, int]:
    # A TUN device sees the inner packets only, the driver's counts whole messages.
    return messages if side.manifest.kind == "kernel" else (INNER, INNER)


@pytest.mark.core
@pytest.mark.scenario("N03")
@pytest.mark.requirement("CK-01")
@pytest.mark.parametrize(
    ("sender", "address"),
    [
        pytest.param("ns2", V4_OF_A, id="B-to-A-v4"),
        pytest.param("ns1", V4_OF_B, id="A-to-B-v4"),
        pytest.param("ns2", V6_OF_A, id="B-to-A-v6"),
        pytest.param("ns1", V6_OF_B, id="A-to-B-v6"),
    ],
)
def test_ten_pings_are_all_answered(loopback: Tunnel, sender: str, address: str) -> None:
    loopback.must_ping(sender, address, count=PINGS)
