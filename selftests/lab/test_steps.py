"""Check the steps in a test's evidence: one for each action, with its time, without keys."""

from __future__ import annotations

import re
import signal
import socket
import struct
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import pytest

from harness import (
    Capture,
    ControlError,
    DeadlineExceeded,
    DeviceConfig,
    Drop,
    Endpoint,
    Hold,
    Key,
    NetNS,
    PeerConfig,
    ProgramInterface,
    Registry,
    UdpStream,
    Wire,
    allowed_ips,
    error_for,
    flood,
    let_pass,
    must_ping,
    ping,
    poll_until,
    set_offloads,
    tcp_stream,
    tcp_streams,
    udp_message,
    udp_receiver,
    wait_for,
)
from harness.control.genl import GenlControl
from harness.control.uapi import UapiControl
from harness.implementations.interface import create
from harness.net.rtnetlink import RTNLGRP_LINK
from harness.sandbox.process import Process
from harness.wait import Datagram
from harness.wire.messages import INITIATION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from harness import Lab

pytest_plugins = ["pytester"]

OF_LEFT, OF_RIGHT = "10.0.0.1", "10.0.0.2"
# Methods without a step: they change nothing, or return an object that the test uses directly.
READS: Final = {
    NetNS: {"index", "has_link", "is_open",  "links", "monitor", "nft_counters", "run_json", "socket", "udp_ports"},
    Process: {"close", "cpu_seconds", "running", "status", "tail", "thread_states"},
    ProgramInterface: {
        "complaints", "complaints_in_log", "connect", "cpu_seconds", "get", "has_socket", "key_log", "mounts", "peer",
        "pid", "told",
    },
    Wire: {"complaints", "drain", "fileno", "recording", "unexplained_losses", "save", "sightings"},
    Capture: {"close", "fileno", "messages", "recording", "save", "unsplit"},
    UdpStream: {"arrivals", "fileno"},
    UapiControl: {"get"},
    GenlControl: {"family_id", "get", "interface"},
}  # fmt: skip


def lines_of(lab: Lab, action: Callable[[], object]) -> list[str]:
    """Return the steps of an action as `NODE: TEXT`, with the durations of waits, but not of other steps."""
    before = len(lab.steps.steps)
    action()
    lines = [f"{step.node}: {step}" for step in lab.steps.steps[before:]]
    return [line if line.startswith(": ") else re.sub(r"(   #|,) \d+\.\d+ s$", "", line) for line in lines]


def check(lab: Lab, kind: type, actions: Mapping[str, tuple[Callable[[], object], str]]) -> None:
    """Run each action and check its step; fail if an action for a public name of the class is missing."""
    public = {name for base in kind.__mro__[:-1] for name in vars(base) if not name.startswith("_")}
    assert public - READS[kind] == {name.partition(" ")[0] for name in actions} & public
    missing = {}
    for name, (action, pattern) in actions.items():
        lines = lines_of(lab, action)
        if not any(re.search(pattern, line) for line in lines):
            missing[name] = (pattern, lines)
    assert missing == {}


def wait_and_close(process: Process) -> None:
    process.wait(9)
    process.close()


