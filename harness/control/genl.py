"""Encode `wg set` and decode `wg show` for the kernel, over generic netlink.

WireGuard's family, version 1, with a codec of its own. Layouts: include/uapi/linux/wireguard.h. A device may have
130 560 allowed-ips, so each is packed and read in one step.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from dataclasses import dataclass
from functools import cached_property
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from harness import steps
from harness.control.base import describe, wg_set
from harness.control.records import ZERO_KEY, AllowedIP, DeviceState, Endpoint, Key, PeerState
from harness.errors import (
    ControlError,
    Unavailable,
    UsageError,
    unreadable,
)
from harness.net.netlink import (
    ATTRIBUTE_HEADER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    DumpInterrupted,
    GenericSocket,
    attribute,
    attributes,
    check,
    generic,
    nest,
)
from harness.wait import (
    REQUEST_TIMEOUT,
    Deadline,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from harness.control.base import Control
    from harness.control.records import DeviceConfig, PeerConfig
    from harness.net.netlink import Message

GET_DEVICE: Final = 0
SET_DEVICE: Final = 1
DEVICE_IFNAME, DEVICE_PRIVATE_KEY, DEVICE_PUBLIC_KEY = 2, 3, 4
DEVICE_FLAGS, DEVICE_LISTEN_PORT, DEVICE_FWMARK, DEVICE_PEERS = 5, 6, 7, 8
PEER_PUBLIC_KEY, PEER_PRESHARED_KEY, PEER_FLAGS, PEER_ENDPOINT, PEER_PERSISTENT_KEEPALIVE = 1, 2, 3, 4, 5
PEER_LAST_HANDSHAKE, PEER_RX_BYTES, PEER_TX_BYTES, PEER_ALLOWED_IPS, PEER_PROTOCOL_VERSION = 6, 7, 8, 9, 10
ALLOWED_IP_FAMILY, ALLOWED_IP_ADDRESS, ALLOWED_IP_LENGTH, ALLOWED_IP_FLAGS = 1, 2, 3, 4
REPLACE_PEERS: Final = 1
REMOVE, REPLACE_ALLOWED_IPS, UPDATE_ONLY = 1, 2, 4
REMOVE_ALLOWED_IP: Final = 1

# Bytes of peers in one request. The list of peers is one attribute, whose length has 16 bits. The kernel's own dumps
# use half of that in one message, which is far below any default socket buffer.
MAX_PEERS_LENGTH: Final = 32768
# Allowed-ips in one entry. Each takes at most 48 bytes, so that an entry fits into one message.
ALLOWED_IPS_PER_PART: Final = 512

_U8: Final = Struct("=B")
_U16: Final = Struct("=H")
_U32: Final = Struct("=I")
_U64: Final = Struct("=Q")
_TIMESPEC: Final = Struct("=qq")
_SOCKADDR_IN: Final = Struct("=H2s4s8x")
_SOCKADDR_IN6: Final = Struct("=H2s4x16sI")
_MALFORMED: Final = (ValueError, struct.error, UsageError)

T = TypeVar("T")
D = TypeVar("D")


class _Layout(NamedTuple):
    """The layout of an allowed-ip in the kernel's dump: length, family, address.

    Only the length and the address vary. head, middle: the bytes before the length, and between it and the address.
    """

    head: bytes
    middle: bytes
    struct: Struct

    @classmethod
    def of(cls, family: int, width: int) -> _Layout:
        """Derive the layout from an entry that the codec makes for length and address 0."""
        length = attribute(ALLOWED_IP_LENGTH, bytes(1))
        address = attribute(ALLOWED_IP_ADDRESS, bytes(width))
        layout = Struct(f"=8sB3x12s{width}s")
        head, _, middle, _ = layout.unpack(nest(0, length, attribute(ALLOWED_IP_FAMILY, _U16.pack(family)), address))
        return cls(head, middle, layout)


_LAYOUTS: Final = {4: _Layout.of(socket.AF_INET, 4), 16: _Layout.of(socket.AF_INET6, 16)}
_LAYOUT_OF_HEAD: Final = {layout.head: layout for layout in _LAYOUTS.values()}
# Bytes of the headers of the entry and of its first attribute.
_HEAD_SIZE: Final = 2 * ATTRIBUTE_HEADER


def encode_set(ifname: str, config: DeviceConfig, family_id: int) -> list[bytes]:
    """Encode a configuration as SET_DEVICE requests, to be sent one after the other.

    There are several if the peers do not fit into one; only the first has the fields of the device.
    """
    parts = (part for peer in config.peers for part in _encode_peer(peer))
    device = _encode_device(config)
    requests = []
    for peers in _fill(parts, MAX_PEERS_LENGTH):
        payload = _name(ifname) + device + (nest(DEVICE_PEERS, peers) if peers else b"")
        requests.append(generic(family_id, SET_DEVICE, NLM_F_REQUEST | NLM_F_ACK, payload))
        device = b""
    return requests


def encode_get(ifname: str, family_id: int) -> bytes:
    """Encode the GET_DEVICE request, which the kernel answers with a dump only."""
    return generic(family_id, GET_DEVICE, NLM_F_REQUEST | NLM_F_DUMP, _name(ifname))


def _name(ifname: str) -> bytes:
    return attribute(DEVICE_IFNAME, ifname.encode() + b"\0")


def _fill(parts: Iterable[bytes], room: int) -> Iterator[bytes]:
    """Join parts into blocks that fit into one request; returns at least one block, which may be empty."""
    joined: list[bytes] = []
    size = 0
    for part in parts:
        if joined and size + len(part) > room:
            yield b"".join(joined)
            joined, size = [], 0
        joined.append(part)
        size += len(part)
    yield b"".join(joined)


def _encode_device(config: DeviceConfig) -> bytes:
    return b"".join(
        (
            _optional(DEVICE_FLAGS, "replace_peers", REPLACE_PEERS if config.replace_peers else None, _U32),
            attribute(DEVICE_PRIVATE_KEY, config.private_key.raw) if config.private_key else b"",
            _optional(DEVICE_LISTEN_PORT, "listen_port", config.listen_port, _U16),
            _optional(DEVICE_FWMARK, "fwmark", config.fwmark, _U32),
        )
    )


def _encode_peer(peer: PeerConfig) -> Iterator[bytes]:
    """Encode the entries of one peer: the first has all its fields, each further one only adds allowed-ips."""
    flags = REMOVE * peer.remove | UPDATE_ONLY * peer.update_only
    first_flags = flags | REPLACE_ALLOWED_IPS * peer.replace_allowed_ips
    public_key = attribute(PEER_PUBLIC_KEY, peer.public_key.raw)
    prefixes = peer.allowed_ips
    settings = _encode_settings(peer)
    yield nest(0, public_key, _flags(first_flags), settings, _encode_allowed_ips(prefixes[:ALLOWED_IPS_PER_PART]))
    for start in range(ALLOWED_IPS_PER_PART, len(prefixes), ALLOWED_IPS_PER_PART):
        more = prefixes[start : start + ALLOWED_IPS_PER_PART]
        # REPLACE_ALLOWED_IPS again would lose the first entry's; REMOVE and UPDATE_ONLY hold for every entry.
        yield nest(0, public_key, _flags(flags), _encode_allowed_ips(more))


def _encode_settings(peer: PeerConfig) -> bytes:
    return b"".join(
        (
            attribute(PEER_PRESHARED_KEY, peer.preshared_key.raw) if peer.preshared_key else b"",
            attribute(PEER_ENDPOINT, _encode_endpoint(peer.endpoint)) if peer.endpoint else b"",
            _optional(PEER_PERSISTENT_KEEPALIVE, "persistent_keepalive", peer.persistent_keepalive, _U16),
            _optional(PEER_PROTOCOL_VERSION, "protocol_version", peer.protocol_version, _U32),
        )
    )


def _flags(flags: int) -> bytes:
    return attribute(PEER_FLAGS, _U32.pack(flags)) if flags else b""


def _optional(kind: int, name: str, value: int | None, layout: Struct) -> bytes:
    """Encode an integer as an attribute; no bytes for None."""
    if value is None:
        return b""
    try:
        return attribute(kind, layout.pack(value))
    except struct.error as error:
        raise UsageError(f"{name} {value}: want 0 to {(1 << 8 * layout.size) - 1}") from error


def _encode_endpoint(endpoint: Endpoint) -> bytes:
    if isinstance(endpoint.scope, str):
        raise UsageError(f"endpoint {endpoint}: netlink wants the index of {endpoint.scope}: call endpoint.resolve")
    try:
        address = socket.inet_pton(endpoint.family, endpoint.host)
        port = endpoint.port.to_bytes(2)
        if endpoint.family == socket.AF_INET:
            return _SOCKADDR_IN.pack(endpoint.family, port, address)
        return _SOCKADDR_IN6.pack(endpoint.family, port, address, endpoint.scope)
    except (OSError, OverflowError, struct.error) as error:
        raise UsageError(f"endpoint {endpoint}: {error}") from error


def _encode_allowed_ips(prefixes: tuple[AllowedIP, ...]) -> bytes:
    return nest(PEER_ALLOWED_IPS, *map(_encode_allowed_ip, prefixes)) if prefixes else b""


def _encode_allowed_ip(prefix: AllowedIP) -> bytes:
    address, length, remove = prefix
    try:
        layout = _LAYOUTS[len(address)]
        entry = layout.struct.pack(layout.head, length, layout.middle, address)
    except (KeyError, struct.error) as error:
        raise UsageError(f"allowed ip {address.hex()}/{length}: want 4 or 16 bytes and a length of 0 to 255") from error
    if remove:
        return nest(0, entry[ATTRIBUTE_HEADER:], attribute(ALLOWED_IP_FLAGS, _U32.pack(REMOVE_ALLOWED_IP)))
    return entry


def decode_dump(messages: Iterable[Message], where: str = "genl") -> DeviceState:
    """Decode the answer to GET_DEVICE, NLMSG_DONE included. where: begins each error message.

    Raises ControlError if the kernel refused, DumpInterrupted if the device changed during the dump: read again.
    """
    device: dict[int, bytes] = {}
    peers: list[_Peer] = []
    messages = list(messages)
    try:
        check(messages, where, "get")
        for message in messages[:-1]:
            _split_device(message.payload, device, peers)
        return _device_state(device, peers)
    except _MALFORMED as error:
        raise unreadable(where, error) from error


class _Peer(NamedTuple):
    """One peer of a dump: its raw attributes, and the allowed-ips of its entry and all that continue it."""

    by_kind: dict[int, bytes]
    allowed_ips: list[AllowedIP]


def _split_device(payload: bytes, device: dict[int, bytes], peers: list[_Peer]) -> None:
    for kind, value in attributes(payload):
        if kind == DEVICE_PEERS:
            for _, entry in attributes(value):
                _split_peer(entry, peers)
        else:
            device[kind] = value


def _split_peer(entry: bytes, peers: list[_Peer]) -> None:
    """Add one peer, or more allowed-ips to the last one if the entry continues it."""
    peer = _Peer({}, [])
    for kind, value in attributes(entry):
        if kind == PEER_ALLOWED_IPS:
            peer.allowed_ips.extend(_decode_allowed_ips(value))
        else:
            peer.by_kind[kind] = value
    if PEER_PUBLIC_KEY not in peer.by_kind:
        raise ValueError("a peer without public key")
    if peers and peers[-1].by_kind[PEER_PUBLIC_KEY] == peer.by_kind[PEER_PUBLIC_KEY]:
        peers[-1].allowed_ips.extend(peer.allowed_ips)
    else:
        peers.append(peer)


def _device_state(device: dict[int, bytes], peers: list[_Peer]) -> DeviceState:
    return DeviceState(
        private_key=_read(device, DEVICE_PRIVATE_KEY, _key_or_none, None),
        public_key=_read(device, DEVICE_PUBLIC_KEY, _key_or_none, None),
        listen_port=_read(device, DEVICE_LISTEN_PORT, _u16, 0),
        fwmark=_read(device, DEVICE_FWMARK, _u32, 0),
        peers=tuple(map(_peer_state, peers)),
    )


def _peer_state(peer: _Peer) -> PeerState:
    by_kind = peer.by_kind
    return PeerState(
        public_key=Key(by_kind[PEER_PUBLIC_KEY]),
        preshared_key=_read(by_kind, PEER_PRESHARED_KEY, _key_or_none, None),
        endpoint=_read(by_kind, PEER_ENDPOINT, _decode_endpoint, None),
        persistent_keepalive=_read(by_kind, PEER_PERSISTENT_KEEPALIVE, _u16, 0),
        latest_handshake=_read(by_kind, PEER_LAST_HANDSHAKE, _decode_timespec, 0),
        rx_bytes=_read(by_kind, PEER_RX_BYTES, _u64, 0),
        tx_bytes=_read(by_kind, PEER_TX_BYTES, _u64, 0),
        allowed_ips=tuple(peer.allowed_ips),
        protocol_version=_read(by_kind, PEER_PROTOCOL_VERSION, _u32, 1),
    )


def _read(by_kind: dict[int, bytes], kind: int, decode: Callable[[bytes], T], default: D) -> T | D:
    """Decode an attribute; returns the default if the kernel left it out."""
    return decode(by_kind[kind]) if kind in by_kind else default


def _decode_allowed_ips(entries: bytes) -> list[AllowedIP]:
    """Decode entries by one unpack each, as long as they have the layout that current kernels write."""
    decoded: list[AllowedIP] = []
    at = 0
    while layout := _LAYOUT_OF_HEAD.get(entries[at : at + _HEAD_SIZE]):
        _, length, middle, address = layout.struct.unpack_from(entries, at)
        if middle != layout.middle:
            break
        decoded.append(AllowedIP(address, length))
        at += layout.struct.size
    return decoded + [_decode_allowed_ip(entry) for _, entry in attributes(entries[at:])]


def _decode_allowed_ip(entry: bytes) -> AllowedIP:
    by_kind = dict(attributes(entry))
    address = by_kind.get(ALLOWED_IP_ADDRESS, b"")
    if len(address) not in _LAYOUTS or ALLOWED_IP_LENGTH not in by_kind:
        raise ValueError(f"an allowed ip of {entry.hex()}")
    flags = _u32(by_kind[ALLOWED_IP_FLAGS]) if ALLOWED_IP_FLAGS in by_kind else 0
    return AllowedIP(address, _u8(by_kind[ALLOWED_IP_LENGTH]), bool(flags & REMOVE_ALLOWED_IP))


def _decode_endpoint(value: bytes) -> Endpoint:
    match _U16.unpack_from(value)[0]:
        case socket.AF_INET:
            family, port, address = _SOCKADDR_IN.unpack(value)
            scope = 0
        case socket.AF_INET6:
            family, port, address, scope = _SOCKADDR_IN6.unpack(value)
        case family:
            raise ValueError(f"an endpoint of family {family}")
    return Endpoint(socket.inet_ntop(family, address), int.from_bytes(port), scope)


def _decode_timespec(value: bytes) -> int:
    seconds, nanoseconds = _TIMESPEC.unpack(value)
    return int(seconds * 1_000_000_000 + nanoseconds)


def _key_or_none(value: bytes) -> Key | None:
    key = Key(value)
    return None if key == ZERO_KEY else key


def _number(layout: Struct) -> Callable[[bytes], int]:
    def decode(value: bytes) -> int:
        number: int = layout.unpack(value)[0]
        return number

    return decode


_u8, _u16, _u32, _u64 = map(_number, (_U8, _U16, _U32, _U64))


class GenlControl:
    """Configure the WireGuard interfaces of the network namespace in which a socket was opened.

    sock: socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC); the caller closes it. timeout: seconds for one get or set; a
    get may have its own. node: the name of that namespace, for the evidence.
    """

    def __init__(self, sock: socket.socket, *, timeout: float = REQUEST_TIMEOUT, node: str = "") -> None:
        self._node = node
        self._socket = GenericSocket(sock)
        self._timeout = timeout

    def interface(self, ifname: str) -> Control:
        """Return the Control of one interface."""
        return _Interface(self, ifname)

    @cached_property
    def family_id(self) -> int:
        """The id of WireGuard's generic netlink family in this kernel."""
        try:
            return self._socket.resolve_family("wireguard", Deadline(self._timeout))
        except ControlError as error:
            if error.errno != errno.ENOENT:
                raise
            raise Unavailable(
                "this kernel has no WireGuard: modprobe wireguard (Linux 5.6 or later with CONFIG_WIREGUARD)"
            ) from error

    def set(self, ifname: str, config: DeviceConfig) -> None:
        """Apply a configuration; after a refusal the requests accepted before it stay applied."""
        with steps.step(self._node, lambda: wg_set(ifname, config)):
            requests = encode_set(ifname, config, self.family_id)
            action = describe(config)
            deadline = Deadline(self._timeout)
            for number, request in enumerate(requests, 1):
                part = f" (part {number} of {len(requests)})" if len(requests) > 1 else ""
                self._socket.exchange(request, f"{ifname} (genl)", action + part, deadline)

    def get(self, ifname: str, timeout: float | None = None) -> DeviceState:
        """Read the device; starts again whenever it changed during the dump."""
        where, deadline = f"{ifname} (genl)", Deadline(self._timeout if timeout is None else timeout)
        request = encode_get(ifname, self.family_id)
        with steps.step(self._node, f"wg show {ifname}", is_listed=False):
            while True:
                with contextlib.suppress(DumpInterrupted):
                    return decode_dump(self._socket.exchange(request, where, "get", deadline), where)


@dataclass(frozen=True, slots=True)
class _Interface:
    control: GenlControl
    ifname: str

    def get(self, timeout: float | None = None) -> DeviceState:
        """Read this device."""
        return self.control.get(self.ifname, timeout)

    def set(self, config: DeviceConfig) -> None:
        """Apply a configuration to this device."""
        self.control.set(self.ifname, config)
