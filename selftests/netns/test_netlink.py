"""Send the driver requests that neither `wg` nor the typed interface sends.

Sources: include/uapi/linux/wireguard.h, genetlink.h. A refused request changes nothing.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Final

import pytest

from harness import ControlError, DeviceConfig, Endpoint, PeerConfig, Unsupported, allowed_ips, twin
from harness.control import genl
from harness.implementations import interface
from harness.net.netlink import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    GenericSocket,
    attribute,
    attributes,
    generic,
    nest,
    parse_messages,
)
from harness.wait import REQUEST_TIMEOUT, Deadline

if TYPE_CHECKING:
    from harness import Interface, Key, Lab, Manifest, NetNS
    from harness.net.netlink import Message

IFINDEX: Final = 1
UNKNOWN: Final = 99
NOBODY: Final = "65534"
# The controller's family, its request, and the attributes of its answer (genetlink.h).
CONTROLLER, GETFAMILY = 16, 3
FAMILY_NAME, VERSION, OPERATIONS = 2, 3, 6
OPERATION, FLAGS = 1, 2
# Flags of a command: needs CAP_NET_ADMIN in the user namespace; as a request; as a dump; has a policy (genetlink.h).
NAMESPACE_ADMIN, AS_REQUEST, AS_DUMP = 0x10, 2, 4
CHECKED: Final = 8

SHORT, LONG = bytes([9] * 31), bytes([9] * 33)
KEY: Final = bytes([9] * 32)
V4: Final = socket.inet_aton("10.0.0.1")
FAMILY_V4: Final = struct.pack("=H", socket.AF_INET)


class Driver:
    """Send requests for `wg0` to the driver's family; each returns the errno of the refusal, or 0."""

    def __init__(self, wg0: Interface, sock: socket.socket) -> None:
        self.wg0 = wg0
        self.index = wg0.place.index("wg0")
        self._socket = GenericSocket(sock)
        self.family = self._socket.resolve_family("wireguard", Deadline(REQUEST_TIMEOUT))

    def exchange(self, command: int, payload: bytes, flags: int) -> list[Message]:
        request = generic(self.family, command, NLM_F_REQUEST | flags, payload)
        return self._socket.exchange(request, "wg0", f"command {command}", Deadline(REQUEST_TIMEOUT))

    def ask(self, command: int, *parts: bytes, flags: int) -> int:
        try:
            self.exchange(command, b"".join(parts), flags)
        except ControlError as refusal:
            return refusal.errno
        return 0

    def get(self, *parts: bytes, flags: int = NLM_F_DUMP) -> int:
        return self.ask(genl.GET_DEVICE, *parts, flags=flags)

    def set(self, *parts: bytes, flags: int = NLM_F_ACK) -> int:
        return self.ask(genl.SET_DEVICE, *parts, flags=flags)

    def set_peer(self, *parts: bytes) -> int:
        """Set one peer with these attributes."""
        return self.set(NAME, nest(genl.DEVICE_PEERS, nest(0, *parts)))


NAME: Final = attribute(genl.DEVICE_IFNAME, b"wg0\0")
PEER: Final = attribute(genl.PEER_PUBLIC_KEY, KEY)


@pytest.fixture
def driver(lab: Lab, implementation: Manifest) -> Driver:
    if implementation.kind != "kernel":
        raise Unsupported(f"{implementation.name} is not configured by netlink")
    wg0 = lab.interface("wg0", implementation, lab.node("ns0"))
    return Driver(wg0, genetlink(lab, wg0.place))


def genetlink(lab: Lab, node: NetNS) -> socket.socket:
    sock = interface.genetlink(node)
    lab.undo(sock.close)
    return sock


@pytest.fixture
def alice(lab: Lab) -> Key:
    return lab.key("alice").public()


# The family