def test_everything_node_does_is_recorded(lab: Lab, left: NetNS, right: NetNS, tmp_path: Path) -> None:
    route, table = "10.1.0.0/16", 7
    check(
        lab,
        NetNS,
        {
            "run": (lambda: left.run(["cat"], stdin="some\ntext"), r"^left: cat <<'EOF'\nsome\ntext\nEOF$"),
            "run fails": (lambda: left.run(["false"], check=False), r"^left: false   # status 1$"),
            "spawn": (
                lambda: wait_and_close(left.spawn(["true"], log=tmp_path / "log")),
                r"^left: true >> log 2>&1 &   # pid",
            ),
            "add_link": (
                lambda: left.add_link("d0", kind="veth", peer={"ifname": "d1"}),
                r"^left: ip link add d0 type veth peer name d1$",
            ),
            "set_link": (lambda: left.set_link("d0", up=True, mtu=1400), r"^left: ip link set d0 mtu 1400 up$"),
            "add_address": (
                lambda: left.add_address("d0", "192.0.2.1/24", "fd00:9::1/64"),
                r"^left: ip address add fd00:9::1/64 dev d0 nodad$",
            ),
            "add_route": (
                lambda: left.add_route(route, via="192.0.2.9", metric=5),
                r"ip route add 10.1.0.0/16 via 192.0.2.9 metric 5$",
            ),
            "delete_route": (lambda: left.delete_route(route), r"ip route del 10.1.0.0/16$"),
            "add_rule": (
                lambda: left.add_rule(socket.AF_INET6, table=table, fwmark=3, flags=2),
                r"ip -6 rule add not table 7 fwmark 3$",
            ),
            "delete_rule": (lambda: left.delete_rule(socket.AF_INET6, table=table), r"ip -6 rule del table 7$"),
            "delete_address": (
                lambda: left.delete_address("d0", "192.0.2.1/24"),
                r"ip address del 192.0.2.1/24 dev d0$",
            ),
            "sysctl": (lambda: left.sysctl("net.ipv4.ip_forward", 1), r"^left: sysctl -w net.ipv4.ip_forward=1$"),
            "nft": (lambda: left.nft("table ip t {}"), r"^left: nft -f - <<'EOF'\ntable ip t {}\nEOF$"),
            "forget_connections": (left.forget_connections, "^left: conntrack -F"),
            "set_nsid": (lambda: left.set_nsid(lab.node("fourth"), 9), "^left: ip netns set fourth 9$"),
            "move_link": (lambda: left.move_link("d0", right), "^left: ip link set d0 netns right$"),
            "delete_link": (lambda: right.delete_link("d0"), "^right: ip link del d0$"),
            "set_offloads": (lambda: set_offloads(left, "eth0", tx=False), "^left: ethtool -K eth0 tx off$"),
            "iproute": (
                lambda: left.iproute().link("set", index=left.index("eth0"), mtu=1401),
                r"^left: pyroute2: link\('set', index=",
            ),
            "close": (lab.node("third").close, "^third: ip netns del third$"),
        },
    )
    text = str(lab.steps)
    assert "ip netns add left" in text
    assert "left    ip link add eth0 type veth peer name eth0 netns right" in text


def test_everything_done_to_process_is_recorded(lab: Lab, left: NetNS, tmp_path: Path) -> None:
    def start(*argv: str) -> Process:
        made = left.spawn(argv, log=tmp_path / "log")
        lab.undo(made.close)
        return made

    cat = start("sh", "-c", "echo ready; exec tail -f /dev/null")
    other = start("sh", "-c", "exec tail -f /dev/null")
    check(
        lab,
        Process,
        {
            "says": (lambda: cat.says("ready"), r"wait for sh to write 'ready'   # \d+\.\d{3} s"),
            "signal": (lambda: cat.signal(signal.SIGUSR1), r"left: kill -USR1 \d+$"),
            "wait": (lambda: cat.wait(9), r"wait for sh \(pid \d+\) to end   # \d"),
            "terminate": (other.terminate, r"left: kill -TERM \d+   # killed by SIGTERM"),
            "kill": (start("tail", "-f", "/dev/null").kill, r"left: kill -KILL \d+   # killed by SIGKILL"),
        },
    )


