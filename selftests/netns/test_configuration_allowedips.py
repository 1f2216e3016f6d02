"""Check that allowed-ips are read back by `wg` and by the typed interface (one interface)."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import TYPE_CHECKING, Final

import pytest

from harness import ControlError, DeviceConfig, Key, PeerConfig, allowed_ips
from harness.control.genl import decode_dump, encode_get
from harness.implementations.interface import genetlink
from harness.net.netlink import GenericSocket
from harness.wait import REQUEST_TIMEOUT, Deadline

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from harness import AllowedIP, Interface, Lab, Manifest
    from harness.net.netlink import Message

# Some of Alice's are removed; all of Bob's must stay.
ALICES: Final = [text for n in range(1, 198) for text in (f"192.168.0.{n}/32", f"abcd::{n}/128")]
BOBS: Final = ["10.0.0.1/32", "beef::1/128"]
REMOVED: Final = [text for n in (1, 20, 100) for text in (f"192.168.0.{n}/32", f"abcd::{n}/128")]


@pytest.fixture
def wg0(lab: Lab, implementation: Manifest) -> Interface:
    return lab.interface("wg0", implementation, lab.node("ns0"))


@pytest.fixture
def alice(lab: Lab) -> Key:
    return lab.key("alice").public()


@pytest.fixture
def bob(lab: Lab) -> Key:
    return lab.key("bob").public()


def give(wg0: Interface, peers: dict[Key, list[str]]) -> None:
    """Replace all peers by these, with `wg setconf`."""
    sections = [f"[Peer]\nPublicKey = {key}\n" + (f"AllowedIPs = {','.join(ips)}\n" if ips else "")
                for key, ips in peers.items()]  # fmt: skip
    wg0.wg("setconf", "wg0", "/dev/stdin", stdin="".join(sections))


def shown(wg0: Interface) -> dict[Key, list[AllowedIP]]:
    """Return each peer's sorted allowed-ips as `wg` shows them; check that the typed interface reads the same."""
    lines = [line.split() for line in wg0.wg("show", "wg0", "allowed-ips").stdout.splitlines()]
    by_wg = {Key.parse(key): ips([] if words == ["(none)"] else words) for key, *words in lines}
    assert by_wg == {peer.public_key: sorted(peer.allowed_ips) for peer in wg0.get().peers}
    return by_wg


def ips(texts: list[str]) -> list[AllowedIP]:
    return sorted(allowed_ips(*texts))


@pytest.mark.scenario("N29")
@pytest.mark.requirement("AIP-17", "CFG-28")
def test_peer_with_130560_allowed_ips_is_read_back(wg0: Interface, alice: Key) -> None:
    # 255 x 256 of each family, as in the kernel's own test: 10.7.0.0/16 and 10::7/128. They are written as `wg` prints
    # them, so that text is compared: parsing it would take seconds under emulation.
    many = [text for a, b in product(range(1, 256), range(256)) for text in (f"{a}.{b}.0.0/16", f"{a}::{b or ''}/128")]
    assert len(set(many)) == 130_560
    give(wg0, {alice: many})
    key, *by_wg = wg0.wg("show", "wg0", "allowed-ips").stdout.split()
    assert (key, len(by_wg), set(by_wg)) == (str(alice), len(many), set(many))
    if wg0.manifest.kind == "kernel":
        messages = answer_to_get(wg0)
        # UAPI answers in one stream, netlink in messages of one memory page each.
        assert len(messages) > 100
        (peer,) = decode_dump(messages, "wg0").peers
    else:
        peer = wg0.peer(alice)
    assert (len(peer.allowed_ips), set(map(str, peer.allowed_ips))) == (len(many), set(many))


def answer_to_get(wg0: Interface) -> list[Message]:
    """Return the netlink messages that answer a get."""
    deadline = Deadline(REQUEST_TIMEOUT)
    with genetlink(wg0.place) as raw:
        connection = GenericSocket(raw)
        request = encode_get("wg0", connection.resolve_family("wireguard", deadline))
        return connection.exchange(request, "wg0", "get", deadline)


@pytest.mark.scenario("N30")
@pytest.mark.requirement("CFG-25", "CFG-28")
def test_forty_peers_with_52_allowed_ips_each_are_read_back(lab: Lab, wg0: Interface) -> None:
    peers = {lab.key(f"peer{a}").public(): [f"{a}.{b}.0.0/16" for b in range(52)] for a in range(1, 41)}
    give(wg0, peers)
    assert shown(wg0) == {key: ips(texts) for key, texts in peers.items()}
    # wireguard-go keeps its peers in a map and lists them in any order (CFG-25).
    if wg0.manifest.kind == "kernel":
        assert [peer.public_key for peer in wg0.get().peers] == list(peers)


