"""Check that pyroute2 and harness/net/rtnetlink.py read each other's messages."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import nlmsgerr
from pyroute2.netlink.rtnl import RTM_NEWLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg, state_by_name
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from harness.errors import ControlError
from harness.net.netlink import NLMSG_DONE, NLMSG_ERROR, Message
from harness.net.rtnetlink import Rtnetlink

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.net.rtnetlink import VethPeer

T = TypeVar("T")
Request = tuple[str, int, dict[str, Any], dict[str, Any]]

# netlink(7): NLM_F_REQUEST with NLM_F_ACK, or NLM_F_DUMP, or NLM_F_ACK, NLM_F_EXCL and NLM_F_CREATE.
ASK, DUMP, CREATE = 0x5, 0x301, 0x605
NLM_F_MULTI = 2
# rtnetlink(7); the action of a rule: FR_ACT_TO_TBL of fib_rules.h.
IFF_UP = 1
RTPROT_STATIC, RTN_UNICAST, RT_TABLE_MAIN, FR_ACT_TO_TBL = 4, 1, 254, 1
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 0, 253, 255
DONE = Message(NLMSG_DONE, NLM_F_MULTI, 1, bytes(4)).to_bytes()

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
indices = st.integers(1, 2**31 - 1)
descriptors = st.integers(3, 2**31 - 1)
names = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=15)
v4 = st.binary(min_size=4, max_size=4).map(lambda packed: socket.inet_ntop(socket.AF_INET, packed))
v6 = st.binary(min_size=16, max_size=16).map(lambda packed: socket.inet_ntop(socket.AF_INET6, packed))
prefixes = st.one_of(st.tuples(v4, st.integers(0, 32)), st.tuples(v6, st.integers(0, 128)))


def exchanged(call: Callable[[Rtnetlink], T], *answers: bytes) -> tuple[T, bytes]:
    """Answer a call with these datagrams; return its result and the request that it sent."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        for answer in answers:
            far.send(answer)
        return call(Rtnetlink(near)), far.recv(1 << 16)


def read(call: Callable[[Rtnetlink], object], answer: bytes = DONE) -> Request:
    """Read with pyroute2 the request that a call sends.

    Return its name, flags, header fields other than 0, and attributes.
    """
    _, request = exchanged(call, answer)
    [message] = MarshalRtnl().parse(request)
    assert message["header"]["length"] == len(request)
    return message["event"], message["header"]["flags"], fields(message), attributes(message)


def fields(message: Any) -> dict[str, Any]:
    return {name: message[name] for name, *_ in message.fields if name != "__align" and message[name]}


def attributes(message: Any) -> dict[str, Any]:
    """Return the attributes by name; those of a nest with the nest's own header fields."""
    values = [(entry[0], entry[1]) for entry in message["attrs"]]
    by_name = {name: fields(value) | attributes(value) if isinstance(value, dict) else value for name, value in values}
    assert len(by_name) == len(values)
    return by_name


def nonzero(**values: int) -> dict[str, int]:
    return {name: value for name, value in values.items() if value}


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@given(names, names)
def test_added_link_is_read_by_pyroute2(name: str, kind: str) -> None:
    request = read(lambda rtnetlink: rtnetlink.add_link(name, kind))
    assert request == ("RTM_NEWLINK", CREATE, {}, {"IFLA_IFNAME": name, "IFLA_LINKINFO": {"IFLA_INFO_KIND": kind}})


@given(names, names, st.one_of(st.none(), descriptors))
def test_added_veth_pair_is_read_by_pyroute2(name: str, peer: str, namespace: int | None) -> None:
    words: VethPeer = {"ifname": peer}
    if namespace is not None:
        words["net_ns_fd"] = namespace
    there = {"IFLA_IFNAME": peer} | ({} if namespace is None else {"IFLA_NET_NS_FD": namespace})
    request = read(lambda rtnetlink: rtnetlink.add_link(name, "veth", words))
    kinds = {"IFLA_INFO_KIND": "veth", "IFLA_INFO_DATA": {"VETH_INFO_PEER": there}}
    assert request == ("RTM_NEWLINK", CREATE, {}, {"IFLA_IFNAME": name, "IFLA_LINKINFO": kinds})


