"""Check that pyroute2's IPRoute works in its node alone and leaks nothing.

`ip` and `tc` confirm it.
"""

from __future__ import annotations

import errno
import gc
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyroute2
import pytest
from pyroute2 import NetlinkError

import harness
from harness import NetNS, UsageError, add_veth, must_ping, wait_for
from harness.net.nsid import NsidEvents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import Lab

pytest_plugins = ["pytester"]

MANUAL = Path(harness.__file__).parents[1] / "docs" / "netns.md"
# Errnos for a kind of link, or a queueing discipline, that the kernel does not have.
UNKNOWN_KIND = {errno.EOPNOTSUPP, errno.ENOENT}


@contextmanager
def skip_without(thing: str) -> Iterator[None]:
    """Skip the test if the kernel lacks what the block uses."""
    try:
        yield
    except NetlinkError as error:
        if error.code in UNKNOWN_KIND:
            pytest.skip(f"this kernel has no {thing}: {error}")
        raise


def shown_link(node: NetNS, device: str) -> Any:
    """Return what `ip -d link` shows of a device."""
    [shown] = node.run_json(["ip", "-j", "-d", "link", "show", device])
    return shown


def test_bridge_between_two_links_carries_ping(lab: Lab) -> None:
    bridge, *ends = (lab.node(name) for name in ("bridge", "left", "right"))
    for number, end in enumerate(ends, start=1):
        add_veth(end, "eth0", bridge, f"port{number}")
        end.add_address("eth0", f"10.0.0.{number}/24")
    with bridge.iproute() as ip:
        with skip_without("bridge"):
            ip.link("add", ifname="br0", kind="bridge", state="up")
        for port in ("port1", "port2"):
            ip.link("set", index=bridge.index(port), master=bridge.index("br0"))
    must_ping(ends[0], "10.0.0.2")
    assert shown_link(bridge, "port1")["master"] == "br0"


def test_vxlan_between_two_nodes_carries_ping(left: NetNS, right: NetNS) -> None:
    for node, host, peer in ((left, "10.0.0.1", "10.0.0.2"), (right, "10.0.0.2", "10.0.0.1")):
        with node.iproute() as ip, skip_without("vxlan"):
            words = {"vxlan_id": 7, "vxlan_local": host, "vxlan_group": peer, "vxlan_port": 4789}
            ip.link("add", ifname="vx0", kind="vxlan", vxlan_link=node.index("eth0"), state="up", **words)
        node.add_address("vx0", host.replace("10.0.0", "10.9.0") + "/24")
    must_ping(left, "10.9.0.2")
    assert shown_link(right, "vx0")["linkinfo"]["info_data"]["id"] == 7


@pytest.mark.parametrize(
    ("kind", "words", "shown"),
    [
        ("ifb", {}, {}),
        ("bridge", {"br_ageing_time": 5000}, {"ageing_time": 5000}),
        ("vlan", {"vlan_id": 9}, {"id": 9}),
        ("vrf", {"vrf_table": 77}, {"table": 77}),
    ],
)
def test_added_link_matches_output_of_ip(left: NetNS, kind: str, words: dict[str, Any], shown: dict[str, Any]) -> None:
    left.add_link("base", kind="veth", peer={"ifname": "other"})
    lower = {"link": left.index("base")} if kind == "vlan" else {}
    with left.iproute() as ip, skip_without(kind):
        ip.link("add", ifname="new", kind=kind, **lower, **words)
        ip.link("set", index=left.index("new"), mtu=1400)
    link = shown_link(left, "new")
    assert (link["linkinfo"]["info_kind"], link["mtu"]) == (kind, 1400)
    assert shown.items() <= link["linkinfo"].get("info_data", {}).items()


def test_tbf_matches_output_of_tc(left: NetNS) -> None:
    with left.iproute() as ip:
        with skip_without("tbf"):
            ip.tc("add", "tbf", left.index("lo"), handle=0x10000, rate="1mbit", burst=2000, latency="50ms")
        [shown] = left.run_json(["tc", "-j", "qdisc", "show", "dev", "lo"])
        assert (shown["kind"], shown["handle"], shown["root"]) == ("tbf", "1:", True)
        # tc prints bytes per second.
        assert (shown["options"]["rate"], shown["options"]["burst"]) == (125000, 2000)
        ip.tc("del", index=left.index("lo"), root=True)
    assert [qdisc["kind"] for qdisc in left.run_json(["tc", "-j", "qdisc", "show", "dev", "lo"])] == ["noqueue"]


