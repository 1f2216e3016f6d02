from __future__ import annotations

import errno
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from refwg.boundary import Endpoint, LocalAddress, Transmit
from refwg.errors import ConfigError
from refwg.netlink import Inquirer
from refwg.socket import UdpSockets, forget_detoured_sources
from selftests.unit.pair import Pair

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCALHOST = {4: "127.0.0.1", 6: "::1"}


def endpoint(version: int, port: int, source: LocalAddress | None = None) -> Endpoint:
    return Endpoint(ip_address(LOCALHOST[version]).packed, port, 0, source)


def listener(version: int, sockets: UdpSockets) -> socket.socket:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    (one,) = [one for one in sockets.sockets if one.family == family]
    one.setblocking(True)
    one.settimeout(2)
    return one


@pytest.fixture
def sockets() -> Iterator[UdpSockets]:
    made = UdpSockets()
    yield made
    made.close()


@pytest.mark.requirement("IF-04", "MSG-19")
def test_both_families_have_one_port(sockets: UdpSockets) -> None:
    port = sockets.open(0)
    assert [one.getsockname()[1] for one in sockets.sockets] == [port, port]


@pytest.mark.requirement("CFG-19", "CFG-20", "IF-06")
def test_a_port_that_is_taken_leaves_the_sockets_as_they_are(sockets: UdpSockets) -> None:
    port = sockets.open(0)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
        other.bind(("::1", 0))
        with pytest.raises(ConfigError) as error:
            sockets.open(other.getsockname()[1])
    assert error.value.errno == errno.EADDRINUSE
    assert [one.getsockname()[1] for one in sockets.sockets] == [port, port]
    sockets.close()
    assert sockets.sockets == []


@pytest.mark.requirement("RT-11", "DT-28", "RT-01")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mark", [0, 1, 2, 3])
def test_a_datagram_comes_with_sender_local_address_and_ecn(sockets: UdpSockets, version: int, mark: int) -> None:
    port = sockets.open(0)
    assert sockets.send(Transmit(b"datagram", endpoint(version, port), mark, None)) == ""
    received = sockets.receive(listener(version, sockets))
    assert received is not None
    datagram, sender, ecn = received
    assert (datagram, sender.address, sender.port, ecn) == (b"datagram", endpoint(version, 0).address, port, mark)
    assert sender.source == LocalAddress(sender.address, 1 if version == 4 else 0)


@pytest.mark.requirement("RT-11")
def test_a_datagram_leaves_from_the_address_it_shall_leave_from(sockets: UdpSockets) -> None:
    port = sockets.open(0)
    source = LocalAddress(ip_address("127.0.0.7").packed)
    assert sockets.send(Transmit(b"x", endpoint(4, port, source), 0x88, None)) == ""
    received = sockets.receive(listener(4, sockets))
    assert received is not None
    assert received[1].address == source.address


@pytest.mark.requirement("RT-12")
@pytest.mark.parametrize(("version", "gone"), [(4, "203.0.113.9"), (6, "2001:db8::9")])
def test_a_source_address_that_is_gone_is_forgotten(sockets: UdpSockets, version: int, gone: str) -> None:
    port = sockets.open(0)
    peer = Pair().a.peer
    peer.endpoint = endpoint(version, port, LocalAddress(ip_address(gone).packed, 1))
    assert sockets.send(Transmit(b"x", peer.endpoint, 0, peer)) == ""
    assert peer.endpoint == endpoint(version, port)
    stranger = endpoint(version, port, LocalAddress(ip_address(gone).packed, 1))
    assert sockets.send(Transmit(b"x", stranger, 0, None)) == ""


@pytest.mark.requirement("RT-13", "RT-14")
@pytest.mark.parametrize(("version", "interface", "is_kept"), [(4, 1, True), (4, 99, False), (6, 0, True)])
def test_a_source_is_forgotten_when_the_route_uses_another_interface(
    version: int, interface: int, is_kept: bool
) -> None:
    pair = Pair()
    source = LocalAddress(endpoint(version, 0).address, interface)
    pair.a.peer.endpoint = endpoint(version, 1, source)
    inquirer = Inquirer()
    forget_detoured_sources([pair.a.peer, pair.b.peer], inquirer, 0)
    inquirer.close()
    assert (pair.a.peer.endpoint.source is not None) is is_kept


def test_errors_are_told_and_never_raised(sockets: UdpSockets) -> None:
    assert sockets.send(Transmit(b"x", endpoint(4, 1), 0, None)) == "EAFNOSUPPORT"
    port = sockets.open(0)
    assert sockets.send(Transmit(bytes(70000), endpoint(4, port), 0, None)) == "EMSGSIZE"
    listener(4, sockets).setblocking(False)
    assert sockets.receive(sockets.sockets[0]) is None


@pytest.mark.requirement("MTU-15")
def test_an_icmp_error_about_our_datagram_is_an_empty_datagram(sockets: UdpSockets) -> None:
    sockets.open(0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    one = listener(4, sockets)
    one.connect(("127.0.0.1", port))
    one.send(b"to nobody")
    received = sockets.receive(one)
    assert received is not None
    assert received[0] == b""


def test_interfaces_are_found_by_name(sockets: UdpSockets) -> None:
    assert sockets.interface_index("lo") == 1
    with pytest.raises(ConfigError) as error:
        sockets.interface_index("no such one")
    assert error.value.errno == errno.EINVAL


def test_a_machine_without_ipv6_has_one_socket(sockets: UdpSockets, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def without_ipv6(family: int, *rest: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6")
        return real(family, *rest)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    assert sockets.open(0) > 0
    assert [one.family for one in sockets.sockets] == [socket.AF_INET]
