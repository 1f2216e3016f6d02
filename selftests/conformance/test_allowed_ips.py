"""Check whose a prefix is, and how the list of a peer is kept (one interface)."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final

import pytest

from harness import AllowedIP, ControlError, DeviceConfig, PeerConfig, allowed_ips, differs, twin

if TYPE_CHECKING:
    from harness import Interface, Key, Lab, Manifest

V4: Final = socket.inet_pton(socket.AF_INET, "10.1.2.3")
V6: Final = socket.inet_pton(socket.AF_INET6, "fd00::1:2:3")


@pytest.fixture
def wg0(lab: Lab, implementation: Manifest) -> Interface:
    made = lab.interface("wg0", implementation, lab.node("ns0"))
    # Some programs take no peer before a private key.
    made.set(DeviceConfig(private_key=lab.key("own")))
    return made


@pytest.fixture
def alice(lab: Lab) -> Key:
    return lab.key("alice").public()


@pytest.fixture
def bob(lab: Lab) -> Key:
    return lab.key("bob").public()


def add(wg0: Interface, key: Key, *texts: str) -> None:
    """Add a peer with these prefixes, or add them to its list."""
    wg0.set_peer(key, allowed_ips=allowed_ips(*texts))


def listed(wg0: Interface, key: Key) -> list[str]:
    """Return the prefixes of a peer in the order of the answer."""
    return [str(prefix) for prefix in wg0.peer(key).allowed_ips]


@pytest.mark.requirement("AIP-04")
@pytest.mark.parametrize(
    ("given", "again"),
    [("10.9.0.0/24", "10.9.0.77/24"), ("fd00:9::/64", "fd00:9::77/64"), ("0.0.0.0/0", "1.2.3.4/0"), ("::/0", "::/0")],
    ids=["v4", "v6", "v4-default", "v6-default"],
)
def test_prefix_moves_to_peer_that_got_it_last(lab: Lab, wg0: Interface, given: str, again: str) -> None:
    first, *others = (lab.key(name).public() for name in ("first", "second", "third"))
    add(wg0, first, given, "192.0.2.1/32")
    for other in others:
        add(wg0, other, again)
        owners = [peer.public_key for peer in wg0.get().peers if set(allowed_ips(given)) & set(peer.allowed_ips)]
        assert owners == [other], f"{given} was given to another peer, and {len(owners)} peers list it"
    assert listed(wg0, first) == ["192.0.2.1/32"], "the first peer's other prefix is not as before"


@pytest.mark.requirement("AIP-04")
def test_nested_prefixes_of_several_peers_coexist(lab: Lab, wg0: Interface) -> None:
    nested = ["0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/9", "10.0.0.0/31", "10.0.0.0/32", "::/0", "::/1", "::/127", "::/128"]
    keys = {text: lab.key(text).public() for text in nested}
    for text in nested:
        add(wg0, keys[text], text)
    assert {text: listed(wg0, keys[text]) for text in nested} == {text: [text] for text in nested}


@pytest.mark.requirement("AIP-05")
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("192.168.4.77/24", "192.168.4.0/24"),
        ("10.1.2.3/31", "10.1.2.2/31"),
        ("255.255.255.255/1", "128.0.0.0/1"),
        ("1.2.3.4/0", "0.0.0.0/0"),
        ("2001:db8::ffff/32", "2001:db8::/32"),
        ("fd00::3/127", "fd00::2/127"),
        ("ffff::1/1", "8000::/1"),
    ],
    ids=["v4-24", "v4-31", "v4-1", "v4-0", "v6-32", "v6-127", "v6-1"],
)
def test_host_bits_of_prefix_are_cleared(wg0: Interface, alice: Key, given: str, kept: str) -> None:
    add(wg0, alice, given)
    shown = wg0.wg("show", "wg0", "allowed-ips").stdout.split()[1:]
    assert (listed(wg0, alice), shown) == ([kept], [kept]), f"{given} is read back as {listed(wg0, alice)}"


@pytest.mark.requirement("AIP-12")
@pytest.mark.parametrize(
    ("address", "length"),
    [(V4, 33), (V4, 129), (V4, 255), (V6, 129), (V6, 255)],
    ids=["v4-33", "v4-129", "v4-255", "v6-129", "v6-255"],
)
def test_prefix_longer_than_its_address_is_refused(
    wg0: Interface, alice: Key, bob: Key, address: bytes, length: int
) -> None:
    longest = AllowedIP(address, len(address) * 8)
    prefix = AllowedIP(address, length)
    with twin(f"{longest} is accepted"):
        wg0.set_peer(alice, allowed_ips=(longest,))
        assert listed(wg0, alice) == [str(longest)]
    with pytest.raises(ControlError) as refusal:
        wg0.set_peer(bob, allowed_ips=(prefix,))
    assert refusal.value.errno == errno.EINVAL, f"{prefix}: {refusal.value}, not EINVAL"
    added = [peer.allowed_ips for peer in wg0.get().peers if peer.public_key == bob]
    assert added in ([], [()]), f"{prefix} was refused, and the peer has {added}"
    assert listed(wg0, alice) == [str(longest)]


@pytest.mark.requirement("AIP-13")
def test_prefix_added_twice_is_listed_once(wg0: Interface, alice: Key) -> None:
    one, other, third = "10.30.0.0/16", "fd00:31::/64", "10.32.0.0/16"
    add(wg0, alice, one, other, third, one)
    assert sorted(listed(wg0, alice)) == sorted([one, other, third]), f"{one} twice gives {listed(wg0, alice)}"


@pytest.mark.requirement("AIP-13")
@pytest.mark.capability("update-peer")
def test_prefix_added_in_later_request_is_listed_once(wg0: Interface, alice: Key) -> None:
    one, other = "10.30.0.0/16", "fd00:31::/64"
    for text in (one, other, one, "10.30.7.7/16", other):
        add(wg0, alice, text)
    assert sorted(listed(wg0, alice)) == sorted([one, other]), f"two prefixes give {listed(wg0, alice)}"


@pytest.mark.requirement("AIP-14")
def test_prefixes_are_listed_in_order_of_their_last_addition(wg0: Interface, alice: Key) -> None:
    given = ["10.9.0.0/16", "fd00:1::/64", "0.0.0.0/0", "10.1.0.0/16", "::/0", "10.9.0.0/16", "fd00::/64"]
    add(wg0, alice, *given)
    # Only the last addition of 10.9.0.0/16 counts.
    if listed(wg0, alice) != given[1:]:
        differs(f"{given} added, {listed(wg0, alice)} listed", by=[wg0.manifest.name])


@pytest.mark.requirement("CFG-18")
def test_entries_before_refused_one_stay_applied(lab: Lab, wg0: Interface, alice: Key, bob: Key) -> None:
    carol = lab.key("carol").public()
    bad = (*allowed_ips("10.2.0.0/16"), AllowedIP(V4, 33), *allowed_ips("10.3.0.0/16"))
    entries = [(alice, allowed_ips("10.1.0.0/16")), (bob, bad), (carol, allowed_ips("10.4.0.0/16"))]
    peers = tuple(PeerConfig(public_key=key, allowed_ips=prefixes) for key, prefixes in entries)
    with pytest.raises(ControlError):
        wg0.set(DeviceConfig(fwmark=7, peers=peers))
    state = wg0.get()
    kept = {peer.public_key: [*map(str, peer.allowed_ips)] for peer in state.peers}
    if (state.fwmark, kept) != (7, {alice: ["10.1.0.0/16"], bob: ["10.2.0.0/16"]}):
        how = f"after a request that was refused at its second peer: fwmark {state.fwmark}, peers {[*kept.values()]}"
        differs(how, by=[wg0.manifest.name])


# Absent peers


@pytest.mark.requirement("CFG-13")
@pytest.mark.parametrize("flag", ["remove", "update_only"])
def test_absent_peer_is_neither_removed_nor_created(wg0: Interface, alice: Key, bob: Key, flag: str) -> None:
    add(wg0, alice, "10.1.0.0/16")
    before = wg0.get()
    absent = PeerConfig(
        public_key=bob,
        remove=flag == "remove",
        update_only=flag == "update_only",
        persistent_keepalive=7,
        allowed_ips=allowed_ips("10.1.0.0/16", "10.2.0.0/16"),
    )
    # The other settings of this entry are ignored: alice keeps her prefix.
    wg0.set(DeviceConfig(peers=(absent,)))
    assert wg0.get() == before, f"an entry with {flag} for an absent peer changed the device"
    with twin("without the flag the same entry creates the peer"):
        wg0.set_peer(bob, persistent_keepalive=7, allowed_ips=absent.allowed_ips)
        assert (set(listed(wg0, bob)), wg0.peer(bob).persistent_keepalive) == ({"10.1.0.0/16", "10.2.0.0/16"}, 7)


@pytest.mark.requirement("CFG-13")
def test_peer_removed_twice_is_gone_without_error(wg0: Interface, alice: Key, bob: Key) -> None:
    add(wg0, alice, "10.1.0.0/16")
    add(wg0, bob, "10.2.0.0/16")
    for _ in range(2):
        wg0.set_peer(alice, remove=True)
        assert [peer.public_key for peer in wg0.get().peers] == [bob]
