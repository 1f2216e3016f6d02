"""Check which senders get ICMP errors, and which must not (`nat`, `direct`, one interface)."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final

import pytest

from harness import (
    DATA,
    V4_OF_A,
    V4_OF_B,
    V6_OF_B,
    Capture,
    DeadlineExceeded,
    DeviceConfig,
    Endpoint,
    PeerConfig,
    Unsupported,
    allowed_ips,
    differs,
    error_for,
    let_pass,
    poll_until,
    twin,
    udp_message,
)
from harness.traffic.icmp_errors import AT_ONCE, DISCARD, Error

if TYPE_CHECKING:
    from harness import Lab, Manifest, NetNS, Tunnel

PROBE: Final = 1.0
ANSWER_WAIT: Final = 0.2
PORT: Final = 1
OTHER_OF_B: Final = "192.168.241.77"
# No type, each type with its length and zeros, and the longest datagram.
GARBAGE: Final = (
    b"", b"?", bytes(32), *(bytes([kind]).ljust(size, b"\0") for kind, size in ((1, 148), (2, 92), (3, 64), (4, 32))),
    bytes([4]).ljust(65507, b"\0"),
)  # fmt: skip
NOBODY: Final = ("192.168.241.99", "fd00::99")
PEER: Final = ("192.168.241.2", "fd00::2")
HOST_UNREACHABLE, ADDRESS_UNREACHABLE = (3, 1), (1, 3)
# The driver returns a local sender a more precise errno: a key or an endpoint is missing.
LOCAL_ERRORS: Final = (errno.ENOKEY, errno.EDESTADDRREQ)
TRANSLATING = """\
table ip translating {
    chain postrouting {
        type nat hook postrouting priority srcnat
        ip saddr 10.0.0.0/24 ip daddr 192.168.241.0/24 counter snat to 192.168.241.2 comment "translated"
    }
}
"""
GUARDING = """\
table ip guarding {
    chain prerouting {
        type filter hook prerouting priority raw
        iifname "vethrs" ip saddr != 10.0.0.0/24 counter drop comment "strangers"
    }
}
"""


# From the interface


@pytest.mark.scenario("N24b")
@pytest.mark.requirement("ERR-02", "ERR-03", "ERR-04")
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_sender_gets_icmp_unreachable_without_peer_or_endpoint(lab: Lab, implementation: Manifest, family: int) -> None:
    ns1 = lab.node("ns1")
    wg0 = lab.interface("wg0", implementation, ns1)
    without_endpoint = PeerConfig(public_key=lab.key("peer").public(), allowed_ips=allowed_ips(*PEER))
    wg0.set(DeviceConfig(private_key=lab.key("own"), peers=(without_endpoint,)))
    own = ("192.168.241.1", "fd00::1")[family]
    declared = "icmp-unreachable" in implementation.capabilities
    wg0.up(f"{own}/{(24, 112)[family]}")
    for address, local in zip((NOBODY[family], PEER[family]), LOCAL_ERRORS, strict=True):
        try:
            send_errno, error = error_for(ns1, address, within=AT_ONCE if declared else PROBE)
        except DeadlineExceeded:
            if declared:
                raise
            differs(
                f"a datagram to {address}, without a peer or endpoint, is lost, and no error arrives within {PROBE:g} s"
            )
        expected = (HOST_UNREACHABLE, ADDRESS_UNREACHABLE)[family]
        assert error == Error(errno.EHOSTUNREACH, expected, own)
        assert send_errno == (local if implementation.kind == "kernel" else 0)


@pytest.mark.scenario("N24")
@pytest.mark.requirement("ERR-02")
def test_icmp_error_reaches_original_sender_through_nat(nat: Tunnel) -> None:
    ns0, ns2 = nat.nodes["ns0"], nat.nodes["ns2"]
    ns2.sysctl("net.ipv4.ip_forward", 1)
    ns2.nft(TRANSLATING)
    ns0.add_route(f"{V4_OF_A}/32", via="10.0.0.100")
    nat.keep_alive(1)
    with twin("ns0 reaches A through B, and its firewall counts packets from other networks"):
        nat.must_ping("ns1", V4_OF_B)
        nat.must_ping("ns0", V4_OF_A)
        assert ns2.nft_counters()["translated"] == 1
        ns0.nft(GUARDING)
        udp_message(ns2, "10.0.0.1", DISCARD, b"let me in", source=V4_OF_B)
        assert poll_until(lambda: ns0.nft_counters()["strangers"], lambda packets: packets > 0, 1.0) == 1
    nat.b.set_peer(nat.pub_a, remove=True)
    declared = "icmp-through-nat" in nat.b.manifest.capabilities
    try:
        _, error = error_for(ns0, V4_OF_A, within=AT_ONCE if declared else PROBE)
    except DeadlineExceeded:
        if declared:
            raise
        raise Unsupported(f"{nat.b.manifest.name} does not declare the capability icmp-through-nat") from None
    assert error == Error(errno.EHOSTUNREACH, HOST_UNREACHABLE, "10.0.0.100")


# From behind the tunnel


@pytest.mark.requirement("ERR-09")
@pytest.mark.parametrize(
    ("address", "beyond"), [(V4_OF_B, "10.9.9.9/32"), (V6_OF_B, "fd00:99::9/128")], ids=["v4", "v6"]
)
def test_port_unreachable_and_time_exceeded_pass_through_tunnel(direct: Tunnel, address: str, beyond: str) -> None:
    ns1, ns2 = connect(direct)
    is_v6 = ":" in address
    ns2.sysctl("net.ipv6.conf.all.forwarding" if is_v6 else "net.ipv4.ip_forward", 1)
    ns2.add_route(beyond, dev="veth2")
    ns1.add_route(beyond, dev="wg0")
    direct.a.set_peer(direct.pub_b, allowed_ips=allowed_ips(beyond))
    direct.must_ping("ns1", address)
    closed, exceeded = ((1, 4), (3, 0)) if is_v6 else ((3, 3), (11, 0))
    assert error_for(ns1, address) == (0, Error(errno.ECONNREFUSED, closed, address))
    host = beyond.partition("/")[0]
    assert error_for(ns1, host, hops=1) == (0, Error(errno.EHOSTUNREACH, exceeded, address))


@pytest.mark.requirement("ERR-06")
def test_inner_packet_with_refused_source_is_not_answered(direct: Tunnel) -> None:
    ns1, ns2 = connect(direct)
    direct.must_ping("ns1", V4_OF_B)
    ns2.add_address("wg0", f"{OTHER_OF_B}/24")
    direct.a.set_peer(direct.pub_b, allowed_ips=allowed_ips(f"{OTHER_OF_B}/32"))
    with twin("A's stack reports the closed port to an allowed source"):
        assert error_for(ns2, V4_OF_A, source=OTHER_OF_B)[1].errno == errno.ECONNREFUSED
    direct.a.set_peer(direct.pub_b, replace_allowed_ips=True, allowed_ips=allowed_ips(f"{V4_OF_B}/32"))
    with Capture(ns1, "veth1") as wire:
        udp_message(ns2, V4_OF_A, DISCARD, b"refused", source=OTHER_OF_B)
        # The answer arrives after anything else that A sent.
        direct.must_ping("ns2", V4_OF_A)
        back = [str(message) for message in wire.messages(kind=DATA) if not message.is_keepalive]
    assert len(back) == 1, f"A sent more than the answer to the ping: {back}"


def connect(direct: Tunnel) -> tuple[NetNS, NetNS]:
    """Give both nodes an outer address, and A the endpoint of B."""
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    ns1.add_address("veth1", "10.0.0.1/24")
    ns2.add_address("veth2", "10.0.0.2/24")
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint("10.0.0.2", 2))
    return ns1, ns2


# From the listen port


@pytest.mark.requirement("ERR-01", "ROB-08")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_garbage_is_never_answered(lab: Lab, implementation: Manifest, host: str) -> None:
    ns1 = lab.node("ns1")
    wg0 = lab.interface("wg0", implementation, ns1)
    wg0.set(DeviceConfig(private_key=lab.key("own"), listen_port=PORT))
    wg0.up()
    with twin("a closed port answers"):
        assert error_for(ns1, host)[1].errno == errno.ECONNREFUSED
    with ns1.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((host, PORT))
        # Twice: a program that closes its port after the first datagram has it open for those that already wait.
        for _ in range(2):
            for garbage in GARBAGE:
                sender.send(garbage)
            let_pass(ANSWER_WAIT, "an answer would come at once; its absence is not an event")
            with pytest.raises(BlockingIOError):
                sender.recv(65535, socket.MSG_DONTWAIT)