@pytest.mark.requirement("CFG-01", "CFG-04")
def test_genl_family_has_only_get_and_set_in_every_namespace(lab: Lab, driver: Driver) -> None:
    question = generic(CONTROLLER, GETFAMILY, NLM_F_REQUEST | NLM_F_ACK, attribute(FAMILY_NAME, b"wireguard\0"))
    for node in (driver.wg0.place, lab.node("elsewhere")):
        connection = GenericSocket(genetlink(lab, node))
        answer = connection.exchange(question, "genl", "look up", Deadline(REQUEST_TIMEOUT))[0]
        family = dict(attributes(answer.payload))
        commands = [dict(attributes(entry)) for _, entry in attributes(family[OPERATIONS])]
        flags = {number(command[OPERATION]): number(command[FLAGS]) & ~CHECKED for command in commands}
        assert number(family[VERSION]) == 1
        assert flags == {
            genl.GET_DEVICE: NAMESPACE_ADMIN | AS_DUMP,
            genl.SET_DEVICE: NAMESPACE_ADMIN | AS_REQUEST,
        }


def number(value: bytes) -> int:
    return int.from_bytes(value, sys.byteorder)


@pytest.mark.requirement("CFG-04")
def test_get_and_set_are_refused_without_cap_net_admin(driver: Driver, alice: Key) -> None:
    node = driver.wg0.place
    without_rights = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    # A port is refused by another rule, too: it needs the right in the birth namespace (NS-05).
    set_port, add_peer = ["wg", "set", "wg0", "listen-port", "7"], ["wg", "set", "wg0", "peer", str(alice)]
    for command in (["wg", "show", "wg0"], set_port, add_peer):
        refused = node.run([*without_rights, *command], check=False)
        assert (refused.status, refused.stderr.rpartition(": ")[2]) == (1, "Operation not permitted\n"), (
            f"without CAP_NET_ADMIN `{' '.join(command)}` ended with status {refused.status}"
        )
    assert (driver.wg0.get().listen_port, driver.wg0.get().peers) == (0, ())
    with twin("the same commands succeed with CAP_NET_ADMIN"):
        node.run(set_port)
        node.run(add_peer)
        assert (driver.wg0.get().listen_port, len(driver.wg0.get().peers)) == (7, 1)


# Attributes that name the interface


@pytest.mark.requirement("CFG-02")
def test_request_needs_exactly_one_of_ifindex_and_ifname(driver: Driver) -> None:
    index, port = attribute(IFINDEX, struct.pack("=I", driver.index)), attribute(genl.DEVICE_LISTEN_PORT, b"\7\0")
    for selector in (NAME, index):
        assert (driver.get(selector), driver.set(selector)) == (0, 0)
    for none_or_both in (b"", NAME + index):
        assert (driver.get(none_or_both), driver.set(none_or_both, port)) == (errno.EBADR, errno.EBADR)
    assert driver.wg0.get().listen_port == 0


@pytest.mark.requirement("CFG-03")
def test_interface_of_other_kind_and_long_name_are_refused(driver: Driver) -> None:
    with twin("the name of a WireGuard interface is accepted"):
        assert (driver.get(NAME), driver.set(NAME)) == (0, 0)
    loopback, long = (attribute(genl.DEVICE_IFNAME, name + b"\0") for name in (b"lo", b"w" * 16))
    assert (driver.get(loopback), driver.set(loopback)) == (errno.EOPNOTSUPP, errno.EOPNOTSUPP)
    assert (driver.get(long), driver.set(long)) == (errno.EINVAL, errno.EINVAL)


@pytest.mark.requirement("CFG-05")
def test_get_without_dump_flag_and_set_with_it_are_refused(driver: Driver) -> None:
    assert driver.get(NAME, flags=NLM_F_ACK) == errno.EOPNOTSUPP
    assert driver.set(NAME, flags=NLM_F_DUMP) == errno.EOPNOTSUPP


# Attributes of a request


@pytest.mark.requirement("CFG-06")
@pytest.mark.parametrize("size", [31, 33])
@pytest.mark.parametrize("kind", [genl.PEER_PUBLIC_KEY, genl.PEER_PRESHARED_KEY], ids=["public", "preshared"])
def test_peer_key_of_wrong_length_is_refused_with_erange(driver: Driver, kind: int, size: int) -> None:
    others = [attribute(genl.PEER_PUBLIC_KEY, KEY)] if kind != genl.PEER_PUBLIC_KEY else []
    assert driver.set_peer(*others, attribute(kind, bytes(size))) == errno.ERANGE
    assert driver.wg0.get().peers == ()


