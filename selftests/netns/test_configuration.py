"""Check that settings are read back by the typed interface and by `wg` (one interface)."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from harness import (
    ZERO_KEY,
    ControlError,
    Datagram,
    DeadlineExceeded,
    DeviceConfig,
    Endpoint,
    Key,
    PeerConfig,
    allowed_ips,
    twin,
    udp_receiver,
    wait_for,
)
from harness.control.genl import GenlControl
from harness.control.uapi import UapiControl
from harness.implementations.interface import CONTROL_SOCKETS, genetlink
from harness.scripted.intents import LOW_ORDER_POINTS

if TYPE_CHECKING:
    from harness import Interface, Lab, Manifest
    from harness.control.base import Control

LOCALHOST: Final = "127.0.0.1"
PORT: Final = 1111
ALICES: Final = 2222
# Seconds: a datagram that was sent together with Alice's arrives within this time.
AFTER_ALICE: Final = 0.3
LOW_ORDER: Final = tuple(Key(point) for point in LOW_ORDER_POINTS)


@pytest.fixture
def wg0(lab: Lab, implementation: Manifest) -> Interface:
    return lab.interface("wg0", implementation, lab.node("ns0"))


@pytest.fixture
def alice(lab: Lab) -> Key:
    return lab.key("alice").public()


def peers(wg0: Interface) -> set[Key]:
    """Return the peers as `wg` lists them; check that the typed interface reads the same."""
    by_wg = {Key.parse(line) for line in wg0.wg("show", "wg0", "peers").stdout.splitlines()}
    assert by_wg == {peer.public_key for peer in wg0.get().peers}
    return by_wg


# Keys


@pytest.mark.scenario("N35")
@pytest.mark.requirement("CFG-15")
@pytest.mark.parametrize("by_wg", [False, True], ids=["ours", "wg"])
def test_private_key_is_read_back_and_cleared(lab: Lab, wg0: Interface, by_wg: bool) -> None:
    own = lab.key("own")
    for given, private, public in ((own, str(own), str(own.public())), (ZERO_KEY, "(none)", "(none)")):
        if by_wg:
            wg0.wg("set", "wg0", "private-key", "/dev/stdin", stdin=str(given))
        else:
            wg0.set(DeviceConfig(private_key=given))
        assert wg0.get().private_key == (None if given == ZERO_KEY else given)
        assert wg0.wg("show", "wg0", "private-key").stdout == f"{private}\n"
        assert wg0.wg("show", "wg0", "public-key").stdout == f"{public}\n"


@pytest.mark.scenario("N35")
@pytest.mark.requirement("CFG-16")
@pytest.mark.capability("update-peer", "peer-before-key")
@pytest.mark.parametrize("by_wg", [False, True], ids=["ours", "wg"])
def test_preshared_key_is_read_back_and_cleared(lab: Lab, wg0: Interface, alice: Key, by_wg: bool) -> None:
    for given, text in ((lab.key("psk"), str(lab.key("psk"))), (ZERO_KEY, "(none)")):
        if by_wg:
            wg0.wg("set", "wg0", "peer", str(alice), "preshared-key", "/dev/stdin", stdin=str(given))
        else:
            wg0.set_peer(alice, preshared_key=given)
        assert wg0.peer(alice).preshared_key == (None if given == ZERO_KEY else given)
        assert wg0.wg("show", "wg0", "preshared-keys").stdout == f"{alice}\t{text}\n"


@pytest.mark.requirement("CFG-31", "CFG-43")
@pytest.mark.capability("fwmark")
@pytest.mark.parametrize("by_wg", [False, True], ids=["ours", "wg"])
def test_fwmark_is_read_back_and_cleared_while_link_is_up(lab: Lab, wg0: Interface, by_wg: bool) -> None:
    wg0.set(DeviceConfig(private_key=lab.key("own"), listen_port=PORT))
    wg0.up()
    for given, text in ((0xFFFFFFFF, "0xffffffff"), (7, "0x7"), (0, "off")):
        if by_wg:
            wg0.wg("set", "wg0", "fwmark", hex(given))
        else:
            wg0.set(DeviceConfig(fwmark=given))
        assert wg0.get().fwmark == given
        assert wg0.wg("show", "wg0", "fwmark").stdout == f"{text}\n"


@pytest.mark.scenario("N36")
@pytest.mark.requirement("HS-32", "HS-33", "CFG-17")
@pytest.mark.bug("IB-66")
def test_interface_never_keeps_itself_as_peer(lab: Lab, wg0: Interface, alice: Key) -> None:
    key1, key2 = lab.key("key1"), lab.key("key2")
    wg0.set(DeviceConfig(private_key=key1, peers=(PeerConfig(public_key=alice), PeerConfig(public_key=key2.public()))))
    assert peers(wg0) == {alice, key2.public()}
    wg0.set(DeviceConfig(private_key=key2))
    assert peers(wg0) == {alice}
    wg0.set_peer(key2.public(), allowed_ips=allowed_ips("10.0.0.0/8"))
    assert peers(wg0) == {alice}
    # A request sets its private key first, so key2 is no longer the interface's own key.
    wg0.set(DeviceConfig(private_key=key1, peers=(PeerConfig(public_key=key2.public()),)))
    assert peers(wg0) == {alice, key2.public()}


@pytest.mark.scenario("N37")
@pytest.mark.requirement("CR-18")
@pytest.mark.parametrize(
    ("given", "stored"),
    [
        pytest.param(f"/{'A' * 40}EA=", f"+{'A' * 40}EA=", id="low-bits"),
        pytest.param(f"{'/' * 42}8=", f"+P{'/' * 39}38=", id="all-ones"),
    ],
)
def test_private_key_is_clamped(wg0: Interface, given: str, stored: str) -> None:
    wg0.wg("set", "wg0", "private-key", "/dev/stdin", stdin=given)
    by_wg = wg0.wg("show", "wg0", "private-key").stdout.strip()
    assert by_wg == stored, f"given {given} it keeps {by_wg}, not clamped to {stored}"
    wg0.set(DeviceConfig(private_key=ZERO_KEY))
    wg0.set(DeviceConfig(private_key=Key.parse(given)))
    kept = str(wg0.get().private_key)
    assert kept == stored, f"given {given} it keeps {kept}, not clamped to {stored}"


# Missing interfaces, and peers that get no packets


@pytest.mark.scenario("N34")
@pytest.mark.requirement("CFG-03")
def test_missing_interface_cannot_be_shown(lab: Lab, wg0: Interface) -> None:
    answer = wg0.wg("show", "nowg0", check=False)
    assert (answer.status, answer.stderr.partition(":")[0]) == (1, "Unable to access interface")
    with pytest.raises(ControlError, match=r"^nowg0 ") as refusal:
        control(lab, wg0, "nowg0").get()
    # The kernel reports a missing device; over UAPI the socket file is missing.
    assert refusal.value.errno == (errno.ENODEV if wg0.manifest.kind == "kernel" else errno.ENOENT)
    assert wg0.wg("show", "wg0").stdout.startswith("interface: wg0\n")


def control(lab: Lab, wg0: Interface, name: str) -> Control:
    """Return the typed control of an interface of this name, in the place of wg0 and of its kind."""
    if wg0.manifest.kind == "kernel":
        sock = genetlink(wg0.place)
        lab.undo(sock.close)
        return GenlControl(sock).interface(name)

    def connect() -> socket.socket:
        sock.connect(f"{CONTROL_SOCKETS}/{name}.sock")
        return sock

    sock = wg0.place.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    lab.undo(sock.close)
    return UapiControl(name, connect)


@pytest.mark.parametrize("point", LOW_ORDER, ids=range(len(LOW_ORDER)))
def test_low_order_point_gives_zero_shared_secret(point: Key) -> None:
    with pytest.raises(ValueError, match="shared key"):
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(point.raw))


@pytest.mark.scenario("N39")
@pytest.mark.requirement("HS-34", "CR-09")
def test_low_order_peers_are_listed_but_get_no_packets(lab: Lab, wg0: Interface, alice: Key) -> None:
    # This peer has no endpoint, so nothing is sent to it: its tx_bytes are what the others' must be.
    silent = lab.key("silent").public()
    wg0.set(DeviceConfig(private_key=lab.key("own"), peers=(PeerConfig(public_key=silent),)))
    with_keepalive = [
        PeerConfig(public_key=key, endpoint=Endpoint(LOCALHOST, port), persistent_keepalive=1)
        # Alice is last: her datagram shows that the peers before her have been processed.
        for key, port in [*((key, PORT) for key in LOW_ORDER), (alice, ALICES)]
    ]
    with (
        udp_receiver(wg0.birth, LOCALHOST, PORT) as theirs,
        udp_receiver(wg0.birth, LOCALHOST, ALICES) as hers,
    ):
        # wireguard-go may send at once: it does not notice that the link is down (IF-08).
        wg0.set(DeviceConfig(peers=tuple(with_keepalive)))
        wg0.up()
        with twin("an ordinary peer beside them gets a datagram"):
            assert gets_datagram(hers, 2.0)
        assert not gets_datagram(theirs, AFTER_ALICE), "a datagram for a peer without a secret"
    assert peers(wg0) == {*LOW_ORDER, alice, silent}
    sent = {peer.public_key: peer.tx_bytes for peer in wg0.get().peers}
    counted = {str(key): sent[key] - sent[silent] for key in LOW_ORDER if sent[key] != sent[silent]}
    assert not counted, f"bytes counted as sent to peers without a secret: {counted}"


def gets_datagram(receiver: socket.socket, seconds: float) -> bool:
    """Return whether a datagram arrives within this time."""
    with suppress(DeadlineExceeded):
        return bool(wait_for(Datagram(receiver), seconds, "a datagram"))
    return False
