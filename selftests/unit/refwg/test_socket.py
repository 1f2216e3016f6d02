from __future__ import annotations

import errno
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from refwg.boundary import Endpoint, LocalAddress, Transmit
from refwg.errors import ConfigError
from refwg.rtnetlink import RtnetlinkSocket
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
    rtnetlink = RtnetlinkSocket()
    sockets = UdpSockets(rtnetlink)
    yield sockets
    sockets.close()
    rtnetlink.close()


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


@pytest.mark.requirement("RT-11")
def test_datagram_is_sent_from_chosen_source_address(sockets: UdpSockets) -> None:
    port = sockets.open(0)
    source = LocalAddress(ip_address("127.0.0.7").packed)
    assert sockets.send(Transmit(b"x", endpoint(4, port, source), 0x88, None)) == ""
    received = sockets.receive(listener(4, sockets))
    assert received is not None
    assert received[1].address == source.address


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
        from refwg.rtnetlink import RtnetlinkSocket
        from refwg.socket import UdpSockets
        from selftests.support.pair import Pair
        def ip(text): subprocess.run(["ip", *text.split()], check=True)
        for number in (1, 2):
            ip(f"link add v{number} type veth peer name w{number}"); ip(f"link set v{number} up")
            ip(f"link set w{number} up"); ip(f"address add 10.0.{number}.1/24 dev v{number}")
        ip("address add 10.0.1.9/24 dev v1")
        ip("route add 10.9.0.0/16 dev v1 metric 5")
        sockets, peer = UdpSockets(RtnetlinkSocket()), Pair().a.peer
        sockets.open(5)
        source = LocalAddress(bytes([10, 0, 1, 9]), sockets.interface_index("v1"))
        peer.endpoint = Endpoint(bytes([10, 9, 0, 1]), 5, 0, source)
        def send():
            why = sockets.send(Transmit(b"x", peer.endpoint, 0, peer))
            return why or "sent", peer.endpoint.source == source
"""


@pytest.mark.requirement("RT-13", "RT-12")
def test_source_is_checked_again_on_send_after_route_change() -> None:
    code = """
        print(send()); ip("route add 10.9.0.0/16 dev v2 metric 1"); print(peer.endpoint.source == source)
        ip("route delete 10.9.0.0/16 dev v2 metric 1"); sockets.routes_changed(); print(send())
        ip("route add 10.9.0.0/16 dev v2 metric 1"); sockets.routes_changed(); print(send())
    """
    assert run_in_sandbox(DETOUR, code) == "('sent', True)\nTrue\n('sent', True)\n('sent', False)\n"


@pytest.mark.requirement("RT-12", "ERR-07")
def test_source_survives_lost_route_but_not_lost_address() -> None:
    code = """
        ip("route delete 10.9.0.0/16 dev v1"); print(send())
        ip("route add 10.9.0.0/16 dev v1"); sockets.routes_changed(); print(send())
        ip("address delete 10.0.1.9/24 dev v1"); sockets.routes_changed(); print(send())
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
        from refwg.rtnetlink import RtnetlinkSocket
        from refwg.socket import UdpSockets
        for mark in (0xFFFFFFFF, 0x80000000, 7, 0):
            sockets = UdpSockets(RtnetlinkSocket())
            for do in (lambda: sockets.open(0), lambda: sockets.set_fwmark(mark))[::{1 if is_open_first else -1}]:
                do()
            marks = {{s.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) & 0xFFFFFFFF for s in sockets.sockets}}
            print(len(sockets.sockets), marks == {{mark}})
            sockets.close()
    """
    assert run_in_sandbox("", code) == "2 True\n" * 4
