"""Check the typed interface against `wg`: each reads what the other sets."""

from __future__ import annotations

import re
import resource
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import (
    ControlError,
    DeviceConfig,
    Endpoint,
    HarnessError,
    PeerConfig,
    Registry,
    UsageError,
    allowed_ips,
    scaled,
    stopped,
)
from harness.implementations import interface, keylog
from harness.lab import lab as harness_lab

if TYPE_CHECKING:
    from harness import AllowedIP, Interface, Key, Lab, Manifest

ADDRESSES = ("10.1.0.0/16", "10.2.3.4/32", "0.0.0.0/0", "fd00:7::/64", "::/0")


@pytest.fixture
def wg0(lab: Lab, implementation: Manifest) -> Interface:
    return lab.interface("wg0", implementation, lab.node("birth"), lab.node("place"))


@pytest.fixture
def alice(lab: Lab) -> Key:
    return lab.key("alice").public()


def setting(lab: Lab, alice: Key) -> DeviceConfig:
    """Return a configuration that uses every setting."""
    peer = PeerConfig(
        public_key=alice,
        preshared_key=lab.key("psk"),
        endpoint=Endpoint.parse("[fd00::9]:99"),
        persistent_keepalive=25,
        allowed_ips=allowed_ips(*ADDRESSES),
    )
    bob = PeerConfig(public_key=lab.key("bob").public())
    return DeviceConfig(private_key=lab.key("own"), listen_port=51820, fwmark=0x77, peers=(peer, bob))


# A program that binds its control socket, listens on it later, and then becomes refwg.
HESITATING = """\
import fcntl, os, socket, struct, sys
from harness import let_pass
tun = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"wg0", 0x1001))
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/wireguard/wg0.sock")
let_pass(0.3, "the program takes its time")
listener.listen()
for descriptor in (tun, listener.fileno()):
    os.set_inheritable(descriptor, True)
os.environ.update(WG_TUN_FD=str(tun), WG_UAPI_FD=str(listener.fileno()))
os.execv(sys.executable, [sys.executable, "-m", "refwg", "-f", "wg0"])
"""


def test_program_is_ready_when_its_socket_accepts_connections(lab: Lab) -> None:
    program = replace(Registry().get("refwg"), command=("{python}", "-c", HESITATING), key_log=())
    wg0 = lab.interface("wg0", program, lab.node("birth"))
    # wg(8) would delete a socket that refuses connections.
    assert wg0.wg("show", "interfaces").stdout == "wg0\n"
    assert wg0.wg("show", "wg0").stdout.startswith("interface: wg0\n")


# A program with its control socket elsewhere; then it becomes refwg.
ELSEWHERE = HESITATING.replace('let_pass(0.3, "the program takes its time")\n', "").replace(
    "/run/wireguard/wg0.sock", "{path}"
)


@pytest.mark.parametrize("template", ["/run/elsewhere/{interface}.sock", "/run/wireguard/of/mine/{interface}.uapi"])
def test_control_socket_is_where_manifest_says(lab: Lab, template: str) -> None:
    command = ("{python}", "-c", ELSEWHERE.replace("{path}", template))
    program = replace(Registry().get("refwg"), command=command, control_socket=template, key_log=())
    # Equal paths do not clash.
    for node in ("left", "right"):
        wg0 = lab.interface("wg0", program, lab.node(node))
        wg0.set(DeviceConfig(private_key=lab.key(node), listen_port=7))
        assert wg0.get().listen_port == 7
        assert isinstance(wg0, interface.ProgramInterface)
        assert wg0.has_socket
        assert wg0.wg("show", "wg0", "listen-port").stdout == "7\n"
        assert [made.get().private_key for made in lab.interfaces][-1] == lab.key(node)
    assert not list(Path("/run/elsewhere").glob("*"))
    lab.check_health()


# A program that serves its socket without a TUN device.
WITHOUT_LINK = """\
import os, signal, socket
print(os.getpid(), flush=True)
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/wireguard/wg0.sock")
listener.listen()
signal.pause()
"""