@given(indices, descriptors)
def test_link_requests_are_read_by_pyroute2(index: int, namespace: int) -> None:
    chosen = {"index": index}
    assert read(lambda rtnetlink: rtnetlink.links()) == ("RTM_GETLINK", DUMP, {}, {})
    assert read(lambda rtnetlink: rtnetlink.delete_link(index)) == ("RTM_DELLINK", ASK, chosen, {})
    moved = read(lambda rtnetlink: rtnetlink.move_link(index, namespace))
    assert moved == ("RTM_NEWLINK", ASK, chosen, {"IFLA_NET_NS_FD": namespace})


@given(indices, prefixes, st.integers(0, 255))
def test_address_requests_are_read_by_pyroute2(index: int, prefix: tuple[str, int], flags: int) -> None:
    address, length = prefix
    header = {"family": family_of(address), "prefixlen": length, "index": index}
    both = {"IFA_LOCAL": address, "IFA_ADDRESS": address}
    added = read(lambda rtnetlink: rtnetlink.add_address(index, address, length, flags))
    assert added == ("RTM_NEWADDR", CREATE, nonzero(**header, flags=flags), both)
    deleted = read(lambda rtnetlink: rtnetlink.delete_address(index, address, length))
    assert deleted == ("RTM_DELADDR", ASK, nonzero(**header), both)


@st.composite
def routes(draw: st.DrawFn) -> tuple[str, int, dict[str, Any]]:
    """Address and length of a destination, and the words for a route to it."""
    address, bits = draw(st.sampled_from([(v4, 32), (v6, 128)]))
    numbers = {"index": indices, "metric": u32, "table": u32, "mtu": st.integers(1, 2**32 - 1)}
    words = draw(st.fixed_dictionaries({}, optional={"via": address, "src": address, **numbers}))
    return draw(address), draw(st.integers(0, bits)), words


@given(routes())
def test_route_requests_are_read_by_pyroute2(route: tuple[str, int, dict[str, Any]]) -> None:
    address, length, words = route
    table = words.get("table", RT_TABLE_MAIN)
    # A table above 255 does not fit the header and is only in the attribute.
    header = {"family": family_of(address), "dst_len": length, "table": table if table < 256 else 0}
    kinds = {"via": "GATEWAY", "src": "PREFSRC", "index": "OIF", "metric": "PRIORITY", "table": "TABLE"}
    given_words = {f"RTA_{kinds[word]}": value for word, value in words.items() if word != "mtu"}
    given_words |= {"RTA_METRICS": {"RTAX_MTU": words["mtu"]}} if "mtu" in words else {}
    given_words |= {"RTA_DST": address} if length else {}
    scope = RT_SCOPE_UNIVERSE if ":" in address or "via" in words else RT_SCOPE_LINK
    added = read(lambda rtnetlink: rtnetlink.add_route(f"{address}/{length}", **words))
    origin = {"proto": RTPROT_STATIC, "scope": scope, "type": RTN_UNICAST}
    assert added == ("RTM_NEWROUTE", CREATE, nonzero(**header, **origin), given_words)
    deleted = read(lambda rtnetlink: rtnetlink.delete_route(f"{address}/{length}", **words))
    assert deleted == ("RTM_DELROUTE", ASK, nonzero(**header, scope=RT_SCOPE_NOWHERE), given_words)


