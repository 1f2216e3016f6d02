"""Start any implementation as a WireGuard interface with one typed configuration.

An interface has a birth node, where its process, UDP sockets and control socket are, and a place, the node where its
link is now.
"""

from __future__ import annotations

import os
import re
import resource
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread, get_native_id
from typing import TYPE_CHECKING, Final

from harness import steps
from harness.control.genl import GenlControl
from harness.control.records import DeviceConfig, PeerConfig
from harness.control.uapi import UapiControl
from harness.errors import DeadlineExceeded, HarnessError, Unsupported, UsageError
from harness.implementations.health import HealthCheck
from harness.sandbox import logs
from harness.sandbox.namespace import NamespaceThread, cover, enter_network, enter_new_mounts
from harness.sandbox.process import Process, run
from harness.wait import REQUEST_TIMEOUT, EitherOf, EntryAppears, poll_until, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Unpack

    from harness.control.base import Control
    from harness.control.records import DeviceState, Key, PeerChanges, PeerState
    from harness.implementations.manifest import Manifest
    from harness.net.netns import NetNS
    from harness.sandbox.process import Completed

CONTROL_SOCKETS: Final = Path("/run/wireguard")
# Seconds. On a machine with ten times more work than it can do, the start of Python alone takes five.
_START: Final = 15.0
_LISTENS: Final = 2.0
# Seconds from the end of a program's link to its own; it may need a while to join its threads.
_ENDS: Final = 5.0
_POLL_INTERVAL: Final = 0.002
_NAME_MAX: Final = 15
_TELLING: Final = re.compile("invalid|fail|drop|error|reject|denied", re.IGNORECASE)
_NETLINK_GENERIC: Final = 16
# Commands of wg(8) that change the configuration.
_WG_CHANGES: Final = frozenset({"set", "setconf", "addconf", "syncconf"})
# Value of the sysctl addr_gen_mode: no link-local address. Its router solicitations would change exact byte counts.
_ADDRGENMODE_NONE: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of an interface's configuration, whether or not the program accepted it.

    began, ended: ns of wall time. config: of `set`. words: the arguments and the standard input of `wg`. Neither: a
    connection to the control socket, on which anything may have been set.
    """

    began: int
    ended: int
    config: DeviceConfig | None = None
    words: tuple[str, ...] = ()


class Interface:
    """The common part of both kinds; call `create` to make one.

    key_log: the file to which the program writes its keys; None if it does not. told: the private key of the last
    `set` that had one. role: "a" or "b" in a tunnel of two; else empty. changes: all changes so far. began, ended: ns
    of wall time.
    """

    key_log: Path | None = None
    told: Key | None = None

    def __init__(self, name: str, manifest: Manifest, birth: NetNS, control: Control) -> None:
        self.name = name
        self.manifest = manifest
        self.birth = birth
        self.place = birth
        self.control = control
        self.role = ""
        self.changes: list[Change] = []
        self.began = time.time_ns()
        self.ended: int | None = None
        self._quiet()

    def __repr__(self) -> str:
        return f"Interface({self.name!r}, {self.manifest.name}, born in {self.birth.name}, now in {self.place.name})"

    def set(self, config: DeviceConfig) -> None:
        """Change the configuration; raises ControlError with the errno of the implementation.

        Raises Unsupported, and sends nothing, for a change that needs the capability `update-peer` or
        `peer-before-key` if the manifest does not declare it: it may end the program. An interface that the scope of
        an endpoint names is looked up in the node with the sockets.
        """
        self._require_declared(config)
        config = replace(config, peers=tuple(self._with_scope_index(peer) for peer in config.peers))
        with self._changed(config=config):
            self.control.set(config)
        self.told = config.private_key or self.told

    @contextmanager
    def _changed(self, config: DeviceConfig | None = None, words: tuple[str, ...] = ()) -> Iterator[None]:
        began = time.time_ns()
        try:
            yield
        finally:
            self.changes.append(Change(began=began, ended=time.time_ns(), config=config, words=words))

    def _with_scope_index(self, peer: PeerConfig) -> PeerConfig:
        if peer.endpoint is None or isinstance(peer.endpoint.scope, int):
            return peer
        return replace(peer, endpoint=peer.endpoint.resolve(self.birth.index))

    def _require_declared(self, config: DeviceConfig) -> None:
        lacking = {"update-peer", "peer-before-key"} - self.manifest.capabilities
        given = {peer.public_key for peer in config.peers if not peer.remove}
        if not given or not lacking:
            return
        now = self.control.get()
        asked = set()
        if not config.replace_peers and given & {peer.public_key for peer in now.peers}:
            asked.add("update-peer")
        if not (config.private_key or now.private_key or now.public_key):
            asked.add("peer-before-key")
        for capability in sorted(asked & lacking):
            raise Unsupported(f"{self.manifest.name} does not declare the capability {capability}")

    def set_peer(self, public_key: Key, **changes: Unpack[PeerChanges]) -> None:
        """Change one peer; `changes` are fields of PeerConfig. Raises as `set`."""
        self.set(DeviceConfig(peers=(PeerConfig(public_key=public_key, **changes),)))

    def get(self, timeout: float | None = None) -> DeviceState:
        """Return the configuration and the counters as the implementation reports them.

        timeout: seconds, scaled; None for that of its control. Raises ControlError or DeadlineExceeded.
        """
        return self.control.get(timeout)

    def peer(self, public_key: Key) -> PeerState:
        """Return one peer as the implementation reports it; HarnessError if it has no such peer."""
        return self.get().peer(public_key)

    def move(self, place: NetNS) -> None:
        """Move the link to another node; the process and its sockets stay in the birth node."""
        self.place.move_link(self.name, place)
        self.place = place
        self._quiet()

    def up(self, *addresses: str, mtu: int | None = None) -> None:
        """Add addresses to the link, given as ADDRESS/LENGTH, and set it up; mtu: None leaves it as it is."""
        self.place.add_address(self.name, *addresses)
        self.place.set_link(self.name, up=True, mtu=mtu)

    def wg(self, *arguments: str, deadline: float = REQUEST_TIMEOUT, stdin: str = "", check: bool = True) -> Completed:
        """Run wg(8) in the namespaces where it finds this interface: `wg("show", "wg0", "endpoints")`."""
        argv = ["wg", *arguments]
        if arguments[0] not in _WG_CHANGES:
            return self._run(argv, deadline=deadline, stdin=stdin, check=check)
        with self._changed(words=(*arguments, stdin)):
            return self._run(argv, deadline=deadline, stdin=stdin, check=check)

    def _run(self, argv: list[str], *, deadline: float, stdin: str, check: bool) -> Completed:
        raise NotImplementedError

    def complaints(self) -> list[str]:
        """Return what the health check finds now; the interface stays up."""
        raise NotImplementedError

    def complaints_in_log(self) -> list[str]:
        """Return the last lines of its log, at most two, that report an error; none without a log."""
        return []

    @property
    def pid(self) -> int | None:
        """The process of its program; None for the driver, which has none."""
        return None

    @property
    def mounts(self) -> Path | None:
        """The mount namespace with the program's /run/wireguard, as nsenter(1) takes it; None for the driver."""
        return None

    def cpu_seconds(self) -> float:
        """Return the CPU time of its program so far; 0 for the driver, whose work is not counted for one interface."""
        return 0.0

    def close(self) -> list[str]:
        """Remove the interface, and end its program; returns what the last health check found."""
        raise NotImplementedError

    def _quiet(self) -> None:
        self.place.sysctl(f"net.ipv6.conf.{self.name}.addr_gen_mode", _ADDRGENMODE_NONE)