def test_everything_done_to_interface_is_recorded(lab: Lab, left: NetNS, right: NetNS, tmp_path: Path) -> None:
    made = lab.interface("wg0", Registry().get("refwg"), left)
    assert isinstance(made, ProgramInterface)
    key, peer = lab.key("one"), lab.key("two").public()
    lacking = DeviceConfig(fwmark=1, peers=(PeerConfig(public_key=peer, endpoint=Endpoint("1.2.3.4", 5)),))

    # A program without its socket ends by itself: not one that the lab ends.
    other = create("wg1", Registry().get("refwg"), left, tmp_path / "log")
    lab.undo(other.close)
    assert isinstance(other, ProgramInterface)

    def refuse() -> None:
        with pytest.raises(ControlError):
            made.set(DeviceConfig(listen_port=1 << 16))

    check(
        lab,
        ProgramInterface,
        {
            "set": (
                lambda: made.set(DeviceConfig(private_key=key, listen_port=7, replace_peers=True)),
                r"^wg0@left: wg set wg0 listen-port 7 private-key <\(echo \S{6}…\) \(in place of all peers\)$",
            ),
            "set refused": (refuse, "wg set wg0 listen-port 65536   # failed after .*wg0"),
            "control": (lambda: made.control.set(lacking), r"wg set wg0 fwmark 1 peer \S{6}… endpoint 1.2.3.4:5$"),
            "set_peer": (
                lambda: made.set_peer(peer, preshared_key=key, allowed_ips=allowed_ips("10.0.0.0/8")),
                r"peer \S{6}… preshared-key <\(echo \S{6}…\) allowed-ips \+10.0.0.0/8$",
            ),
            "up": (lambda: made.up("192.0.2.1/24", mtu=1300), "^left: ip link set wg0 mtu 1300 up$"),
            "move": (lambda: made.move(right), "^left: ip link set wg0 netns right$"),
            "wg": (lambda: made.wg("show", "wg0"), "^wg0@left: wg show wg0$"),
            "remove_socket": (other.remove_socket, "^wg1@left: rm /run/wireguard/wg1.sock$"),
            "close": (lambda: lab.end(made), r"^wg0@left: kill -TERM \d+   # status 0"),
        },
    )
    assert re.search(
        r"wg0@left +RUST_BACKTRACE=1 .* refwg -f wg0 .*>> left-wg0-refwg.log 2>&1 &   # pid \d", str(lab.steps)
    )


def test_everything_done_to_wire_is_recorded(lab: Lab) -> None:
    left, right = lab.node("left"), lab.node("right")
    made = lab.wire((left, "eth0"), (right, "eth0"), script=None)
    left.add_address("eth0", f"{OF_LEFT}/24")
    right.add_address("eth0", f"{OF_RIGHT}/24")
    # The smallest datagram that the wire takes for a WireGuard message.
    udp_message(left, OF_RIGHT, 9, bytes([INITIATION, 0, 0, 0]) + bytes(144))
    seen = made.wait_for("initiation", "an initiation")
    check(
        lab,
        Wire,
        {
            "wait_for": (
                lambda: made.wait_for("any", "a message"),
                r": wait for a message   # .* s: left: .*initiation",
            ),
            "apply": (
                lambda: made.apply(Drop(message="response", nth=2, optional=True), Hold(gather=2, optional=True)),
                r"^wire left-right: script: drop message=response nth=2 optional=True; hold optional=True gather=2$",
            ),
            "release": (made.release, "^wire left-right: release the 0 messages held$"),
            "replay": (lambda: made.replay(seen), r"^wire left-right: replayed: \S+: send 190 bytes towards right$"),
            "reflect": (lambda: made.reflect(seen), r"^wire left-right: reflected: \S+: send 190 bytes towards left$"),
            "inject": (lambda: made.inject(bytes(60), sender="left"), "injected: send 60 bytes towards right$"),
            "close": (made.close, "^wire left-right: carry no more frames$"),
        },
    )


