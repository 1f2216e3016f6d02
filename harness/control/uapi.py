"""Configure userspace programs over UAPI: a text protocol on a Unix stream socket.

Format: https://www.wireguard.com/xplatform/. A device may have 130 560 allowed-ips, each a line.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections import defaultdict
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from harness import steps
from harness.control.base import describe, wg_set
from harness.control.records import ZERO_KEY, AllowedIP, DeviceState, Endpoint, Key, PeerState
from harness.errors import (
    UsageError,
    refusal,
    unreadable,
)
from harness.wait import (
    REQUEST_TIMEOUT,
    Deadline,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from harness.control.records import DeviceConfig, PeerConfig

GET: Final = b"get=1\n\n"
_RECEIVE_SIZE: Final = 1 << 18
_SECOND: Final = 1_000_000_000
# Characters of a test's own request that the evidence shows.
_TEXT: Final = 2000

_Section: TypeAlias = "defaultdict[str, list[str]]"
T = TypeVar("T")
D = TypeVar("D")


def encode_set(config: DeviceConfig) -> bytes:
    """Encode a configuration as a set request, its lines in the order in which the kernel applies a set."""
    lines = ["set=1"]
    lines += _integer("fwmark", config.fwmark)
    lines += _integer("listen_port", config.listen_port)
    lines += _claim("replace_peers", config.replace_peers)
    lines += _key("private_key", config.private_key)
    for peer in config.peers:
        lines += _encode_peer(peer)
    return ("\n".join(lines) + "\n\n").encode()


def _encode_peer(peer: PeerConfig) -> Iterator[str]:
    yield from _key("public_key", peer.public_key)
    # These lines come first: an implementation may skip the rest of the section after them.
    yield from _claim("remove", peer.remove)
    yield from _claim("update_only", peer.update_only)
    yield from _integer("protocol_version", peer.protocol_version)
    yield from _key("preshared_key", peer.preshared_key)
    if peer.endpoint is not None:
        yield f"endpoint={peer.endpoint}"
    yield from _claim("replace_allowed_ips", peer.replace_allowed_ips)
    for prefix in peer.allowed_ips:
        yield f"allowed_ip={prefix}"
    yield from _integer("persistent_keepalive_interval", peer.persistent_keepalive)


def _key(name: str, key: Key | None) -> list[str]:
    return [] if key is None else [f"{name}={key.raw.hex()}"]


def _integer(name: str, value: int | None) -> list[str]:
    return [] if value is None else [f"{name}={value}"]


def _claim(name: str, value: bool) -> list[str]:
    """Encode a flag: the protocol has `true` only, and leaves the line out for False."""
    return [f"{name}=true"] if value else []


def decode_get(
    answer: bytes | Iterable[str],
    where: str = "uapi",
    *,
    scope_index: Callable[[str], int] = socket.if_nametoindex,
) -> DeviceState:
    """Decode the answer to `get=1`, its errno line included. where: begins each error message.

    scope_index: finds the index behind an endpoint such as [fe80::1%eth0]:1, whose interface name belongs to the
    network namespace of the answering program. Names that the protocol does not define are ignored.
    """
    device, *peers = _sections(_check(answer, where, "get"))
    try:
        return DeviceState(
            private_key=_last(device, "private_key", _key_or_none, None),
            # Only boringtun and its descendants send this line; it is not part of the protocol.
            public_key=_last(device, "own_public_key", _key_or_none, None),
            listen_port=_last(device, "listen_port", int, 0),
            fwmark=_last(device, "fwmark", int, 0),
            peers=tuple(_decode_peer(peer, scope_index) for peer in peers),
        )
    except (ValueError, UsageError) as error:
        raise unreadable(where, error) from error


def _check(answer: bytes | Iterable[str], where: str, action: str) -> list[str]:
    """Return the lines before the errno line; raises ControlError if that is not 0 or is missing."""
    lines = answer.decode(errors="replace").split("\n") if isinstance(answer, bytes) else list(answer)
    while lines and not lines[-1]:
        lines.pop()
    name, _, value = (lines.pop() if lines else "").partition("=")
    if name != "errno":
        raise refusal(where, action, errno.ECONNRESET, "the answer ended without an errno line")
    try:
        # wireguard-go reports a negative errno, as the kernel does; boringtun a positive one.
        number = abs(int(value))
    except ValueError as error:
        raise unreadable(where, f"errno={value}") from error
    if number:
        raise refusal(where, action, number)
    return lines


def _sections(lines: list[str]) -> list[_Section]:
    """Split the lines into those of the device and those of each peer: the values of each name, in order."""
    current: _Section = defaultdict(list)
    sections = [current]
    for line in lines:
        name, _, value = line.partition("=")
        if name == "public_key":
            current = defaultdict(list)
            sections.append(current)
        current[name].append(value)
    return sections


def _decode_peer(section: _Section, scope_index: Callable[[str], int]) -> PeerState:
    seconds = _last(section, "last_handshake_time_sec", int, 0)
    return PeerState(
        public_key=_parse_key(section["public_key"][0]),
        preshared_key=_last(section, "preshared_key", _key_or_none, None),
        endpoint=_last(section, "endpoint", lambda text: Endpoint.parse(text, scope_index), None),
        persistent_keepalive=_last(section, "persistent_keepalive_interval", int, 0),
        latest_handshake=seconds * _SECOND + _last(section, "last_handshake_time_nsec", int, 0),
        rx_bytes=_last(section, "rx_bytes", int, 0),
        tx_bytes=_last(section, "tx_bytes", int, 0),
        allowed_ips=tuple(map(AllowedIP.parse, section["allowed_ip"])),
        protocol_version=_last(section, "protocol_version", int, 1),
    )


def _last(section: _Section, name: str, parse: Callable[[str], T], default: D) -> T | D:
    """Parse the last value of a name."""
    if name not in section:
        return default
    value = section[name][-1]
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{name}={value}: {error}") from error


def _parse_key(text: str) -> Key:
    try:
        return Key(bytes.fromhex(text))
    except ValueError as error:
        raise ValueError(f"key {text!r}: not hexadecimal") from error


def _key_or_none(text: str) -> Key | None:
    key = _parse_key(text)
    return None if key == ZERO_KEY else key


class UapiControl:
    """Configure the interface of a userspace program.

    connect: opens a connection to the program's socket, in the mount namespace where it lies; each get and set opens
    its own, as wg(8) does. timeout: seconds for one get or set; a get may have its own. scope_index: see `decode_get`.
    node: where the program is, for the evidence.
    """

    def __init__(
        self,
        ifname: str,
        connect: Callable[[], socket.socket],
        *,
        timeout: float = REQUEST_TIMEOUT,
        scope_index: Callable[[str], int] = socket.if_nametoindex,
        node: str = "",
    ) -> None:
        self._ifname = ifname
        self._node = node
        self._where = f"{ifname} (uapi)"
        self._connect = connect
        self._timeout = timeout
        self._scope_index = scope_index

    def set(self, config: DeviceConfig) -> None:
        """Apply a configuration; after a refusal the lines accepted before it stay applied."""
        action = describe(config)
        with steps.step(self._node, lambda: wg_set(self._ifname, config)):
            _check(self._exchange(encode_set(config), action), self._where, action)

    def get(self, timeout: float | None = None) -> DeviceState:
        """Read the device. timeout: seconds, scaled; None for the control's own."""
        with steps.step(self._node, f"wg show {self._ifname}", is_listed=False):
            return decode_get(self._exchange(GET, "get", timeout), self._where, scope_index=self._scope_index)

    def exchange(self, request: bytes, action: str, timeout: float | None = None) -> bytes:
        """Send one request and return the answer, both as raw bytes. action: names the request in errors."""
        lines = request[:_TEXT].decode(errors="replace").split()
        with steps.step(self._node, f"{self._ifname}.sock: {' '.join(lines)}") as made:
            answer = self._exchange(request, action, timeout)
            made.outcome = answer[-_TEXT:].strip().rpartition(b"\n")[2].decode(errors="replace")
            return answer

    def _exchange(self, request: bytes, action: str, timeout: float | None = None) -> bytes:
        deadline = Deadline(self._timeout if timeout is None else timeout)
        answer = bytearray()
        try:
            with self._connect() as sock:
                _send(sock, request, deadline)
                _receive(sock, answer, deadline)
        except TimeoutError as error:
            raise deadline.exceeded(self._where, action, f"{len(answer)} bytes") from error
        except OSError as error:
            raise refusal(self._where, action, error.errno or 0) from error
        return bytes(answer)


def _send(sock: socket.socket, request: bytes, deadline: Deadline) -> None:
    # EPIPE: a program may refuse and close before it has read everything. Its answer names the reason, so read it.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        deadline.limit(sock)
        sock.sendall(request)


def _receive(sock: socket.socket, answer: bytearray, deadline: Deadline) -> None:
    """Receive up to the empty line that ends an answer, or to the end of the connection."""
    while not answer.endswith(b"\n\n"):
        deadline.limit(sock)
        data = sock.recv(_RECEIVE_SIZE)
        if not data:
            return
        answer += data