@pytest.mark.requirement("CFG-06")
@pytest.mark.parametrize(
    ("kind", "value", "refusal"),
    [
        pytest.param(genl.DEVICE_PRIVATE_KEY, SHORT, errno.ERANGE, id="private-31"),
        pytest.param(genl.DEVICE_PRIVATE_KEY, LONG, errno.ERANGE, id="private-33"),
        pytest.param(genl.DEVICE_LISTEN_PORT, b"\7", errno.EINVAL, id="port-of-1-byte"),
        pytest.param(genl.DEVICE_LISTEN_PORT, b"\7\0\0\0", errno.EINVAL, id="port-of-4-bytes"),
        pytest.param(genl.DEVICE_FWMARK, b"\7\0", errno.EINVAL, id="mark-of-2-bytes"),
    ],
)
def test_device_attribute_of_wrong_length_is_refused(driver: Driver, kind: int, value: bytes, refusal: int) -> None:
    before = driver.wg0.get()
    assert driver.set(NAME, attribute(kind, value)) == refusal
    assert driver.wg0.get() == before


@pytest.mark.requirement("CFG-06")
def test_endpoint_and_keepalive_of_wrong_length_are_refused(driver: Driver) -> None:
    assert driver.set_peer(PEER, attribute(genl.PEER_ENDPOINT, bytes(15))) == errno.ERANGE
    assert driver.set_peer(PEER, attribute(genl.PEER_PERSISTENT_KEEPALIVE, b"\7\0\0\0")) == errno.EINVAL
    assert driver.wg0.get().peers == ()


@pytest.mark.requirement("CFG-07")
def test_unknown_attribute_is_refused(driver: Driver) -> None:
    unknown = attribute(UNKNOWN, b"\7\0\0\0")
    assert (driver.get(NAME, unknown), driver.set(NAME, unknown)) == (errno.EINVAL, errno.EINVAL)
    assert driver.set_peer(PEER, unknown) == errno.EINVAL
    assert driver.wg0.get().peers == ()


@pytest.mark.requirement("CFG-08")
def test_unknown_flag_is_refused(driver: Driver) -> None:
    # Linux 6.16, which removes single allowed-ips, also changed this errno.
    refusal = errno.EINVAL if "remove-allowed-ip" in driver.wg0.manifest.capabilities else errno.EOPNOTSUPP
    assert driver.set(NAME, attribute(genl.DEVICE_FLAGS, struct.pack("=I", 1 << 1))) == refusal
    assert driver.set_peer(PEER, attribute(genl.PEER_FLAGS, struct.pack("=I", 1 << 3))) == refusal
    assert driver.wg0.get().peers == ()


@pytest.mark.requirement("CFG-09")
def test_peer_without_public_key_is_refused(driver: Driver) -> None:
    keepalive = attribute(genl.PEER_PERSISTENT_KEEPALIVE, b"\7\0")
    assert driver.set_peer(keepalive) == errno.EINVAL
    with twin("a peer with a public key is accepted"):
        assert driver.set_peer(PEER, keepalive) == 0
    assert [peer.persistent_keepalive for peer in driver.wg0.get().peers] == [7]


@pytest.mark.requirement("CFG-11")
@pytest.mark.parametrize(
    ("family", "address", "length"),
    [
        pytest.param(None, V4, 32, id="no-family"),
        pytest.param(FAMILY_V4, None, 32, id="no-address"),
        pytest.param(FAMILY_V4, V4, None, id="no-length"),
        pytest.param(struct.pack("=H", 99), V4, 32, id="family-99"),
        pytest.param(FAMILY_V4, bytes(16), 32, id="v4-in-16-bytes"),
        pytest.param(struct.pack("=H", socket.AF_INET6), V4, 32, id="v6-in-4-bytes"),
        pytest.param(FAMILY_V4, V4, 33, id="v4-33"),
        pytest.param(struct.pack("=H", socket.AF_INET6), bytes(16), 129, id="v6-129"),
    ],
)
def test_malformed_allowed_ip_is_refused(
    driver: Driver, family: bytes | None, address: bytes | None, length: int | None
) -> None:
    with twin("10.0.0.1/32 is accepted"):
        assert driver.set_peer(PEER, allowed_ip(FAMILY_V4, V4, 32)) == 0
    assert driver.set_peer(PEER, allowed_ip(family, address, length)) == errno.EINVAL
    assert [peer.allowed_ips for peer in driver.wg0.get().peers] == [allowed_ips("10.0.0.1/32")]