def watched_processes() -> int:
    """Return how many pidfds this process holds."""
    return sum(entry.is_symlink() and "pidfd" in str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (WITHOUT_LINK, r"refwg made its socket and no interface wg0:\n\d+"),
        ("import os; print(os.getpid())", r"refwg: .*: ended at its start:\n\d+"),
        (WITHOUT_LINK.replace("listener.listen()\n", ""), r"refwg: .*wg0\.sock: Connection refused\n\d+"),
    ],
    ids=["no-link", "ended", "deaf"],
)
def test_program_is_terminated_when_its_start_fails(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, script: str, complaint: str
) -> None:
    if "refused" in complaint:
        monkeypatch.setattr(interface, "_LISTENS", 0.1)
    program = replace(Registry().get("refwg"), command=("{python}", "-c", script), key_log=())
    before = watched_processes()
    with pytest.raises(HarnessError, match=rf"(?s)^{complaint}$"):
        lab.interface("wg0", program, lab.node("birth"))
    pid = (lab.directory / "birth-wg0-refwg.log").read_text().strip()
    assert not Path("/proc", pid).exists()
    assert watched_processes() == before


def test_program_is_terminated_when_its_link_setup_fails(lab: Lab) -> None:
    node = lab.node("birth")
    before = watched_processes()
    with pytest.raises(HarnessError, match="Invalid argument"):
        lab.interface("wg0", replace(Registry().get("refwg"), mtu=70_000), node)
    assert watched_processes() == before