@pytest.mark.parametrize(
    ("destination", "via", "family", "length"),
    [
        ("default", None, socket.AF_INET, 0),
        ("default", "fd00::1", socket.AF_INET6, 0),
        ("10.0.0.1", None, socket.AF_INET, 32),
        ("fd00::1", None, socket.AF_INET6, 128),
    ],
)
def test_destination_without_length_is_read_by_pyroute2(
    destination: str, via: str | None, family: int, length: int
) -> None:
    _, _, header, attributes = read(lambda rtnetlink: rtnetlink.add_route(destination, via=via, index=3))
    assert (header["family"], header.get("dst_len", 0)) == (family, length)
    assert attributes.get("RTA_DST", "default") == destination


@given(
    st.sampled_from([socket.AF_INET, socket.AF_INET6]),
    u32,
    u32,
    st.fixed_dictionaries({}, optional={"priority": u32, "fwmark": u32, "suppress_prefixlen": u32}),
)
def test_rule_requests_are_read_by_pyroute2(family: int, table: int, flags: int, selectors: dict[str, int]) -> None:
    expected = {f"FRA_{name.upper()}": value for name, value in selectors.items()} | {"FRA_TABLE": table}
    header = {"family": family, "action": FR_ACT_TO_TBL, "flags": flags, "table": min(table, 255)}
    words = {"table": table, "flags": flags, **selectors}
    added = read(lambda rtnetlink: rtnetlink.add_rule(family, **words))
    assert added == ("RTM_NEWRULE", CREATE, nonzero(**header), expected)
    deleted = read(lambda rtnetlink: rtnetlink.delete_rule(family, **words))
    assert deleted == ("RTM_DELRULE", ASK, nonzero(**header), expected)


def encoded(message: Any, kind: int) -> bytes:
    """Encode a message with pyroute2 as an answer to the first request."""
    message["header"] |= {"type": kind, "flags": NLM_F_MULTI, "sequence_number": 1}
    message.encode()
    return bytes(message.data)


@st.composite
def links(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """The result of `Rtnetlink.links` for a device, and its message with shuffled attributes."""
    state, kind = draw(st.sampled_from(sorted(state_by_name))), draw(st.one_of(st.none(), names))
    flags = draw(u32)
    facts: dict[str, Any] = {"index": draw(indices), "mtu": draw(u32), "rx_bytes": draw(u64), "tx_bytes": draw(u64)}
    message = ifinfmsg()
    message["index"], message["flags"] = facts["index"], flags
    given_attributes = [
        ("IFLA_MTU", facts["mtu"]),
        ("IFLA_OPERSTATE", state),
        (
            "IFLA_STATS64",
            {"rx_bytes": facts["rx_bytes"], "tx_bytes": facts["tx_bytes"], "rx_packets": 1, "multicast": 2},
        ),
        ("IFLA_TXQLEN", 1000),
        ("IFLA_ADDRESS", "02:00:00:00:00:01"),
        *([("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", kind)]})] if kind else []),
    ]
    name = draw(names)
    message["attrs"] = draw(st.permutations([("IFLA_IFNAME", name), *given_attributes]))
    facts |= {"is_operational": state == "UP", "up": bool(flags & IFF_UP), "kind": kind}
    return {name: facts}, encoded(message, RTM_NEWLINK)


@given(st.lists(links(), max_size=4), st.integers(0, 4))
def test_links_encoded_by_pyroute2_are_read(devices: list[tuple[dict[str, Any], bytes]], cut: int) -> None:
    messages = [message for _, message in devices]
    datagrams = [b"".join(messages[:cut]), b"".join(messages[cut:]), DONE]
    result, _ = exchanged(lambda rtnetlink: rtnetlink.links(), *filter(None, datagrams))
    assert result == {name: facts for device, _ in devices for name, facts in device.items()}


@given(st.sampled_from(sorted(errno.errorcode)))
def test_error_encoded_by_pyroute2_is_raised(number: int) -> None:
    message = nlmsgerr()
    message["error"] = -number
    with pytest.raises(ControlError) as refusal:
        exchanged(lambda rtnetlink: rtnetlink.delete_link(9), encoded(message, NLMSG_ERROR))
    assert refusal.value.errno == number