@pytest.mark.scenario("N31")
@pytest.mark.requirement("CFG-27", "CFG-28")
def test_setconf_restores_30_peers_when_one_has_allowed_ips(lab: Lab, wg0: Interface) -> None:
    peers: dict[Key, list[str]] = {lab.key(f"peer{number}").public(): [] for number in range(29)}
    peers[lab.key("peer29").public()] = ["255.2.3.4/32", "abcd::255/128"]
    give(wg0, peers)
    saved = wg0.wg("showconf", "wg0").stdout
    assert (saved.count("[Peer]"), saved.count("AllowedIPs")) == (30, 1)
    wg0.set(DeviceConfig(replace_peers=True))
    assert shown(wg0) == {}
    wg0.wg("setconf", "wg0", "/dev/stdin", stdin=saved)
    assert shown(wg0) == {key: ips(texts) for key, texts in peers.items()}


@pytest.mark.scenario("N32")
@pytest.mark.requirement("CFG-27", "CFG-28")
def test_peer_without_allowed_ips_gets_none_of_other_peer(wg0: Interface, alice: Key, bob: Key) -> None:
    many = [f"abcd::{number}/128" for number in range(1, 198)]
    give(wg0, {alice: [], bob: many})
    assert shown(wg0) == {alice: [], bob: ips(many)}


@pytest.mark.scenario("N33")
@pytest.mark.requirement("AIP-11", "CFG-30")
@pytest.mark.capability("remove-allowed-ip")
def test_single_allowed_ips_are_removed(wg0: Interface, alice: Key, bob: Key) -> None:
    give(wg0, {alice: ALICES, bob: BOBS})
    wg0.set_peer(alice, allowed_ips=removal(*REMOVED))
    left = [text for text in ALICES if text not in REMOVED]
    assert len(left) == len(ALICES) - 6
    assert shown(wg0) == {alice: ips(left), bob: ips(BOBS)}


@pytest.mark.scenario("N33")
@pytest.mark.requirement("AIP-11")
@pytest.mark.capability("remove-allowed-ip")
@pytest.mark.parametrize("text", [*BOBS, "192.168.0.0/24", "abcd::/64", "172.16.0.1/32", "0.0.0.0/0"])
def test_removal_of_allowed_ip_not_owned_by_peer_is_ignored(wg0: Interface, alice: Key, bob: Key, text: str) -> None:
    give(wg0, {alice: ALICES, bob: BOBS})
    wg0.set_peer(alice, allowed_ips=removal(text))
    assert shown(wg0) == {alice: ips(ALICES), bob: ips(BOBS)}


@pytest.mark.requirement("CFG-30", "CFG-50")
def test_removal_of_allowed_ip_works_if_and_only_if_declared(wg0: Interface, alice: Key) -> None:
    give(wg0, {alice: ["10.0.0.1/32"]})
    declared = "remove-allowed-ip" in wg0.manifest.capabilities
    # The attribute is unknown to Linux before 6.16, the minus sign to wireguard-go before May 2025.
    outcome: AbstractContextManager[object] = nullcontext() if declared else pytest.raises(ControlError, match="EINVAL")
    with outcome:
        # `control` skips the lab's check of declared capabilities: the declaration is under test.
        wg0.control.set(DeviceConfig(peers=(PeerConfig(public_key=alice, allowed_ips=removal("10.0.0.1/32")),)))
    assert shown(wg0) == {alice: [] if declared else ips(["10.0.0.1/32"])}


def removal(*texts: str) -> tuple[AllowedIP, ...]:
    return allowed_ips(*[f"-{text}" for text in texts])


@pytest.mark.scenario("N38")
@pytest.mark.requirement("AIP-06", "AIP-10")
@pytest.mark.capability("update-peer", "peer-before-key")
def test_overlapping_allowed_ips_are_replaced_repeatedly(wg0: Interface, alice: Key) -> None:
    lists = (
        "0.0.0.0/0,10.0.0.0/8,100.0.0.0/10,172.16.0.0/12,192.168.0.0/16",
        "0.0.0.0/0",
        "::/0,1700::/111,5000::/4,e000::/37,9000::/75",
        "::/0",
    )
    for text in lists * 3:
        wg0.wg("set", "wg0", "peer", str(alice), "allowed-ips", text)
        assert shown(wg0) == {alice: ips(text.split(","))}
    wg0.wg("set", "wg0", "peer", str(alice), "remove")
    assert shown(wg0) == {}
