from __future__ import annotations

import errno
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from refwg.boundary import Endpoint, LocalAddress, Transmit
from refwg.errors import ConfigError
from refwg.rtnetlink import Monitor, RtnetlinkSocket
from refwg.socket import UdpSockets
from selftests.support.pair import Pair
from selftests.support.sandbox import run_in_sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCALHOST = {4: "127.0.0.1", 6: "::1"}


def endpoint(version: int, port: int, source: LocalAddress | None = None) -> Endpoint:
    return Endpoint(ip_address(LOCALHOST[version]).packed, port, 0, source)


def listener(version: int, sockets: UdpSockets) -> socket.socket:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    (sock,) = [sock for sock in sockets.sockets if sock.family == family]
    sock.setblocking(True)
    sock.settimeout(2)
    return sock


@pytest.fixture
def sockets() -> Iterator[UdpSockets]:
    rtnetlink, monitor = RtnetlinkSocket(), Monitor(links=True, routes=True)
    sockets = UdpSockets(rtnetlink, monitor)
    yield sockets
    sockets.close()
    rtnetlink.close()
    monitor.close()


@pytest.mark.requirement("IF-04", "MSG-19")
def test_ipv4_and_ipv6_sockets_share_port(sockets: UdpSockets) -> None:
    port = sockets.open(0)
    assert [sock.getsockname()[1] for sock in sockets.sockets] == [port, port]


@pytest.mark.requirement("CFG-19", "CFG-20", "IF-06")
def test_sockets_stay_unchanged_when_new_port_is_taken(sockets: UdpSockets) -> None:
    port = sockets.open(0)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
        other.bind(("::1", 0))
        with pytest.raises(ConfigError) as error:
            sockets.open(other.getsockname()[1])
    assert error.value.errno == errno.EADDRINUSE
    assert [sock.getsockname()[1] for sock in sockets.sockets] == [port, port]
    sockets.close()
    assert sockets.sockets == []


@pytest.mark.requirement("RT-11", "DT-28", "RT-01")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mark", [0, 1, 2, 3])
def test_received_datagram_has_sender_local_address_and_ecn(sockets: UdpSockets, version: int, mark: int) -> None:
    port = sockets.open(0)
    assert sockets.send(Transmit(b"datagram", endpoint(version, port), mark, None)) == ""
    received = sockets.receive(listener(version, sockets))
    assert received is not None
    datagram, sender, ecn = received
    assert (datagram, sender.address, sender.port, ecn) == (b"datagram", endpoint(version, 0).address, port, mark)
    assert sender.source == LocalAddress(sender.address, 1 if version == 4 else 0)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("is_early", [True, False])
def test_batch_is_sent_and_received_by_one_call_each(sockets: UdpSockets, version: int, is_early: bool) -> None:
    if is_early:
        assert sockets.join_received()
    port = sockets.open(0)
    if not is_early:
        assert sockets.join_received()
    sock = listener(version, sockets)
    buffer = memoryview(bytearray(65536))
    for datagrams, segment in ((b"abcabcab", 3), (b"alone", 0)):
        assert sockets.send(Transmit(datagrams, endpoint(version, port), 2, None), segment) == ""
        batch = sockets.receive_into(sock, buffer)
        assert batch is not None
        assert (bytes(buffer[: batch.length]), batch.segment, batch.ecn) == (datagrams, segment or 5, 2)
        assert batch.endpoint.source == LocalAddress(batch.endpoint.address, 1 if version == 4 else 0)
    sock.setblocking(False)
    assert sockets.receive_into(sock, buffer) is None


def test_kernel_without_udp_gro_is_noticed(sockets: UdpSockets, monkeypatch: pytest.MonkeyPatch) -> None:
    sockets.open(0)
    monkeypatch.setattr("refwg.socket._UDP_GRO", 9999)
    assert not sockets.join_received()


@pytest.mark.requirement("RT-12")
@pytest.mark.parametrize(("version", "gone"), [(4, "203.0.113.9"), (6, "2001:db8::9")])
def test_endpoint_source_is_cleared_when_address_is_gone(sockets: UdpSockets, version: int, gone: str) -> None:
    port = sockets.open(0)
    peer = Pair().a.peer
    peer.endpoint = endpoint(version, port, LocalAddress(ip_address(gone).packed, 1))
    assert sockets.send(Transmit(b"x", peer.endpoint, 0, peer)) == ""
    assert peer.endpoint == endpoint(version, port)
    stranger = endpoint(version, port, LocalAddress(ip_address(gone).packed, 1))
    assert sockets.send(Transmit(b"x", stranger, 0, None)) == ""