def test_evidence_snapshot_times_out_on_hanging_program(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    wg0 = lab.interface("wg0", Registry().get("refwg"), lab.node("birth"))
    assert isinstance(wg0, interface.ProgramInterface)
    for module in (harness_lab, keylog):
        monkeypatch.setattr(module, "EVIDENCE_TIMEOUT", 0.1)
    with stopped(wg0.pid):
        lab.snapshot()
    shown = (lab.directory / "birth-wg0.wg.txt").read_text()
    assert shown == f"$ wg show\nwg0@birth: wg show wg0: still ran after {scaled(0.1):g} s: \n\n"


def test_program_file_limit_is_raised_to_hard_limit(lab: Lab) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1, before[1]))
    try:
        wg0 = lab.interface("wg0", Registry().get("refwg"), lab.node("birth"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert isinstance(wg0, interface.ProgramInterface)
    assert resource.prlimit(wg0.process.pid, resource.RLIMIT_NOFILE) == (before[1], before[1])


def test_wg_show_dump_prints_what_interface_sets(lab: Lab, wg0: Interface, alice: Key) -> None:
    wg0.set(setting(lab, alice))
    device, *peers = [line.split("\t") for line in wg0.wg("show", "wg0", "dump").stdout.splitlines()]
    assert device == [str(lab.key("own")), str(lab.key("own").public()), "51820", "0x77"]
    shown = {key: (psk, endpoint, sorted(allowed.split(",")), *rest) for key, psk, endpoint, allowed, *rest in peers}
    # Bob has no endpoint, so his counters are those of a peer without traffic.
    # Alice has none either while the link is down (IF-08).
    bob = wg0.peer(lab.key("bob").public())
    no_traffic = (str(bob.rx_bytes), str(bob.tx_bytes))
    assert shown == {
        str(alice): (str(lab.key("psk")), "[fd00::9]:99", sorted(ADDRESSES), "0", *no_traffic, "25"),
        str(bob.public_key): ("(none)", "(none)", ["(none)"], "0", *no_traffic, "off"),
    }


def test_wg_setconf_restores_output_of_wg_showconf(lab: Lab, wg0: Interface, alice: Key) -> None:
    wg0.set(setting(lab, alice))
    before = wg0.get()
    saved = wg0.wg("showconf", "wg0").stdout
    wg0.set(DeviceConfig(private_key=lab.key("other"), fwmark=0, replace_peers=True))
    assert wg0.get().peers == ()
    wg0.wg("setconf", "wg0", "/dev/stdin", stdin=saved)
    assert comparable(wg0, alice) == (
        before.private_key,
        before.listen_port,
        before.fwmark,
        *before.peer(alice).allowed_ips,
    )
    assert wg0.peer(alice).endpoint == Endpoint.parse("[fd00::9]:99")


def test_interface_gets_mtu_of_its_manifest(lab: Lab, implementation: Manifest) -> None:
    node = lab.node("ns0")
    iface = lab.interface("wg0", replace(implementation, mtu=1342), node)
    assert node.links()["wg0"]["mtu"] == (1420 if iface.manifest.kind == "kernel" else 1342)


def test_interface_starts_with_mtu_1420(lab: Lab, implementation: Manifest) -> None:
    node = lab.node("ns0")
    lab.interface("wg0", implementation, node)
    assert node.links()["wg0"]["mtu"] == 1420


def comparable(side: Interface, peer: Key) -> tuple[object, ...]:
    state = side.get()
    return state.private_key, state.listen_port, state.fwmark, *state.peer(peer).allowed_ips


def test_interface_reads_what_wg_sets(lab: Lab, wg0: Interface, alice: Key) -> None:
    wg0.wg("set", "wg0", "private-key", "/dev/stdin", "listen-port", "7", "fwmark", "0x9", stdin=str(lab.key("own")))
    wg0.wg("set", "wg0", "peer", str(alice), "preshared-key", "/dev/stdin", "endpoint", "127.0.0.1:9",
           "persistent-keepalive", "11", "allowed-ips", ",".join(ADDRESSES), stdin=str(lab.key("psk")))  # fmt: skip
    state = wg0.get()
    (peer,) = state.peers
    assert (state.private_key, state.listen_port, state.fwmark) == (lab.key("own"), 7, 9)
    assert (peer.public_key, peer.preshared_key, str(peer.endpoint)) == (alice, lab.key("psk"), "127.0.0.1:9")
    assert peer.persistent_keepalive == 11
    assert set(peer.allowed_ips) == set(allowed_ips(*ADDRESSES))


def test_set_changes_only_settings_it_names(lab: Lab, wg0: Interface, alice: Key) -> None:
    wg0.set(setting(lab, alice))
    wg0.set_peer(alice, persistent_keepalive=0, replace_allowed_ips=True, allowed_ips=allowed_ips("10.9.0.0/16"))
    wg0.set(DeviceConfig(fwmark=0))
    state = wg0.get()
    assert (state.listen_port, state.fwmark, len(state.peers)) == (51820, 0, 2)
    peer = state.peer(alice)
    assert (peer.persistent_keepalive, peer.allowed_ips) == (0, allowed_ips("10.9.0.0/16"))
    assert (peer.preshared_key, str(peer.endpoint)) == (lab.key("psk"), "[fd00::9]:99")


def test_removed_peer_is_gone_in_wg_and_typed_interface(lab: Lab, wg0: Interface, alice: Key) -> None:
    wg0.set(setting(lab, alice))
    wg0.set_peer(alice, remove=True)
    assert wg0.wg("show", "wg0", "peers").stdout == f"{lab.key('bob').public()}\n"
    with pytest.raises(UsageError, match=re.escape(f"; there are: {lab.key('bob').public()}")):
        wg0.peer(alice)


def test_allowed_ips_beyond_one_netlink_message_are_read_back(lab: Lab, wg0: Interface, alice: Key) -> None:
    many = [f"10.0.{b}.{c}/32" for b, c in product(range(64), range(256))]
    wanted: tuple[AllowedIP, ...] = allowed_ips(*many)
    assert len(set(wanted)) == 16_384
    wg0.set(DeviceConfig(private_key=lab.key("own"), peers=(PeerConfig(public_key=alice, allowed_ips=wanted),)))
    assert set(wg0.peer(alice).allowed_ips) == set(wanted)
    key, *shown = wg0.wg("show", "wg0", "allowed-ips").stdout.split()
    assert (key, set(shown)) == (str(alice), set(many))


def test_port_in_use_is_refused_with_eaddrinuse(lab: Lab, wg0: Interface) -> None:
    wg0.up()
    with lab.nodes["birth"].socket(2, 2) as taken:
        taken.bind(("0.0.0.0", 4444))  # noqa: S104 - a node of our own
        with pytest.raises(ControlError, match=r"^wg0 .*EADDRINUSE: set listen_port 4444") as refusal:
            wg0.set(DeviceConfig(listen_port=4444))
    assert refusal.value.errno == 98


@pytest.mark.parametrize("name", ["", "wg0123456789abcd", "a/b"])
def test_bad_interface_name_is_refused(lab: Lab, implementation: Manifest, name: str) -> None:
    with pytest.raises(UsageError, match=r"^interface name .*: 1 to 15 bytes without a slash"):
        lab.interface(name, implementation, lab.node("birth"))


def test_interfaces_of_same_name_and_birth_node_do_not_clash(lab: Lab, implementation: Manifest) -> None:
    birth = lab.node("birth")
    sides = [lab.interface("wg0", implementation, birth, lab.node(f"place{n}")) for n in range(3)]
    for port, side in enumerate(sides, 100):
        side.set(DeviceConfig(listen_port=port))
    assert [side.wg("show", "wg0", "listen-port").stdout for side in sides] == ["100\n", "101\n", "102\n"]
    assert "wg0" not in birth.links()