def allowed_ip(family: bytes | None, address: bytes | None, length: int | None) -> bytes:
    """Encode a list of one allowed-ip; None leaves an attribute out."""
    parts = {
        genl.ALLOWED_IP_FAMILY: family,
        genl.ALLOWED_IP_ADDRESS: address,
        genl.ALLOWED_IP_LENGTH: None if length is None else bytes([length]),
    }
    given = [attribute(kind, value) for kind, value in parts.items() if value is not None]
    return nest(genl.PEER_ALLOWED_IPS, nest(0, *given))


@pytest.mark.requirement("CFG-12")
@pytest.mark.parametrize(
    "endpoint",
    [
        pytest.param(struct.pack("=H14x", 99), id="family-99"),
        pytest.param(struct.pack("=HH4s20x", socket.AF_INET, 9, V4), id="v4-in-28-bytes"),
        pytest.param(struct.pack("=HH12x", socket.AF_INET6, 9), id="v6-in-16-bytes"),
    ],
)
def test_endpoint_with_wrong_family_for_its_length_is_ignored(driver: Driver, alice: Key, endpoint: bytes) -> None:
    before = Endpoint("10.0.0.9", 9)
    driver.wg0.set_peer(alice, endpoint=before)
    assert driver.set_peer(attribute(genl.PEER_PUBLIC_KEY, alice.raw), attribute(genl.PEER_ENDPOINT, endpoint)) == 0
    assert driver.wg0.peer(alice).endpoint == before


# Answers


@pytest.mark.requirement("CFG-26")
def test_dump_starts_with_device_and_has_keys_only_when_set(lab: Lab, driver: Driver, alice: Key) -> None:
    always = {IFINDEX, genl.DEVICE_IFNAME, genl.DEVICE_LISTEN_PORT, genl.DEVICE_FWMARK}
    assert {*device(driver)} - {genl.DEVICE_PEERS} == always
    own = lab.key("own")
    driver.wg0.set(DeviceConfig(private_key=own, peers=(PeerConfig(public_key=alice),)))
    dumped = device(driver)
    assert {*dumped} == {*always, genl.DEVICE_PRIVATE_KEY, genl.DEVICE_PUBLIC_KEY, genl.DEVICE_PEERS}
    assert [*dumped][-1] == genl.DEVICE_PEERS
    assert (dumped[genl.DEVICE_PRIVATE_KEY], dumped[genl.DEVICE_PUBLIC_KEY]) == (own.raw, own.public().raw)
    assert (number(dumped[IFINDEX]), dumped[genl.DEVICE_IFNAME]) == (driver.index, b"wg0\0")


def device(driver: Driver) -> dict[int, bytes]:
    """Return the attributes of a dump's first message in their order."""
    return dict(attributes(driver.exchange(genl.GET_DEVICE, NAME, NLM_F_DUMP)[0].payload))


@pytest.mark.requirement("CFG-29")
def test_dump_is_marked_as_interrupted_when_device_changes(lab: Lab, driver: Driver) -> None:
    # More than the kernel dumps ahead of the reader.
    for a in range(8):
        many = allowed_ips(*[f"10.{a}.{b}.0/24" for b in range(256)])
        driver.wg0.set_peer(lab.key(f"peer{a}").public(), allowed_ips=many)
    with twin("a dump without a change is not marked"):
        assert not is_interrupted(dump(lab, driver, between=DeviceConfig()))
    assert is_interrupted(dump(lab, driver, between=DeviceConfig(fwmark=7)))


def dump(lab: Lab, driver: Driver, *, between: DeviceConfig) -> list[Message]:
    """Read a device, and configure it after the first read of several."""
    with closing(genetlink(lab, driver.wg0.place)) as reader:
        reader.send(genl.encode_get("wg0", driver.family))
        messages = parse_messages(reader.recv(1 << 16))
        if between != DeviceConfig():
            driver.wg0.set(between)
        reads = 1
        while not messages[-1].is_last:
            messages += parse_messages(reader.recv(1 << 16))
            reads += 1
    assert reads > 2
    return messages


def is_interrupted(messages: list[Message]) -> bool:
    return any(message.flags & NLM_F_DUMP_INTR for message in messages)