@pytest.mark.requirement("RT-13", "RT-14")
@pytest.mark.parametrize(("version", "interface", "is_kept"), [(4, 1, True), (4, 99, False), (6, 0, True)])
def test_endpoint_source_is_cleared_when_interface_differs(
    sockets: UdpSockets, version: int, interface: int, is_kept: bool
) -> None:
    port, peer = sockets.open(0), Pair().a.peer
    peer.endpoint = endpoint(version, port, LocalAddress(endpoint(version, 0).address, interface))
    assert sockets.send(Transmit(b"x", peer.endpoint, 0, peer)) == ""
    assert (peer.endpoint.source is not None) is is_kept


def test_socket_errors_are_returned_and_not_raised(sockets: UdpSockets) -> None:
    assert sockets.send(Transmit(b"x", endpoint(4, 1), 0, None)) == "EAFNOSUPPORT"
    port = sockets.open(0)
    assert sockets.send(Transmit(bytes(70000), endpoint(4, port), 0, None)) == "EMSGSIZE"
    listener(4, sockets).setblocking(False)
    assert sockets.receive(sockets.sockets[0]) is None


@pytest.mark.requirement("MTU-15")
def test_icmp_error_is_ignored_and_next_datagram_is_read(sockets: UdpSockets) -> None:
    port = sockets.open(0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        nobody = other.getsockname()[1]
        sock = listener(4, sockets)
        sock.connect(("127.0.0.1", nobody))
        other.sendto(b"real", ("127.0.0.1", port))
    sock.send(b"to nobody")
    assert sockets.receive(sock) is None
    received = sockets.receive(sock)
    assert received is not None
    assert received[0] == b"real"


def test_receive_from_closed_socket_returns_none(sockets: UdpSockets) -> None:
    sockets.open(0)
    sock = listener(4, sockets)
    sockets.close()
    assert sockets.receive(sock) is None


def test_interface_is_found_by_name_or_refused_with_einval(sockets: UdpSockets) -> None:
    assert sockets.interface_index("lo") == 1
    for name in ("no such one", "nul\0", "\xff", "a" * 5000):
        with pytest.raises(ConfigError) as error:
            sockets.interface_index(name)
        assert error.value.errno == errno.EINVAL


def test_machine_without_ipv6_has_ipv4_socket_alone(sockets: UdpSockets, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def without_ipv6(family: int, *rest: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6")
        return real(family, *rest)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    assert sockets.open(0) > 0
    assert [sock.family for sock in sockets.sockets] == [socket.AF_INET]


DETOUR = """
        import subprocess
        from ipaddress import ip_address
        from refwg.boundary import Endpoint, LocalAddress, Transmit
        from refwg.rtnetlink import Monitor, RtnetlinkSocket
        from refwg.socket import UdpSockets
        from selftests.support.pair import Pair
        def ip(text): subprocess.run(["ip", *text.split()], check=True)
        for number in (1, 2):
            ip(f"link add v{number} type veth peer name w{number}"); ip(f"link set v{number} up")
            ip(f"link set w{number} up"); ip(f"address add 10.0.{number}.1/24 dev v{number}")
        ip("address add 10.0.1.9/24 dev v1")
        ip("route add 10.9.0.0/16 dev v1 metric 5")
        sockets, peer = UdpSockets(RtnetlinkSocket(), Monitor(links=True, routes=True)), Pair().a.peer
        sockets.open(5)
        source = LocalAddress(bytes([10, 0, 1, 9]), sockets.interface_index("v1"))
        peer.endpoint = Endpoint(bytes([10, 9, 0, 1]), 5, 0, source)
        def send():
            why = sockets.send(Transmit(b"x", peer.endpoint, 0, peer))
            return why or "sent", peer.endpoint.source == source
"""


@pytest.mark.requirement("RT-11")
def test_datagram_is_sent_from_chosen_source_address() -> None:
    code = """
        loopback = sockets.interface_index("lo")
        for number in (9, 1):
            source = LocalAddress(bytes([10, 0, 1, number]), loopback)
            print(sockets.send(Transmit(b"x", Endpoint(bytes([10, 0, 1, 1]), 5, 0, source), 0x88, None)))
            print(*sockets.receive(sockets.sockets[0])[1].address)
    """
    assert run_in_sandbox(DETOUR, code) == "\n10 0 1 9\n\n10 0 1 1\n"


# What no interface has is not ours, whatever bind(2) or the table `local` says.
SPECIAL_SOURCES = """
        from pathlib import Path
        ip("address add 10.6.6.6 peer 10.7.7.7/32 dev v1"); ip("route add local 10.0.5.0/24 dev lo")
        ip("-6 address add fd00::1/64 dev v1 nodad"); ip("-6 address add fd00::2/64 dev v1 nodad preferred_lft 0")
        ip("-6 route add local fd00:5::/64 dev lo")
        for family in ("ipv4", "ipv6"):
            Path(f"/proc/sys/net/{family}/ip_nonlocal_bind").write_text("1")
        Path("/proc/sys/net/ipv6/conf/v1/forwarding").write_text("1")
        def kept(destination, source):
            address = ip_address(source).packed
            interface = sockets.interface_index("v1") if len(address) == 4 else 0
            peer.endpoint = Endpoint(ip_address(destination).packed, 5, 0, LocalAddress(address, interface))
            sent = sockets.send(Transmit(b"x", peer.endpoint, 0, peer))
            return (source, peer.endpoint.source is not None, sent)
        print(kept("10.9.0.1", "10.0.1.9")[1:], kept("fd00::9", "fd00::2")[1:])
"""


@pytest.mark.requirement("RT-12")
@pytest.mark.parametrize(
    ("destination", "source"),
    [
        pytest.param("10.9.0.1", "10.0.1.255", id="broadcast"),
        pytest.param("10.9.0.1", "255.255.255.255", id="limited-broadcast"),
        pytest.param("10.9.0.1", "224.0.0.1", id="multicast"),
        pytest.param("10.9.0.1", "127.0.0.2", id="loopback-network"),
        pytest.param("10.9.0.1", "10.0.5.5", id="local-by-route"),
        pytest.param("10.9.0.1", "192.0.2.1", id="foreign"),
        # confirm_addr_indev wants an address of the same interface whose network contains it.
        pytest.param("10.9.0.1", "10.6.6.6", id="point-to-point"),
        pytest.param("fd00::9", "fd00::", id="v6-anycast"),
        pytest.param("fd00::9", "ff02::1", id="v6-multicast"),
        pytest.param("fd00::9", "fd00:5::5", id="v6-local-by-route"),
        pytest.param("fd00::9", "2001:db8::9", id="v6-foreign"),
    ],
)
def test_source_that_no_interface_has_is_cleared(destination: str, source: str) -> None:
    code = f"print(kept({destination!r}, {source!r}))"
    assert run_in_sandbox(DETOUR + SPECIAL_SOURCES, code) == f"(True, '') (True, '')\n('{source}', False, '')\n"


@pytest.mark.requirement("RT-13", "RT-12")
def test_source_is_checked_again_on_send_after_route_change() -> None:
    code = """
        print(send()); ip("route add 10.9.0.0/16 dev v2 metric 1"); print(peer.endpoint.source == source)
        ip("route delete 10.9.0.0/16 dev v2 metric 1"); print(send())
        ip("route add 10.9.0.0/16 dev v2 metric 1"); print(send())
    """
    assert run_in_sandbox(DETOUR, code) == "('sent', True)\nTrue\n('sent', True)\n('sent', False)\n"


@pytest.mark.requirement("RT-12", "ERR-07")
def test_source_survives_lost_route_but_not_lost_address() -> None:
    code = """
        ip("route delete 10.9.0.0/16 dev v1"); print(send())
        ip("route add 10.9.0.0/16 dev v1"); print(send())
        ip("address delete 10.0.1.9/24 dev v1"); print(send())
    """
    assert run_in_sandbox(DETOUR, code) == "('ENETUNREACH', True)\n('sent', True)\n('sent', False)\n"


@pytest.mark.requirement("RT-17", "RT-16")
def test_endpoint_source_is_checked_with_route_of_fwmark() -> None:
    code = """
        ip("route add 10.9.0.0/16 dev v2 table 7"); ip("rule add fwmark 7 table 7")
        print(send()); sockets.set_fwmark(7); print(send())
    """
    assert run_in_sandbox(DETOUR, code) == "('sent', True)\n('sent', False)\n"


@pytest.mark.requirement("CFG-31", "RT-17")
@pytest.mark.parametrize("is_open_first", [True, False])
def test_fwmark_of_32_bits_is_set_on_both_sockets(is_open_first: bool) -> None:
    code = f"""
        import socket
        from refwg.rtnetlink import Monitor, RtnetlinkSocket
        from refwg.socket import UdpSockets
        for mark in (0xFFFFFFFF, 0x80000000, 7, 0):
            sockets = UdpSockets(RtnetlinkSocket(), Monitor(links=True, routes=True))
            for do in (lambda: sockets.open(0), lambda: sockets.set_fwmark(mark))[::{1 if is_open_first else -1}]:
                do()
            marks = {{s.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) & 0xFFFFFFFF for s in sockets.sockets}}
            print(len(sockets.sockets), marks == {{mark}})
            sockets.close()
    """
    assert run_in_sandbox("", code) == "2 True\n" * 4


@pytest.mark.requirement("RT-11", "RT-17")
@pytest.mark.parametrize(
    ("rule", "is_kept"),
    [
        ("ipproto udp", False),
        ("ipproto tcp", True),
        ("sport 5", False),
        ("dport 9", False),
        ("dport 8", True),
        ("uidrange 0-0", False),
        ("from 10.0.1.9", False),
        ("to 10.9.0.1", False),
        ("iif lo", False),
        ("fwmark 3", False),
        ("fwmark 2", True),
        # The driver's flow has no DSCP, so the datagram does not take this route, and goes without its DSCP.
        ("tos 8", True),
    ],
)
def test_route_of_source_is_asked_for_with_whole_flow(rule: str, is_kept: bool) -> None:
    code = f"""
        sockets.set_fwmark(3); ip("route add 10.9.0.0/16 dev v2 table 7"); ip("rule add {rule} table 7")
        peer.endpoint = Endpoint(bytes([10, 9, 0, 1]), 9, 0, source)
        print(sockets.send(Transmit(b"x", peer.endpoint, 0x88, peer)), peer.endpoint.source == source)
    """
    assert run_in_sandbox(DETOUR, code) == f" {is_kept}\n"


@pytest.mark.requirement("RT-17")
@pytest.mark.parametrize(("rule", "tos"), [("tos 8", 2), ("tos 4", 0x8A)])
def test_dscp_is_not_sent_if_it_would_change_route(rule: str, tos: int) -> None:
    code = f"""
        import socket
        ip("route add 10.9.0.0/16 dev v2 table 7"); ip("rule add {rule} table 7")
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0x0300); wire.bind(("w1", 0x0800))
        wire.settimeout(5)
        ip("neighbour add 10.9.0.1 lladdr 02:00:00:00:00:01 dev v1")
        print(sockets.send(Transmit(b"x", Endpoint(bytes([10, 9, 0, 1]), 9), 0x8A, None)))
        print(wire.recv(99)[1])
    """
    assert run_in_sandbox(DETOUR, code) == f"\n{tos}\n"


@pytest.mark.parametrize("address", ["255.255.255.255", "10.0.1.255", "224.1.2.3", "ff02::7", "0.0.0.0"])  # noqa: S104
def test_datagram_is_sent_to_special_address(address: str) -> None:
    code = f"""
        import socket
        ip("-6 address add fd00::1/64 dev v1 nodad"); ip("route add default dev v1")
        address = ip_address({address!r})
        device, kind = ("lo" if address.is_unspecified else "w1"), 0x0800 if address.version == 4 else 0x86DD
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(kind)); wire.bind((device, kind))
        wire.settimeout(5)
        print(sockets.send(Transmit(b"marked", Endpoint(address.packed, 9, sockets.interface_index("v1")), 0, None)))
        while not (packet := wire.recv(99)).endswith(b"marked"):
            pass
        print(packet[8 if address.version == 4 else 7])
    """
    # TTL or hop limit: those of other datagrams
    assert run_in_sandbox(DETOUR, code) == "\n64\n"


def test_datagram_to_unspecified_ipv6_address_has_no_route(sockets: UdpSockets) -> None:
    port = sockets.open(0)
    assert sockets.send(Transmit(b"x", Endpoint(bytes(16), port), 0, None)) == "ENETUNREACH"


@pytest.mark.requirement("RT-18")
def test_scope_id_of_global_address_selects_interface() -> None:
    code = """
        for number in (1, 2):
            ip(f"-6 address add fd00:{number}::1/64 dev v{number} nodad")
        ip("-6 route add fd00:9::/64 dev v1 metric 1"); ip("-6 route add fd00:9::/64 dev v2 metric 2")
        import socket
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x86DD)); wire.bind(("w2", 0x86DD))
        wire.settimeout(5)
        ip("-6 neighbour add fd00:9::1 lladdr 02:00:00:00:00:01 dev v2")
        endpoint = Endpoint(ip_address("fd00:9::1").packed, 9, sockets.interface_index("v2"))
        print(sockets.send(Transmit(b"marked", endpoint, 0, None)))
        while not wire.recv(99).endswith(b"marked"):
            pass
    """
    assert run_in_sandbox(DETOUR, code) == "\n"


@pytest.mark.requirement("RT-18", "RT-11")
def test_link_local_source_is_kept_towards_global_address() -> None:
    code = """
        ip("-6 address add fd00::1/64 dev v1 nodad"); ip("-6 address add fe80::7/64 dev v1 nodad")
        peer.endpoint = Endpoint(ip_address("fd00::9").packed, 5, 0, LocalAddress(ip_address("fe80::7").packed))
        print(sockets.send(Transmit(b"x", peer.endpoint, 0, peer)), peer.endpoint.source is not None)
    """
    assert run_in_sandbox(DETOUR, code) == " True\n"
