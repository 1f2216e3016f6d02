"""Make a node: a network namespace with addresses, routes, firewall, programs, sockets.

A node has a file below /run/netns, so that `ip netns` lists it, and a thread of this process that stays in the
namespace. That thread starts the node's programs and opens its sockets, also those that change links, addresses, routes
and rules.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Self, TypeVar

from harness import steps
from harness.errors import ControlError, HarnessError, UsageError
from harness.net.ioctl import Devices
from harness.net.iproute import NodeIPRoute
from harness.net.rtnetlink import RTNLGRP_IPV6_ROUTE, Monitor, Rtnetlink, flush_connections
from harness.sandbox.launch import require_sandbox
from harness.sandbox.namespace import NamespaceThread, enter_new_network, unmount
from harness.sandbox.process import Process, run
from harness.wait import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from harness.net.rtnetlink import LinkFacts, RouteWords, VethPeer
    from harness.sandbox.process import Completed

P = ParamSpec("P")
T = TypeVar("T")

HANDLES: Final = Path("/run/netns")
_SO_RCVBUFFORCE: Final = 33
# Without duplicate address detection: that would delay the use of a new IPv6 address (RFC 4862, 5.4).
_IFA_F_NODAD: Final = 2
# Seconds.
_IPV6_READY: Final = 5.0
_NETLINK_NETFILTER: Final = 12
_RTF_LOCAL: Final = 0x80000000
_FIB_RULE_INVERT: Final = 2
_TABLES: Final = {"local": 255, "main": 254, "default": 253}
# Every kernel has Reno, no privilege is needed to select it (tcp(7)), and it reacts to losses only. The machine's
# default may be BBR: after a pause it can send a stream at a few packets a second, for tens of seconds.
_CONGESTION_CONTROL: Final = "reno"


class NetNS:
    """A network namespace, created by the constructor; use it as a context manager or call `close`."""

    def __init__(self, name: str) -> None:
        """Create the namespace, set its loopback interface up, and select the same TCP congestion control everywhere.

        Raises Unavailable outside a sandbox, UsageError if a node of this name exists.
        """
        require_sandbox()
        self.name = name
        self.handle = HANDLES / name
        self.forged_since: int | None = None
        """When a socket was first opened that can send from any address and port (raw(7)); ns of wall time."""
        self._is_open = True
        self._iproutes: list[NodeIPRoute] = []
        if self.handle.exists():
            raise UsageError(f"node {name!r} already exists")
        with steps.step(name, f"ip netns add {name}"):
            self.thread = NamespaceThread(name, lambda: enter_new_network(self.handle))
        self._devices = Devices(self.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._netlink = Rtnetlink(self.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))
        with steps.step(name, "ip link set lo up"):
            self._devices.set_up("lo", True)
        self.sysctl("net.ipv4.tcp_congestion_control", _CONGESTION_CONTROL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """True until `close`."""
        return self._is_open

    def close(self) -> None:
        """Leave the namespace and remove its file; a second call does nothing.

        The kernel destroys the namespace when no process and no socket is left in it (network_namespaces(7)).
        """
        if not self._is_open:
            return
        self._is_open = False
        with steps.step(self.name, f"ip netns del {self.name}"):
            try:
                for iproute in self._iproutes:
                    iproute.close()
                self._netlink.close()
                self._devices.close()
                self.thread.close()
            finally:
                # Even if one of them hangs or fails, because the next test needs this name.
                unmount(self.handle)
                self.handle.unlink()

    def __repr__(self) -> str:
        return f"node {self.name}"

    # Programs and sockets

    def run(self, argv: Sequence[str], *, deadline: float = 10.0, stdin: str = "", check: bool = True) -> Completed:
        """Run a program here and wait for its end; arguments and errors: see harness.sandbox.process.run."""
        return run(self.thread, argv, deadline=deadline, stdin=stdin, check=check)

    def run_json(self, argv: Sequence[str]) -> Any:
        """Run a program here that prints JSON, such as `ip -j` or `nft -j`, and return the parsed output."""
        return json.loads(self.run(argv).stdout)

    def spawn(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> Process:
        """Start a program here in the background; its output goes to `log`."""
        return Process(self.thread, argv, log=log, env=env)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Open a socket in this namespace; any thread may use it."""
        if protocol == socket.IPPROTO_RAW and self.forged_since is None:
            self.forged_since = time.time_ns()
        return self.thread.call(socket.socket, family, kind, protocol)

    def monitor(self, group: int) -> Monitor:
        """Subscribe to one multicast group of rtnetlink in this namespace; group: RTNLGRP_* of rtnetlink.py."""
        sock = self.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        return Monitor(sock, group)

    def udp_ports(self) -> set[int]:
        """Return the UDP ports to which sockets of this node are bound, IPv4 and IPv6 (/proc/net/udp, proc(5))."""
        rows = [row for name in ("udp", "udp6") for row in self._table(name)[1:]]
        return {int(row[1].rpartition(":")[2], 16) for row in rows}

    def _table(self, name: str) -> list[list[str]]:
        """Read a file of this node's /proc/net as rows of words."""
        text = self.thread.call(Path(f"/proc/thread-self/net/{name}").read_text)
        return [row.split() for row in text.splitlines()]

    # Links

    def index(self, device: str) -> int:
        """Return the interface index of a device; UsageError lists the devices if there is none of that name."""
        index = self._devices.index(device)
        if index is None:
            raise UsageError(f"{self.name}: no device {device}; there are: {', '.join(self.links()) or 'none'}")
        return index

    def has_link(self, device: str) -> bool:
        """Return whether this node has a device of that name; unlike `index`, this does not raise."""
        return self._devices.index(device) is not None

    def links(self) -> dict[str, LinkFacts]:
        """Return the properties of all devices, by device name."""
        with steps.step(self.name, "ip link show", is_listed=False), self._refusal("link show"):
            return self._netlink.links()

    def set_link(self, device: str, *, up: bool | None = None, mtu: int | None = None, name: str | None = None) -> None:
        """Change a device; None leaves a property as it is.

        up: set it up, and wait until IPv6 addresses added by `add_address` are usable; or set it down. mtu: bytes.
        name: its new name. Raises UsageError if there is no such device, HarnessError if the kernel refuses.
        """
        index = self.index(device)
        words = [*_words(mtu=mtu, name=name), *([] if up is None else ["up" if up else "down"])]
        with steps.step(self.name, f"ip link set {device} {' '.join(words)}"):
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
        """Create a device. kind: as in `ip link add type` (`veth`, `dummy`, ...); peer: see Rtnetlink.add_link."""
        other = [] if peer is None else ["peer", *_words(name=peer["ifname"], netns=peer.get("node"))]
        self._ask(" ".join(["link add", device, "type", kind, *other]), self._netlink.add_link, device, kind, peer)

    def delete_link(self, device: str) -> None:
        """Delete a device; of a veth pair both ends are deleted."""
        self._ask(f"link del {device}", self._netlink.delete_link, self.index(device))

    def move_link(self, device: str, place: NetNS) -> None:
        """Move a device to the node `place`, as `ip link set DEVICE netns PLACE` does.

        The device is down afterwards, without addresses and routes (dev_change_net_namespace).
        """
        descriptor = os.open(place.handle, os.O_RDONLY | os.O_CLOEXEC)
        try:
            what = f"link set {device} netns {place.name}"
            self._ask(what, self._netlink.move_link, self.index(device), descriptor)
        finally:
            os.close(descriptor)

    def set_nsid(self, node: NetNS, nsid: int) -> None:
        """Assign another node an id that is valid in this namespace, as `ip netns set NODE NSID` does."""
        descriptor = os.open(node.handle, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._ask(f"netns set {node.name} {nsid}", self._netlink.set_nsid, descriptor, nsid)
        finally:
            os.close(descriptor)

    # Addresses, routes, rules

    def add_address(self, device: str, *addresses: str) -> None:
        """Add addresses (ADDRESS/LENGTH) to a device, IPv6 without duplicate address detection.

        They are usable on return. Raises UsageError for a malformed address, HarnessError if the kernel refuses.
        """
        index = self.index(device)
        for address in addresses:
            host, length = self._parse(address)
            flags, word = (_IFA_F_NODAD, " nodad") if ":" in address else (0, "")
            what = f"address add {address} dev {device}{word}"
            self._ask(what, self._netlink.add_address, index, host, length, flags)
        if any(":" in address for address in addresses) and self._devices.is_up(device):
            self._await_ipv6(index)

    def delete_address(self, device: str, *addresses: str) -> None:
        """Delete addresses (ADDRESS/LENGTH) from a device; HarnessError if it does not have one of them."""
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
        """Wait until the IPv6 addresses we added to a device have a local route.

        The kernel adds the route from a workqueue, after it has answered the request (addrconf_dad_work).
        """
        # Columns: address, interface index, prefix length, scope, flags (all hexadecimal), device. An address without
        # the flag is the kernel's own link-local one; its duplicate address detection may still run.
        ours = [
            row[0] for row in self._table("if_inet6") if int(row[1], 16) == index and int(row[4], 16) & _IFA_F_NODAD
        ]
        missing = [address for address in ours if not self._is_local(address)]
        if missing:
            with self.monitor(RTNLGRP_IPV6_ROUTE) as monitor:
                for address in missing:
                    event = _IsLocal(monitor, partial(self._is_local, address), address)
                    wait_for(event, _IPV6_READY, f"{self.name} to add the local route of {address}")

    def _is_local(self, address: str) -> bool:
        """Return whether an IPv6 address has a local route; address: 32 hexadecimal digits, as in /proc/net."""
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
        """Add a route; the arguments are those of `ip route add`.

        destination: ADDRESS[/LENGTH] or `default`, which is IPv4's default route unless `via` is an IPv6 address.
        table: a number, or `local`, `main`, `default`. mtu: bytes.
        """
        number = _TABLES[table] if isinstance(table, str) else table
        index = None if dev is None else self.index(dev)
        words: RouteWords = {"via": via, "index": index, "src": src, "metric": metric, "table": number, "mtu": mtu}
        text = _words(via=via, dev=dev, src=src, metric=metric, table=table, mtu=mtu)
        self._ask(" ".join(["route add", destination, *text]), self._netlink.add_route, destination, **words)

    def delete_route(self, destination: str, *, via: str | None = None, dev: str | None = None) -> None:
        """Delete the first route of table main that matches; HarnessError if none does."""
        index = None if dev is None else self.index(dev)
        what = " ".join(["route del", destination, *_words(via=via, dev=dev)])
        self._ask(what, self._netlink.delete_route, destination, via=via, index=index)

    def add_rule(self, family: int, **arguments: int) -> None:
        """Add a policy rule; family: AF_INET or AF_INET6, arguments: see Rtnetlink.add_rule."""
        self._ask(_rule("add", family, arguments), self._netlink.add_rule, family, **arguments)

    def delete_rule(self, family: int, **arguments: int) -> None:
        """Delete the first policy rule with these properties; HarnessError if there is none."""
        self._ask(_rule("del", family, arguments), self._netlink.delete_rule, family, **arguments)

    def _ask(self, what: str, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Change something by rtnetlink; what: the words of ip(8) for it."""
        with steps.step(self.name, f"ip {what}"), self._refusal(what):
            function(*args, **kwargs)

    @contextmanager
    def _refusal(self, what: str) -> Iterator[None]:
        """Let an error of the kernel name the node and the command."""
        try:
            yield
        except ControlError as error:
            raise HarnessError(f"{self.name}: ip {what}: {error.reason}") from error

    # The rest of rtnetlink(7)

    def iproute(self) -> NodeIPRoute:
        """Open pyroute2's IPRoute in this node, for bridges, tunnels, tc, neighbours: `with node.iproute() as ip:`.

        Any thread may use it; the node closes it at the latest. Raises UsageError if the node is closed.
        """
        if not self._is_open:
            raise UsageError(f"node {self.name}: is closed")
        iproute = NodeIPRoute(self.name, self.thread)
        self._iproutes.append(iproute)
        return iproute

    # Sysctls and firewall

    def sysctl(self, name: str, value: int | str | None = None) -> str:
        """Set a sysctl of this namespace if a value is given, then read it: `net.ipv4.ip_forward`.

        A dot in a device's name is written as a slash, as for sysctl(8). Raises HarnessError if the kernel refuses.
        """
        path = Path("/proc/sys") / name.translate(str.maketrans("./", "/."))
        with steps.step(self.name, f"sysctl -w {name}={shlex.quote(str(value))}", is_listed=value is not None):
            try:
                return self.thread.call(_read_setting, path, value)
            except OSError as error:
                raise HarnessError(f"{self.name}: sysctl {name}: {error.strerror}") from error

    def nft(self, ruleset: str) -> None:
        """Load a ruleset in nft(8)'s language in one transaction: all of it or, with ProgramFailed, nothing."""
        self.run(["nft", "-f", "-"], stdin=ruleset)

    def nft_counters(self) -> dict[str, int]:
        """Return packet counts: of named counters by name, of rules with a counter and a comment by comment."""
        answer = self.run_json(["nft", "-j", "list", "ruleset"])
        packets: dict[str, int] = {}
        for item in answer["nftables"]:
            if "counter" in item:
                packets[item["counter"]["name"]] = item["counter"]["packets"]
            for expression in item.get("rule", {}).get("expr", ()):
                # In a rule that uses a named counter, the expression holds only the counter's name.
                if isinstance(expression.get("counter"), dict) and "comment" in item["rule"]:
                    packets[item["rule"]["comment"]] = expression["counter"]["packets"]
        return packets

    def forget_connections(self) -> None:
        """Flush connection tracking, as `conntrack -F` does: a NAT loses all its mappings."""
        netfilter = self.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        with closing(netfilter), steps.step(self.name, "conntrack -F"), self._refusal("conntrack flush"):
            flush_connections(netfilter)


def _words(**values: object) -> list[str]:
    """Print keywords as ip(8) takes them; None is left out."""
    return [text for word, value in values.items() if value is not None for text in (word, str(value))]


def _rule(action: str, family: int, arguments: Mapping[str, int]) -> str:
    words = {"suppress_prefixlen": "suppress_prefixlength"}
    selectors = [f"{words.get(name, name)} {value}" for name, value in arguments.items() if name != "flags"]
    is_inverted = bool(arguments.get("flags", 0) & _FIB_RULE_INVERT)
    return " ".join(["-6 rule" if family == socket.AF_INET6 else "rule", action, *["not"] * is_inverted, *selectors])


def _read_setting(path: Path, value: int | str | None) -> str:
    if value is not None:
        path.write_text(f"{value}\n")
    return path.read_text().strip()


class _IsLocal:
    """Event: the kernel has added the local route of an IPv6 address; its value is True."""

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
    """Return the names of all nodes of this sandbox; empty after a test whose clean-up is complete."""
    with suppress(FileNotFoundError):
        return sorted(entry.name for entry in HANDLES.iterdir())
    return []


def enlarge_receive_buffer(sock: socket.socket, size: int) -> None:
    """Set a socket's receive buffer to `size` bytes, or to net.core.rmem_max if we may not exceed that."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
    except PermissionError:
        # SO_RCVBUFFORCE needs CAP_NET_ADMIN in the initial user namespace (socket(7)); a sandbox of a user lacks it.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