def test_traffic_is_recorded_with_its_result(lab: Lab, left: NetNS, right: NetNS) -> None:
    receiver = udp_receiver(right, OF_RIGHT, 7)
    lab.undo(receiver.close)
    capture = Capture(left, "eth0")
    lab.undo(capture.close)
    expected = [
        (
            lambda: ping(left, OF_RIGHT, count=2, size=9),
            r"^left: ping -c 2 -s 9 10.0.0.2   # 2 of 2 answered, within \d",
        ),
        (lambda: ping(left, "10.0.0.9", timeout=0.01), r"ping -c 1 -s 56 10.0.0.9   # 0 of 1 answered, not 0"),
        (lambda: must_ping(left, OF_RIGHT), "ping -c 1 -s 56 10.0.0.2   # 1 of 1 answered"),
        (lambda: flood(left, OF_RIGHT, count=3, seconds=0.01), "ping -f -c 3 -s 56 10.0.0.2   # . of 3 answered"),
        (
            lambda: tcp_stream(left, right, OF_RIGHT, size=9),
            "left: send 1 TCP streams of 9 bytes to right 10.0.0.2   # all",
        ),
        (
            lambda: tcp_streams(left, right, OF_RIGHT, count=2, size=9),
            "send 2 TCP streams of 9 bytes to right 10.0.0.2   #",
        ),
        (lambda: udp_message(left, OF_RIGHT, 7, b"12345"), "^left: send 5 bytes by UDP to 10.0.0.2 port 7$"),
        (lambda: wait_for(Datagram(receiver), 5, "it"), r"^: wait for it   # \d.\d{3} s: \(5 bytes, "),
        (lambda: capture.wait_for(lambda _: True, 5, "a datagram"), r"wait for a datagram   # \d"),
        (lambda: udp_receiver(right, OF_RIGHT, 0).close(), r"^right: receive UDP at 10.0.0.2 port 0   # port \d+$"),
        (
            lambda: error_for(left, OF_RIGHT),
            r"send 16 bytes by UDP to 10.0.0.2 port 9, .*# send\(2\): no error; then Error",
        ),
        (lambda: Capture(right, "lo").close(), "^right: tcpdump -i lo -w right-lo.pcapng &"),
        (
            lambda: poll_until(lambda: 3, lambda n: n > 4, 0.01),
            r"^: poll until test_steps.py:\d+ accepts   # .* not within 0.01 s; seen: 3",
        ),
        (
            lambda: poll_until(lambda: 3, lambda n: n < 4, 9, what="it is small"),
            r"^: poll until it is small   # \d.\d+ s: seen: 3",
        ),
        (lambda: let_pass(0.001, "the clock is tested"), "^: let 0.001 s pass: the clock is tested"),
    ]
    for action, pattern in expected:
        lines = lines_of(lab, action)
        assert any(re.search(pattern, line) for line in lines), (pattern, lines)


def test_udp_stream_is_recorded_with_what_arrived(lab: Lab, left: NetNS, right: NetNS) -> None:
    with UdpStream(left, right, OF_RIGHT, size=100) as stream:
        check(
            lab,
            UdpStream,
            {
                "send": (
                    lambda: stream.send(3),
                    r"^left: send 3 UDP datagrams of 100 bytes to right 10.0.0.2 port \d+$",
                ),
                "wait_for": (
                    lambda: stream.wait_for(3),
                    r": wait for 3 of 3 datagrams to arrive   # .*: 3 of 3 datagrams",
                ),
            },
        )
    assert "end the UDP stream to right 10.0.0.2 port" in str(lab.steps.steps[-1])
    assert "# 3 of 3 datagrams arrived" in str(lab.steps.steps[-1])


def test_raw_uapi_request_is_recorded_without_keys(lab: Lab, left: NetNS) -> None:
    made = lab.interface("wg0", Registry().get("refwg"), left)
    assert isinstance(made.control, UapiControl)
    control, request = made.control, f"set=1\nprivate_key={lab.key('one').raw.hex()}\n\n".encode()
    check(
        lab,
        UapiControl,
        {
            "set": (lambda: control.set(DeviceConfig(fwmark=1)), "wg set wg0 fwmark 1$"),
            "exchange": (lambda: control.exchange(request, "set"), r"wg0.sock: set=1 private_key=\w{6}…   # errno=0$"),
        },
    )


def test_missed_deadline_is_recorded_with_what_was_seen(lab: Lab, left: NetNS) -> None:
    with closing(_Sees(left, "nothing of the sort")) as sees, pytest.raises(DeadlineExceeded):
        wait_for(sees, 0.01, "a wonder")
    assert re.fullmatch(
        r"wait for a wonder   # failed after 0\.\d+ s: waited 0\.01 s for a wonder; seen: nothing of the sort",
        str(lab.steps.steps[-1]),
    )


def test_no_key_is_in_evidence_of_steps(lab: Lab, left: NetNS) -> None:
    made = lab.interface("wg0", Registry().get("refwg"), left)
    keys = [lab.key(name) for name in ("private", "psk", "asked", "piped")]
    config = f"[Interface]\nPrivateKey = {keys[3]}\n"
    made.set(DeviceConfig(private_key=keys[0]))
    made.set_peer(keys[2].public(), preshared_key=keys[1])
    made.wg("setconf", "wg0", "/dev/stdin", stdin=config)
    made.wg("set", "wg0", "peer", str(keys[2].public()), "preshared-key", "/dev/stdin", stdin=str(keys[1]))
    left.run(["echo", str(keys[2]), keys[2].raw.hex(), "x" * 2000 + str(keys[2])])
    poll_until(made.get, lambda _: True, 1)
    with closing(_Sees(left, repr(keys[0]))) as sees, pytest.raises(DeadlineExceeded, match="failed"):
        wait_for(sees, 0, "failed")
    lab.snapshot()
    text = (lab.directory / "commands.txt").read_text()
    for key in (*keys, keys[2].public()):
        assert str(key)[:6] in text or key.raw.hex()[:6] in text
        for secret in (str(key), key.raw.hex(), repr(key.raw)):
            assert secret[:12] not in text