def test_htb_class_matches_output_of_tc(left: NetNS) -> None:
    with left.iproute() as ip:
        with skip_without("htb"):
            ip.tc("add", "htb", left.index("lo"), handle=0x10000, default=0x10)
        ip.tc("add-class", "htb", left.index("lo"), handle=0x10010, parent=0x10000, rate="256kbit", prio=3)
    shown = left.run(["tc", "class", "show", "dev", "lo"]).stdout
    assert shown.startswith("class htb 1:10 root prio 3 rate 256Kbit")


def test_neighbour_entry_matches_output_of_ip(left: NetNS, right: NetNS) -> None:
    assert right.name == "right"
    with left.iproute() as ip:
        words = {"dst": "10.0.0.9", "lladdr": "02:00:00:00:00:09", "state": "permanent"}
        ip.neigh("add", ifindex=left.index("eth0"), **words)
    [shown] = left.run_json(["ip", "-j", "neigh", "show", "10.0.0.9"])
    assert (shown["dev"], shown["lladdr"], shown["state"]) == ("eth0", "02:00:00:00:00:09", ["PERMANENT"])


def test_route_with_two_next_hops_matches_output_of_ip(left: NetNS, right: NetNS) -> None:
    assert right.name == "right"
    with left.iproute() as ip:
        hops = [{"gateway": "10.0.0.2", "hops": 0}, {"gateway": "10.0.0.3", "hops": 2}]
        ip.route("add", dst="10.7.0.0/16", multipath=hops)
    [shown] = left.run_json(["ip", "-j", "route", "show", "10.7.0.0/16"])
    assert [(hop["gateway"], hop["weight"]) for hop in shown["nexthops"]] == [("10.0.0.2", 1), ("10.0.0.3", 3)]


def test_links_match_those_that_pyroute2_reads(left: NetNS, right: NetNS) -> None:
    left.set_link("eth0", mtu=1300)
    must_ping(right, "10.0.0.1")
    with left.iproute() as ip:
        before, dump, after = left.links(), ip.link("dump"), left.links()
    for link in dump:
        ours = before.pop(link.get("ifname"))
        assert (ours["index"], ours["mtu"], ours["up"]) == (link["index"], link.get("mtu"), link["state"] == "up")
        assert (ours["kind"], ours["is_operational"]) == (link.get(("linkinfo", "kind")), link.get("operstate") == "UP")
        for counter in ("rx_bytes", "tx_bytes"):
            # The kernel sends packets too, so the counters may grow between the three reads.
            assert ours[counter] <= link.get(("stats64", counter)) <= after[link.get("ifname")][counter]
    assert before == {}
    assert after["eth0"]["rx_bytes"] > 0


def in_another_thread(function: Callable[..., Any], *arguments: Any, **words: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments, **words).result()


@pytest.mark.parametrize("maker", [False, True], ids=["made here", "made elsewhere"])
@pytest.mark.parametrize("user", [False, True], ids=["used here", "used elsewhere"])
def test_iproute_stays_in_its_node_in_any_thread(left: NetNS, *, maker: bool, user: bool) -> None:
    before = socket.if_nameindex()
    with in_another_thread(left.iproute) if maker else left.iproute() as ip:
        words = {"ifname": "a", "kind": "veth", "peer": "b"}
        _ = in_another_thread(ip.link, "add", **words) if user else ip.link("add", **words)
        assert set(left.links()) == {"lo", "a", "b"}
        assert socket.if_nameindex() == before


