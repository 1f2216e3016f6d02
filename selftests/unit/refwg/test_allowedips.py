from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from refwg.allowedips import AllowedIPs, Prefix
from selftests.support.tries import nodes


def prefix(text: str) -> Prefix:
    address, _, length = text.partition("/")
    return Prefix(ip_address(address).packed, int(length))


def table(**prefixes: str) -> AllowedIPs[str]:
    """A table of owners, each with its prefixes, separated by spaces."""
    allowed: AllowedIPs[str] = AllowedIPs()
    for owner, texts in prefixes.items():
        for text in texts.split():
            allowed.insert(prefix(text), owner)
    return allowed


def owner_of(allowed: AllowedIPs[str], address: str) -> str | None:
    return allowed.lookup(ip_address(address).packed)


def listed(allowed: AllowedIPs[str], owner: str) -> str:
    return " ".join(str(entry) for entry in allowed.prefixes_of(owner))


@pytest.mark.requirement("AIP-01")
@pytest.mark.parametrize(
    ("address", "owner"),
    [("10.9.9.9", "a"), ("10.1.9.9", "b"), ("10.1.2.9", "c"), ("10.1.2.3", "d"), ("11.0.0.0", None), ("fd00::1", None)],
)
def test_longest_prefix_wins(address: str, owner: str | None) -> None:
    allowed = table(a="10.0.0.0/8", b="10.1.0.0/16", c="10.1.2.0/24", d="10.1.2.3/32")
    assert owner_of(allowed, address) == owner


@pytest.mark.requirement("AIP-04", "AIP-19")
def test_prefix_moves_to_its_latest_owner() -> None:
    allowed = table(a="10.0.0.0/24 10.0.0.0/25", b="10.0.0.0/24")
    assert (listed(allowed, "a"), listed(allowed, "b")) == ("10.0.0.0/25", "10.0.0.0/24")
    assert (owner_of(allowed, "10.0.0.1"), owner_of(allowed, "10.0.0.129")) == ("a", "b")


@pytest.mark.requirement("AIP-05")
def test_host_bits_are_cleared() -> None:
    allowed = table(a="192.168.4.77/24 2001:db8::ffff/32")
    assert listed(allowed, "a") == "192.168.4.0/24 2001:db8::/32"


@pytest.mark.requirement("AIP-06", "AIP-07")
def test_default_routes_match_everything_of_their_family() -> None:
    allowed = table(a="::/0")
    assert owner_of(allowed, "1.2.3.4") is None
    assert owner_of(allowed, "::ffff:1.2.3.4") == owner_of(allowed, "ffff::") == "a"
    allowed.insert(prefix("0.0.0.0/0"), "b")
    assert owner_of(allowed, "255.255.255.255") == "b"


@pytest.mark.requirement("AIP-09")
def test_removed_peer_frees_its_prefixes() -> None:
    allowed = table(a="10.0.0.0/24", b="10.0.0.5/32 fd00::/8")
    allowed.remove_by_peer("b")
    allowed.remove_by_peer("nobody")
    assert owner_of(allowed, "10.0.0.5") == "a"
    assert owner_of(allowed, "fd00::1") is None
    assert listed(allowed, "b") == ""


@pytest.mark.requirement("AIP-11")
@pytest.mark.parametrize(
    ("removed", "left"), [("10.0.0.0/24", "10.0.1.0/24"), ("10.0.0.0/32", "10.0.0.0/24 10.0.1.0/24")]
)
def test_removal_needs_exact_prefix_and_its_owner(removed: str, left: str) -> None:
    allowed = table(a="10.0.0.0/24 10.0.1.0/24", b="10.0.9.0/24")
    allowed.remove(prefix(removed), "a")
    allowed.remove(prefix("10.0.9.0/24"), "a")
    allowed.remove(prefix("10.0.9.0/24"), "nobody")
    assert (listed(allowed, "a"), listed(allowed, "b")) == (left, "10.0.9.0/24")


@pytest.mark.requirement("AIP-12")
@pytest.mark.parametrize("bad", [Prefix(bytes(4), 33), Prefix(bytes(16), 129), Prefix(bytes(4), -1)])
def test_prefix_length_out_of_range_raises_value_error(bad: Prefix) -> None:
    with pytest.raises(ValueError, match="prefix length"):
        AllowedIPs[str]().insert(bad, "a")


