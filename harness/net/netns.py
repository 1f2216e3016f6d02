"""Make a node: a network namespace with addresses, routes, firewall, programs, sockets.

A node has a name below /run/netns, so that `ip netns` knows it, and a thread that lives in it: programs are started and
sockets made there, among them those by which links, addresses, routes and rules are changed.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Self, TypeVar

from harness.errors import ControlError, HarnessError, UsageError
from harness.net.ioctl import Devices
from harness.net.iproute import NodeIPRoute
from harness.net.rtnetlink import RTNLGRP_IPV6_ROUTE, Monitor, Rtnetlink, flush_connections
from harness.sandbox.launch import require_sandbox
from harness.sandbox.namespace import NamespaceThread, enter_new_network, unmount
from harness.sandbox.process import Process, run
from harness.wait import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from harness.net.rtnetlink import LinkFacts, RouteWords, VethPeer
    from harness.sandbox.process import Completed

P = ParamSpec("P")
T = TypeVar("T")

HANDLES: Final = Path("/run/netns")
_SO_RCVBUFFORCE: Final = 33
# Skips the short time in which the kernel holds a new IPv6 address back.
_IFA_F_NODAD: Final = 2
_IPV6_READY: Final = 5.0
_NETLINK_NETFILTER: Final = 12
_RTF_LOCAL: Final = 0x80000000
_TABLES: Final = {"local": 255, "main": 254, "default": 253}
# Every kernel has it, anyone may choose it, and it goes by losses alone. The machine's own may be BBR, which paces a
# stream that was starved for a while at some packets a second, for tens of seconds.
_CONGESTION_CONTROL: Final = "reno"


class NetNS:
    """A network namespace, made at once; use it as a context manager or call `close`."""

    def __init__(
        self, name: str, *, commands: Callable[[str, Sequence[str]], None] = lambda _node, _argv: None
    ) -> None:
        """Make the namespace with its loopback interface up and TCP's congestion control the same on every machine.

        commands: told of every program run here, for the evidence. Raises Unavailable outside a sandbox, UsageError for
        a name that is taken.
        """
        require_sandbox()
        self.name = name
        self.handle = HANDLES / name
        self._commands = commands
        self._is_open = True
        self._iproutes: list[NodeIPRoute] = []
        if self.handle.exists():
            raise UsageError(f"node {name}: there is one of that name already")
        self.thread = NamespaceThread(name, lambda: enter_new_network(self.handle))
        self._devices = Devices(self.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._netlink = Rtnetlink(self.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))
        self._devices.set_up("lo", True)
        self.sysctl("net.ipv4.tcp_congestion_control", _CONGESTION_CONTROL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether it was not given up yet."""
        return self._is_open

    def close(self) -> None:
        """Give up the namespace, unless that was done; the kernel removes it when no process or socket is in it."""
        if not self._is_open:
            return
        self._is_open = False
        for iproute in self._iproutes:
            iproute.close()
        self._netlink.close()
        self._devices.close()
        self.thread.close()
        unmount(self.handle)
        self.handle.unlink()

    def __repr__(self) -> str:
        return f"NetNS({self.name!r})"

    # Programs and sockets

    def run(self, argv: Sequence[str], *, deadline: float = 10.0, stdin: str = "", check: bool = True) -> Completed:
        """Run a program here to its end; see harness.sandbox.process.run."""
        self._commands(self.name, argv)
        return run(self.thread, argv, deadline=deadline, stdin=stdin, check=check)

    def run_json(self, argv: Sequence[str]) -> Any:
        """Run a program here that prints JSON, such as `ip -j` or `nft -j`, and return what it printed."""
        return json.loads(self.run(argv).stdout)

    def spawn(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> Process:
        """Start a program here in the background; its output goes to `log`."""
        self._commands(self.name, argv)
        return Process(self.thread, argv, log=log, env=env)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Make a socket that lives here; it may be used from any thread."""
        return self.thread.call(socket.socket, family, kind, protocol)

    def monitor(self, group: int) -> Monitor:
        """Make a monitor of one multicast group here; group: RTNLGRP_* of rtnetlink.py."""
        sock = self.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        return Monitor(sock, group)

    def udp_ports(self) -> set[int]:
        """The UDP ports that sockets of this node are bound to, of both families (proc(5), /proc/net/udp)."""
        rows = [row for name in ("udp", "udp6") for row in self._table(name)[1:]]
        return {int(row[1].rpartition(":")[2], 16) for row in rows}

    def _table(self, name: str) -> list[list[str]]:
        """The rows of a file in /proc/net, split into words."""
        text = self.thread.call(Path(f"/proc/thread-self/net/{name}").read_text)
        return [row.split() for row in text.splitlines()]

    # Links

    def index(self, device: str) -> int:
        """The interface index of a device; raises UsageError if there is none of that name."""
        found = self._devices.index(device)
        if found is None:
            raise UsageError(f"{self.name}: no device {device}; there are: {', '.join(self.links()) or 'none'}")
        return found

    def has_link(self, device: str) -> bool:
        return self._devices.index(device) is not None

    def links(self) -> dict[str, LinkFacts]:
        """All devices by name."""
        return self._ask("link show", self._netlink.links)

    def set_link(self, device: str, *, up: bool | None = None, mtu: int | None = None, name: str | None = None) -> None:
        """Change a device: `up`, `mtu`, `name`; None leaves it as it is."""
        index = self.index(device)
        try:
            if up is False:
                self._devices.set_up(device, False)
            if mtu is not None:
                self._devices.set_mtu(device, mtu)
            if name is not None:
                self._devices.rename(device, name)
            if up:
                self._devices.set_up(name or device, True)
        except OSError as error:
            raise HarnessError(f"{self.name}: ip link set {device}: {error.strerror}") from error
        if up:
            self._await_ipv6(index)

    def add_link(self, device: str, *, kind: str, peer: VethPeer | None = None) -> None:
        """Make a device of a kind the kernel knows (`veth`, `dummy`, `wireguard`); peer: see Rtnetlink.add_link."""
        self._ask(f"link add {device} type {kind}", self._netlink.add_link, device, kind, peer)

    def delete_link(self, device: str) -> None:
        self._ask(f"link del {device}", self._netlink.delete_link, self.index(device))

    def move_link(self, device: str, place: NetNS) -> None:
        """Move a device to another node, as `ip link set DEVICE netns PLACE` does."""
        descriptor = os.open(place.handle, os.O_RDONLY | os.O_CLOEXEC)
        try:
            what = f"link set {device} netns {place.name}"
            self._ask(what, self._netlink.move_link, self.index(device), descriptor)
        finally:
            os.close(descriptor)

    def set_nsid(self, node: NetNS, nsid: int) -> None:
        """Give another node an id that is valid here, as `ip netns set NODE NSID` does."""
        descriptor = os.open(node.handle, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._ask(f"netns set {node.name} {nsid}", self._netlink.set_nsid, descriptor, nsid)
        finally:
            os.close(descriptor)

    # Addresses, routes, rules

    def add_address(self, device: str, *addresses: str) -> None:
        """Give a device addresses, each as ADDRESS/LENGTH, usable at once: IPv6 without duplicate address detection."""
        index = self.index(device)
        for address in addresses:
            host, length = self._parse(address)
            flags = _IFA_F_NODAD if ":" in address else 0
            self._ask(f"address add {address} dev {device}", self._netlink.add_address, index, host, length, flags)
        if any(":" in address for address in addresses) and self._devices.is_up(device):
            self._await_ipv6(index)

    def delete_address(self, device: str, *addresses: str) -> None:
        index = self.index(device)
        for address in addresses:
            host, length = self._parse(address)
            self._ask(f"address del {address} dev {device}", self._netlink.delete_address, index, host, length)

    def _parse(self, address: str) -> tuple[str, int]:
        host, slash, length = address.partition("/")
        if not slash or not length.isdigit():
            raise UsageError(f"{self.name}: address {address!r}: want ADDRESS/LENGTH")
        return host, int(length)

    def _await_ipv6(self, index: int) -> None:
        """Wait until our IPv6 addresses of a device are in use: a kernel thread adds their routes a little later."""
        # Address, interface index, prefix length, scope, flags and device, all but the last in hexadecimal. Those
        # without the flag are the kernel's own link-local ones, in the midst of duplicate address detection.
        ours = [
            row[0] for row in self._table("if_inet6") if int(row[1], 16) == index and int(row[4], 16) & _IFA_F_NODAD
        ]
        missing = [address for address in ours if not self._is_local(address)]
        if missing:
            with self.monitor(RTNLGRP_IPV6_ROUTE) as monitor:
                for address in missing:
                    event = _IsLocal(monitor, partial(self._is_local, address), address)
                    wait_for(event, _IPV6_READY, f"{self.name} to take {address} for its own")

    def _is_local(self, address: str) -> bool:
        """Whether there is a local route to an IPv6 address, given in 32 hexadecimal digits."""
        rows = self._table("ipv6_route")
        return any(row[0] == address and row[1] == "80" and int(row[8], 16) & _RTF_LOCAL for row in rows)

    def add_route(
        self,
        destination: str,
        *,
        via: str | None = None,
        dev: str | None = None,
        src: str | None = None,
        metric: int | None = None,
        table: str | int | None = None,
        mtu: int | None = None,
    ) -> None:
        """Add a route in the words of `ip route`; destination `default` needs `via` or an IPv4 meaning."""
        number = _TABLES[table] if isinstance(table, str) else table
        index = None if dev is None else self.index(dev)
        words: RouteWords = {"via": via, "index": index, "src": src, "metric": metric, "table": number, "mtu": mtu}
        self._ask(f"route add {destination}", self._netlink.add_route, destination, **words)

    def delete_route(self, destination: str, *, via: str | None = None, dev: str | None = None) -> None:
        index = None if dev is None else self.index(dev)
        self._ask(f"route del {destination}", self._netlink.delete_route, destination, via=via, index=index)

    def add_rule(self, family: int, **arguments: int) -> None:
        """Add a policy rule of AF_INET or AF_INET6, in the words of Rtnetlink.add_rule."""
        self._ask(f"rule add {arguments}", self._netlink.add_rule, family, **arguments)

    def delete_rule(self, family: int, **arguments: int) -> None:
        self._ask(f"rule del {arguments}", self._netlink.delete_rule, family, **arguments)

    def _ask(self, what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except ControlError as error:
            raise HarnessError(f"{self.name}: ip {what}: {error.reason}") from error

    # The rest of rtnetlink(7)

    def iproute(self) -> NodeIPRoute:
        """Make pyroute2's IPRoute in this node, for bridges, tunnels, tc, neighbours: `with node.iproute() as ip:`.

        It may be used from any thread, and is closed with the node at the latest.
        """
        if not self._is_open:
            raise UsageError(f"node {self.name}: is closed")
        made = NodeIPRoute(self.name, self.thread)
        self._iproutes.append(made)
        return made

    # Sysctls and firewall

    def sysctl(self, name: str, value: int | str | None = None) -> str:
        """Read a sysctl of this namespace, after setting it if a value is given: `net.ipv4.ip_forward`.

        A device's dots are written as slashes, as sysctl(8) wants them.
        """
        path = Path("/proc/sys") / name.translate(str.maketrans("./", "/."))
        try:
            return self.thread.call(_read_setting, path, value)
        except OSError as error:
            raise HarnessError(f"{self.name}: sysctl {name}: {error.strerror}") from error

    def nft(self, ruleset: str) -> None:
        """Load rules in nft(8)'s language, all or none of them."""
        self.run(["nft", "-f", "-"], stdin=ruleset)

    def nft_counters(self) -> dict[str, int]:
        """Packets counted by each rule that has a counter and a comment, by comment, and by each named counter."""
        answer = self.run_json(["nft", "-j", "list", "ruleset"])
        counted: dict[str, int] = {}
        for item in answer["nftables"]:
            if "counter" in item:
                counted[item["counter"]["name"]] = item["counter"]["packets"]
            for expression in item.get("rule", {}).get("expr", ()):
                # Where a rule counts with a named counter, that is only the name.
                if isinstance(expression.get("counter"), dict) and "comment" in item["rule"]:
                    counted[item["rule"]["comment"]] = expression["counter"]["packets"]
        return counted

    def forget_connections(self) -> None:
        """Empty the table of tracked connections: a NAT forgets every mapping it has."""
        with closing(self.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)) as netfilter:
            self._ask("conntrack flush", flush_connections, netfilter)


def _read_setting(path: Path, value: int | str | None) -> str:
    if value is not None:
        path.write_text(f"{value}\n")
    return path.read_text().strip()


class _IsLocal:
    """A node takes an IPv6 address for its own: True."""

    def __init__(self, monitor: Monitor, look: Callable[[], bool], address: str) -> None:
        self._monitor = monitor
        self._look = look
        self._address = address

    def fileno(self) -> int:
        return self._monitor.fileno()

    def look(self) -> bool | None:
        self._monitor.drain()
        return self._look() or None

    def seen(self) -> str:
        return f"no local route to {self._address}"


def leftover_nodes() -> list[str]:
    """Names of the nodes that exist now; empty when every undo did its work."""
    with suppress(FileNotFoundError):
        return sorted(entry.name for entry in HANDLES.iterdir())
    return []


def enlarge_receive_buffer(one: socket.socket, size: int) -> None:
    """Make room for so many bytes in a socket; root of a user namespace gets no more than everybody may have."""
    try:
        one.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
    except PermissionError:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