def test_iproutes_of_two_nodes_do_not_mix(lab: Lab) -> None:
    nodes = [lab.node("one"), lab.node("two")]
    with nodes[0].iproute() as first, nodes[1].iproute() as second:
        for number in range(3):
            for ip, name in ((first, "one"), (second, "two")):
                ip.link("add", ifname=f"{name}{number}", kind="veth", peer=f"{name}{number}p")
        assert {link.get("ifname") for link in second.link("dump")} == set(nodes[1].links())
    for node in nodes:
        assert set(node.links()) == {"lo", *(f"{node.name}{n}{end}" for n in range(3) for end in ("", "p"))}


def test_dump_is_read_in_node_when_pyroute2_yields_it(left: NetNS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyroute2.config, "nlm_generator", True)
    left.add_link("a", kind="veth", peer={"ifname": "b"})
    with left.iproute() as ip:
        dump = ip.link("dump")
    assert {link.get("ifname") for link in dump} == {"lo", "a", "b"}


def resources() -> dict[str, Any]:
    """Return the descriptors, threads and children of this process."""
    return {
        "descriptors": {
            entry.name: entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()
        },
        "threads": set(threading.enumerate()),
        "children": "".join(file.read_text() for file in Path("/proc/self/task").glob("*/children")),
    }


@pytest.mark.parametrize("closed_by", ["user", "node"])
def test_closed_iproute_leaves_nothing_behind(lab: Lab, closed_by: str) -> None:
    watcher = lab.node("watcher")
    before = resources()
    node = NetNS("here")
    with NsidEvents(watcher, node) as events:
        ip = node.iproute()
        assert in_another_thread(ip.link_lookup, ifname="lo") == ip.link_lookup(ifname="lo") == [1]
        if closed_by == "user":
            in_another_thread(ip.close)
            ip.close()
        node.close()
        assert wait_for(events, 5.0, "the node to vanish")
    del ip
    # An unclosed socket warns when it is collected, and a warning fails the test.
    gc.collect()
    assert resources() == before


def test_refusal_names_node_and_call(left: NetNS) -> None:
    with left.iproute() as ip, pytest.raises(NetlinkError) as refusal:
        ip.link("add", ifname="lo", kind="veth")
    assert refusal.value.code == errno.EEXIST
    assert refusal.value.__notes__ == ["node left: link('add', ifname='lo', kind='veth')"]


def test_refusal_carries_words_of_kernel(left: NetNS) -> None:
    with left.iproute() as ip, pytest.raises(NetlinkError, match="Invalid prefix for given"):
        ip.route("add", dst="10.0.0.1/8", oif=1)


def test_closed_iproute_is_refused_by_name(left: NetNS) -> None:
    with left.iproute() as ip:
        link = ip.link
    closed = pytest.raises(UsageError, match=r"^left: this iproute is closed; ask the node for another one$")
    with closed:
        ip.link("dump")
    with closed:
        link("add", ifname="a", kind="veth")
    left.close()
    with pytest.raises(UsageError, match=r"^node left: is closed$"):
        left.iproute()


@pytest.mark.parametrize("name", ["get", "bind", "poll", "ensure", "recv"])
def test_waiting_method_is_refused_with_remedy(left: NetNS, name: str) -> None:
    with left.iproute() as ip, pytest.raises(AttributeError, match=rf"^left: iproute has no {name}, .*wait_for"):
        getattr(ip, name)


@pytest.mark.parametrize("name", ["asyncore", "lnik"])
def test_name_of_no_method_is_refused(left: NetNS, name: str) -> None:
    with left.iproute() as ip, pytest.raises(AttributeError, match=rf"^left: iproute has no method {name}$"):
        getattr(ip, name)


@pytest.mark.usefixtures("inner_pytest")
def test_examples_in_manual_pass(pytester: pytest.Pytester) -> None:
    with NetNS("probe") as node, node.iproute() as ip, skip_without("bridge or tbf"):
        ip.link("add", ifname="br0", kind="bridge")
        ip.tc("add", "tbf", node.index("lo"), rate="1mbit", burst=2000, latency="50ms")
    if not MANUAL.exists():
        pytest.skip("the wheel has no docs/: run this test in a clone")
    examples = "".join(re.findall(r"^```python\n(.*?)^```$", MANUAL.read_text(), re.MULTILINE | re.DOTALL))
    pytester.makepyfile(examples)
    pytester.runpytest_inprocess().assert_outcomes(passed=2)