class _Sees:
    """An event that never comes; `seen` returns a fixed text."""

    def __init__(self, node: NetNS, seen: str) -> None:
        self._monitor, self._seen = node.monitor(RTNLGRP_LINK), seen

    def fileno(self) -> int:
        return self._monitor.fileno()

    def close(self) -> None:
        self._monitor.close()

    def look(self) -> None:
        return None

    def seen(self) -> str:
        return self._seen


def test_thousands_of_peers_leave_one_short_step(lab: Lab, left: NetNS) -> None:
    made = lab.interface("wg0", Registry().get("refwg"), left)
    prefixes = allowed_ips(*(f"10.0.{n}.0/24" for n in range(200)))
    first = PeerConfig(public_key=Key(bytes([1] * 32)), allowed_ips=prefixes, replace_allowed_ips=True)
    others = [PeerConfig(public_key=Key(n.to_bytes(32))) for n in range(1, 1000)]
    (line,) = lines_of(lab, lambda: made.set(DeviceConfig(peers=(first, *others))))
    assert "allowed-ips 10.0.0.0/24,10.0.1.0/24,10.0.2.0/24,10.0.3.0/24,(and 196 more) peer" in line
    assert "(and 997 more peers)" in line
    assert len(line) < 1000


FAILING: Final = """
import time
from harness import ping

def test(lab):
    node = lab.node("x")
    ping(node, "127.0.0.1")
    log = lab.directory / "program.log"
    program = node.spawn(["sh", "-c", "echo first; exec tail -f /dev/null"], log=log)
    program.says("first")
    ping(node, "127.0.0.1")
    capture = lab.capture(node, "lo")
    ping(node, "127.0.0.1", count=3)
    program.kill()
    program.close()
    1 / 0
"""


@pytest.mark.usefixtures("inner_pytest")
def test_evidence_has_steps_logs_and_frames_of_one_clock(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FAILING)
    pytester.runpytest_inprocess().assert_outcomes(failed=1)
    (evidence,) = (pytester.path / "report" / "evidence").glob("*")
    text = (evidence / "commands.txt").read_text()
    headings = ["set-up", "the test itself", "read for the evidence: state of nodes and interfaces", "undo"]
    assert [line[2:] for line in text.splitlines() if line[2:] in headings] == headings[1:]
    own, read, undone = (text.partition(f"# {heading}\n")[2] for heading in headings[1:])
    assert own.index("ping -c 1") < own.index("echo first") < own.index("ping -c 3") < own.index("kill -KILL")
    assert "nft list ruleset" not in own.partition("# read for")[0]
    assert "nft list ruleset" in read
    assert "ip netns del x" in undone
    times = re.findall(r"^(\d\d:\d\d:\d\d\.\d{6})  \+", text, re.MULTILINE)
    assert times == sorted(times)
    start, seen = (re.search(rf"^(\S+)  .*{word}", text, re.MULTILINE) for word in ("echo first", "ping -c 3"))
    stamp, line = (evidence / "program.log").read_text().split(maxsplit=1)
    assert line == "first\n"
    assert start is not None
    assert seen is not None
    assert start[1] <= stamp <= seen[1]
    first = min(frame_times(evidence / "x-lo.pcapng"))
    assert seen[1] <= f"{datetime.fromtimestamp(first / 1e9, UTC):%H:%M:%S.%f}" < times[-1]


def frame_times(path: Path) -> list[int]:
    """The times of the frames of a capture, in nanoseconds (pcapng, enhanced packet blocks)."""
    data, times = path.read_bytes(), []
    while data:
        kind, size = struct.unpack_from("<II", data)
        if kind == 6:
            high, low = struct.unpack_from("<II", data, 12)
            times.append(high << 32 | low)
        data = data[size:]
    return times