class KernelInterface(Interface):
    """An interface of the Linux driver, configured over generic netlink in the node where it is."""

    def __init__(self, name: str, manifest: Manifest, birth: NetNS) -> None:
        birth.add_link(name, kind="wireguard")
        self._socket = genetlink(birth)
        super().__init__(name, manifest, birth, GenlControl(self._socket, node=birth.name).interface(name))

    def move(self, place: NetNS) -> None:
        """Move the link; the driver is configured over netlink in the node where its link is."""
        super().move(place)
        self._socket.close()
        self._socket = genetlink(place)
        self.control = GenlControl(self._socket, node=place.name).interface(self.name)

    def _run(self, argv: list[str], *, deadline: float, stdin: str, check: bool) -> Completed:
        """Run a program in the node where the link is."""
        return self.place.run(argv, deadline=deadline, stdin=stdin, check=check)

    def complaints(self) -> list[str]:
        """Return nothing: the driver's complaints are in the kernel log (harness/vm/kernel_log.py)."""
        return []

    def close(self) -> list[str]:
        """Delete the link, unless its node is gone."""
        self._socket.close()
        # The kernel deletes the links of a namespace together with it.
        if self.place.is_open and self.place.has_link(self.name):
            self.place.delete_link(self.name)
        return []


class ProgramInterface(Interface):
    """An interface of a userspace program.

    Each program has a mount namespace of its own with an empty /run/wireguard, so that equal names never clash. The
    same goes for the directory of its control socket if its manifest names another one; wg(8) finds that socket by a
    link in /run/wireguard.
    """

    def __init__(self, name: str, manifest: Manifest, birth: NetNS, log: Path) -> None:
        if manifest.key_log:
            self.key_log = log.with_suffix(".keys")
        argv = manifest.argv(name, self.key_log)
        self.name = name
        self.socket_path = manifest.socket_path(name)
        self._thread = NamespaceThread(f"{name}@{birth.name}", lambda: _enter(birth, self.socket_path))
        with ExitStack() as undo:
            undo.callback(self._thread.close)
            self.process = self._start(manifest, argv, log, undo)
            self._await_listening(manifest)
            self._thread.call(_link_for_wg, name, self.socket_path)
            if not birth.has_link(name):
                raise HarnessError(f"{manifest.name} made its socket and no interface {name}:\n{self.process.tail()}")
            self._health = HealthCheck(self.process, manifest)
            control = UapiControl(name, self._connected, scope_index=birth.index, node=self._thread.name)
            super().__init__(name, manifest, birth, control)
            if manifest.mtu is not None:
                birth.set_link(name, mtu=manifest.mtu)
            undo.pop_all()

    def _start(self, manifest: Manifest, argv: list[str], log: Path, undo: ExitStack) -> Process:
        env = {"RUST_BACKTRACE": "1", "GOTRACEBACK": "all", **manifest.env}
        with ExitStack() as watch:
            appears = self._thread.call(EntryAppears, self.socket_path.parent, self.socket_path.name)
            # Closing an inotify watch waits for a grace period of about 25 ms in the kernel: do it in another thread.
            watch.callback(Thread(target=appears.close, name="close").start)
            process = Process(self._thread, argv, log=log, env=env, cwd=log.parent, preload=manifest.preload)
            undo.callback(_end, process)
            _set_limits(process.pid)
            either = EitherOf(appears, process.exited)
            watch.callback(either.close)
            wait_for(either, _START, f"{manifest.name} to make {self.socket_path}")
        if not process.running:
            raise HarnessError(f"{manifest.name}: {' '.join(argv)}: ended at its start:\n{process.tail()}")
        return process

    def _await_listening(self, manifest: Manifest) -> None:
        """Wait until the control socket accepts connections: wg(8) deletes a socket that refuses them."""
        try:
            self._connected().close()
        except OSError as error:
            said = f"{manifest.name}: {self.socket_path}: {error.strerror}"
            raise HarnessError(f"{said}\n{self.process.tail()}") from error

    def connect(self) -> socket.socket:
        """Open a new connection to its control socket; the caller closes it. Raises OSError."""
        with self._changed():
            return self._connected()

    def _connected(self) -> socket.socket:
        # bind(2) creates the file a moment before listen(2), which has no event.
        answer = poll_until(
            self._connect,
            lambda tried: isinstance(tried, socket.socket) or not self.process.running,
            _LISTENS,
            interval=_POLL_INTERVAL,
            what=f"{self.name}.sock takes connections",
        )
        if isinstance(answer, ConnectionRefusedError):
            raise answer
        return answer

    def _connect(self) -> socket.socket | ConnectionRefusedError:
        """Try once; a refusal is returned, anything else is raised."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            self._thread.call(connection.connect, str(self.socket_path))
        except ConnectionRefusedError as error:
            connection.close()
            return error
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def has_socket(self) -> bool:
        """Whether the file of its control socket exists; a program that died may have left it."""
        return self._thread.call(self.socket_path.exists)

    def remove_socket(self) -> None:
        """Delete the file of its control socket, which asks the program to end."""
        with steps.step(self._thread.name, f"rm {self.socket_path}"):
            self._thread.call(self.socket_path.unlink)

    def up(self, *addresses: str, mtu: int | None = None) -> None:
        """As for every interface; returns when the program's UDP socket is bound, a moment after the link is up."""
        super().up(*addresses, mtu=mtu)
        port = self.get().listen_port
        if port:
            # A new UDP socket has no event.
            poll_until(
                self.birth.udp_ports,
                lambda ports: port in ports,
                _LISTENS,
                interval=_POLL_INTERVAL,
                what=f"{self.birth.name} has UDP port {port}",
            )

    def _run(self, argv: list[str], *, deadline: float, stdin: str, check: bool) -> Completed:
        """Run a program in the birth node, in the program's mount namespace."""
        return run(self._thread, argv, deadline=deadline, stdin=stdin, check=check)

    @property
    def pid(self) -> int | None:
        return self.process.pid

    @property
    def mounts(self) -> Path | None:
        # The namespace of our thread, which lives as long as the interface, even if the program has died.
        return Path("/proc", str(os.getpid()), "task", str(self._thread.call(get_native_id)), "ns", "mnt")

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process so far, in user and kernel mode."""
        return self.process.cpu_seconds()

    def complaints(self) -> list[str]:
        """Return what the health check finds now; the program goes on."""
        return self._health.complaints()

    def complaints_in_log(self) -> list[str]:
        """Return the last lines of its log, at most two, that report an error."""
        lines = logs.read_log(self.process.log).decode(errors="replace").splitlines()
        return [line.strip() for line in lines if _TELLING.search(line)][-2:]

    def close(self) -> list[str]:
        """End the program by SIGTERM and return what the last health check found."""
        self._await_own_end()
        complaints = self._health.end()
        self._thread.close()
        return complaints

    def _await_own_end(self) -> None:
        """Wait for the end of a program whose link is gone: it is about to end, and SIGTERM would hide that."""
        if self.process.running and self.place.is_open and not self.place.has_link(self.name):
            with suppress(DeadlineExceeded):
                self.process.wait(_ENDS)


def genetlink(node: NetNS) -> socket.socket:
    """Open a generic netlink socket in a node; it configures the driver's interfaces there."""
    return node.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)