@pytest.mark.requirement("AIP-13", "AIP-14")
def test_prefixes_are_listed_in_order_of_last_insertion() -> None:
    allowed = table(a="10.0.0.0/8 fd00::/64 10.0.0.0/9 10.0.0.0/8")
    assert listed(allowed, "a") == "fd00::/64 10.0.0.0/9 10.0.0.0/8"


@pytest.mark.requirement("AIP-15")
def test_branch_node_is_removed_when_one_child_is_left() -> None:
    allowed = table(a="10.0.0.0/26", b="10.0.0.128/26")
    # Both addresses lie inside the branch 10.0.0.0/24 and outside both children.
    assert [owner_of(allowed, address) for address in ("10.0.0.64", "10.0.0.255")] == [None, None]
    assert nodes(allowed)[0] == (0, "10.0.0.0/24", None)
    allowed.remove_by_peer("a")
    assert (owner_of(allowed, "10.0.0.5"), owner_of(allowed, "10.0.0.150")) == (None, "b")
    assert nodes(allowed) == [(0, "10.0.0.128/26", "b")]


@pytest.mark.requirement("AIP-15")
def test_removed_node_with_two_children_becomes_branch() -> None:
    allowed = table(a="10.0.0.0/24", b="10.0.0.0/25 10.0.0.128/25")
    allowed.remove_by_peer("a")
    assert nodes(allowed) == [(0, "10.0.0.0/24", None), (1, "10.0.0.0/25", "b"), (1, "10.0.0.128/25", "b")]


@pytest.mark.requirement("AIP-15")
@pytest.mark.parametrize("child", ["10.0.0.0/25", "10.0.0.128/25"])
def test_single_child_replaces_its_removed_parent(child: str) -> None:
    allowed = table(a="10.0.0.0/24", b=child, c="0.0.0.0/0")
    allowed.remove_by_peer("a")
    assert nodes(allowed) == [(0, "0.0.0.0/0", "c"), (1, child, "b")]


@pytest.mark.requirement("AIP-15")
def test_branch_gets_owner_when_its_prefix_is_added() -> None:
    allowed = table(a="10.0.0.0/25 10.0.0.128/25", b="10.0.0.0/24", c="0.0.0.0/0")
    assert nodes(allowed)[:2] == [(0, "0.0.0.0/0", "c"), (1, "10.0.0.0/24", "b")]
    assert owner_of(allowed, "10.0.0.7") == "a"


@pytest.mark.requirement("AIP-15")
def test_inserted_node_is_attached_below_its_parent() -> None:
    between = table(a="10.0.0.0/8", b="10.1.2.0/24", c="10.1.0.0/16")
    assert nodes(between) == [(0, "10.0.0.0/8", "a"), (1, "10.1.0.0/16", "c"), (2, "10.1.2.0/24", "b")]
    branch = table(a="10.0.0.0/8", b="10.1.2.0/24", c="10.1.3.0/24")
    assert nodes(branch)[:2] == [(0, "10.0.0.0/8", "a"), (1, "10.1.2.0/23", None)]
    assert nodes(branch)[2:] == [(2, "10.1.2.0/24", "b"), (2, "10.1.3.0/24", "c")]


def test_multicast_address_matches_its_prefix() -> None:
    allowed = table(a="224.0.0.0/4", b="ff00::/8")
    assert (owner_of(allowed, "224.0.0.251"), owner_of(allowed, "ff02::1")) == ("a", "b")
    assert (owner_of(allowed, "223.255.255.255"), owner_of(allowed, "fe80::1")) == (None, None)


@pytest.mark.requirement("AIP-17")
def test_peer_lists_all_of_its_131072_prefixes() -> None:
    networks = [Prefix(bytes([10, 0, *number.to_bytes(2)]), 32) for number in range(65536)]
    allowed: AllowedIPs[str] = AllowedIPs()
    for entry in networks:
        allowed.insert(entry, "a")
        allowed.insert(Prefix(b"\xfd\0" + entry.address[2:] + bytes(12), 32), "a")
    assert len(list(allowed.prefixes_of("a"))) == 131_072
    assert owner_of(allowed, str(ip_network("10.0.255.255/32")[0])) == "a"