def _enter(birth: NetNS, control_socket: Path) -> None:
    enter_network(birth.handle)
    enter_new_mounts(CONTROL_SOCKETS)
    # Cover the whole directory of /run: one that is the machine's own is shown in the sandbox, too.
    top = Path(*control_socket.parts[:3])
    if top != CONTROL_SOCKETS:
        # The sandbox has a /run of its own.
        top.mkdir(mode=0o755, exist_ok=True)
        cover(top)
    control_socket.parent.mkdir(mode=0o755, parents=True, exist_ok=True)


def _link_for_wg(name: str, control_socket: Path) -> None:
    """Link a control socket that is elsewhere into /run/wireguard, for wg(8), unless a file of the name is there."""
    link = CONTROL_SOCKETS / f"{name}.sock"
    if link != control_socket:
        with suppress(FileExistsError):
            link.symlink_to(control_socket)


def _set_limits(pid: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    # Raise the soft limit: the health check reports leaks, and a program out of descriptors could not answer `get`.
    _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))


def _end(process: Process) -> None:
    process.kill()
    process.close()


def create(name: str, manifest: Manifest, birth: NetNS, log: Path) -> Interface:
    """Create an interface of this implementation in its birth node; its program writes to `log`.

    Raises UsageError for a bad name, and HarnessError, with the end of the log, if the program does not start.
    """
    if not name or len(os.fsencode(name)) > _NAME_MAX or "/" in name:
        raise UsageError(f"interface name {name!r}: 1 to {_NAME_MAX} bytes without a slash")
    if manifest.kind == "kernel":
        return KernelInterface(name, manifest, birth)
    return ProgramInterface(name, manifest, birth, log)
