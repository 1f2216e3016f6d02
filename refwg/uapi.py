"""Parse and answer requests of the UAPI text protocol, as a function over a device.

Does what netlink.c of the driver does, in the format of https://www.wireguard.com/xplatform/. Each line takes effect at
once. The first line that fails ends the request, and the lines before it keep their effect.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from refwg.address import format_address, parse_address
from refwg.allowedips import Prefix
from refwg.boundary import Endpoint, Transmit
from refwg.errors import ConfigError, InvalidArgument
from refwg.ip import IPV4_BYTES
from refwg.messages import KEY_LENGTH, SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from refwg.boundary import Sockets
    from refwg.device import Device, Effect
    from refwg.peer import Peer

PROTOCOL_VERSION: Final = "1"

_MAX_U16: Final = 2**16 - 1
_MAX_U32: Final = 2**32 - 1
_MAX_DIGITS: Final = 20
# Longer than any valid line: a client that sends more without a newline is not speaking UAPI.
_MAX_LINE: Final = 4096


class Answer(NamedTuple):
    """Reply to the client, effects for the caller to carry out, and whether the connection must be closed then."""

    reply: bytes = b""
    effects: tuple[Effect, ...] = ()
    is_over: bool = False


class Conversation:
    """One connection: takes bytes as they arrive, and answers each request when it is complete.

    A request is carried out as a whole, so no other connection sees a part of it.
    """

    def __init__(self, device: Device, sockets: Sockets) -> None:
        self._device = device
        self._sockets = sockets
        self._rest = ""
        self._operation = ""
        self._lines: list[str] = []

    def feed(self, data: bytes, now: int) -> Answer:
        """Process received bytes, which may be part of a request or several requests; now: nanoseconds."""
        *lines, self._rest = (self._rest + data.decode("latin-1")).split("\n")
        reply = b""
        effects: list[Effect] = []
        for line in lines:
            if line and self._operation == "set=1":
                self._lines.append(line)
                continue
            answer = self._line(line, now)
            reply += answer.reply
            effects += answer.effects
            if answer.is_over:
                return Answer(reply, tuple(effects), is_over=True)
        if len(self._rest) <= _MAX_LINE and not (self._operation == "get=1" and self._rest):
            return Answer(reply, tuple(effects))
        # An operation that has begun gets an answer, even if the lines after it are invalid.
        return Answer(reply + (_status(errno.EINVAL) if self._operation else b""), tuple(effects), is_over=True)

    def _line(self, line: str, now: int) -> Answer:
        if not self._operation:
            self._operation = line
            return Answer(is_over=line not in {"get=1", "set=1"})
        operation, self._operation = self._operation, ""
        if operation == "get=1":
            return Answer(_status(errno.EINVAL) if line else get(self._device) + _status(0))
        lines, self._lines = self._lines, []
        request = Request(self._device, self._sockets, now)
        return Answer(_status(request.carry_out(lines)), tuple(request.effects))


def get(device: Device) -> bytes:
    """Return the answer to `get=1` without its errno: device, peers and prefixes as `key=value` lines."""
    return "".join(f"{key}={value}\n" for key, value in _description(device)).encode()


class Request:
    """Carries out one `set=1` request, line by line.

    effects: what the caller must send, even if the request fails.
    """

    def __init__(self, device: Device, sockets: Sockets, now: int) -> None:
        self.effects: list[Effect] = []
        self._device = device
        self._sockets = sockets
        self._now = now
        # The peer that the next lines configure; None: they configure the device, or have no effect.
        self._peer: Peer | None = None
        self._is_new = False
        self._wants_keepalive = False
        self._handle_line = self._device_line

    def carry_out(self, lines: list[str]) -> int:
        """Apply the lines in order; returns the errno of the first that failed, else 0."""
        failure = 0
        try:
            for line in lines:
                self._handle_line(*_setting(line))
        except ConfigError as error:
            failure = error.errno
        # Lines before the failed one keep their effect, so their section is ended as usual.
        self._end_section()
        self.effects = [effect for effect in self.effects if not self._is_to_removed_peer(effect)]
        return failure

    def _device_line(self, key: str, value: str) -> None:
        device, now = self._device, self._now
        match key:
            case "private_key":
                self.effects += device.set_private_key(_key(value), now)
            case "listen_port":
                device.set_listen_port(_number(value, _MAX_U16))
            case "fwmark":
                device.set_fwmark(_number(value, _MAX_U32))
            case "replace_peers":
                _true(value)
                device.remove_all_peers(now)
            case "public_key":
                self._begin_section(_key(value))
            case _:
                raise _invalid(f"{key}: unknown device key")

    def _begin_section(self, public_key: bytes) -> None:
        self._handle_line = self._peer_line
        self._peer = self._device.peer(public_key)
        self._is_new = self._peer is None
        if self._is_new:
            self._peer = self._device.add_peer(public_key, self._now)

    def _end_section(self) -> None:
        """Send what waits for the peer; only now, because its last line may have given it the endpoint."""
        peer, self._peer = self._peer, None
        wants_keepalive, self._wants_keepalive = self._wants_keepalive, False
        if peer is not None:
            self.effects += self._device.peer_configured(peer, self._now, wants_keepalive=wants_keepalive)

    def _is_to_removed_peer(self, effect: Effect) -> bool:
        """Return True for a datagram to a peer that a later line has removed.

        wg(8) sends `private_key`, which may start handshakes, before `replace_peers`.
        """
        peer = effect.peer if isinstance(effect, Transmit) else None
        return peer is not None and self._device.peer(peer.public_key) is not peer

    def _peer_line(self, key: str, value: str) -> None:
        if key == "public_key":
            self._end_section()
            self._begin_section(_key(value))
            return
        setting = self._PEER_SETTINGS.get(key)
        if setting is None:
            raise _invalid(f"{key}: unknown peer key")
        setting(self, value)

    def _remove(self, value: str) -> None:
        _true(value)
        if self._peer is not None:
            self._device.remove_peer(self._peer, self._now)
        self._peer = None

    def _update_only(self, value: str) -> None:
        _true(value)
        if self._is_new:
            self._remove(value)

    def _protocol_version(self, value: str) -> None:
        if value != PROTOCOL_VERSION:
            raise _invalid(f"protocol_version={value}: expected {PROTOCOL_VERSION}")

    def _preshared_key(self, value: str) -> None:
        key = _key(value)
        if self._peer is not None:
            self._peer.handshake.preshared_key = key

    def _endpoint(self, value: str) -> None:
        endpoint = _parse_endpoint(value, self._sockets)
        if self._peer is not None:
            self._peer.set_endpoint(endpoint, self._now)

    def _persistent_keepalive_interval(self, value: str) -> None:
        seconds = _number(value, _MAX_U16)
        if self._peer is not None:
            is_turned_on = self._device.set_persistent_keepalive(self._peer, seconds)
            self._wants_keepalive = is_turned_on or (self._wants_keepalive and seconds > 0)

    def _replace_allowed_ips(self, value: str) -> None:
        _true(value)
        if self._peer is not None:
            self._device.remove_allowed_ips(self._peer)

    def _allowed_ip(self, value: str) -> None:
        is_removal = value.startswith("-")
        prefix = _parse_prefix(value[1:] if value[:1] in {"-", "+"} else value)
        if self._peer is None:
            return
        if is_removal:
            self._device.remove_allowed_ip(self._peer, prefix)
        else:
            self._device.insert_allowed_ip(self._peer, prefix)

    _PEER_SETTINGS: ClassVar[dict[str, Callable[[Request, str], None]]] = {
        "remove": _remove,
        "update_only": _update_only,
        "protocol_version": _protocol_version,
        "preshared_key": _preshared_key,
        "endpoint": _endpoint,
        "persistent_keepalive_interval": _persistent_keepalive_interval,
        "replace_allowed_ips": _replace_allowed_ips,
        "allowed_ip": _allowed_ip,
    }


def _description(device: Device) -> Iterator[tuple[str, object]]:
    if device.identity is not None:
        yield "private_key", device.identity.private.hex()
    if device.listen_port:
        yield "listen_port", device.listen_port
    if device.fwmark:
        yield "fwmark", device.fwmark
    for peer in device.peers:
        yield from _peer_description(device, peer)


def _peer_description(device: Device, peer: Peer) -> Iterator[tuple[str, object]]:
    yield "public_key", peer.public_key.hex()
    yield "preshared_key", peer.handshake.preshared_key.hex()
    yield "protocol_version", PROTOCOL_VERSION
    if peer.endpoint is not None:
        yield "endpoint", format_endpoint(peer.endpoint)
    seconds, nanoseconds = divmod(peer.latest_handshake, SECOND)
    yield "last_handshake_time_sec", seconds
    yield "last_handshake_time_nsec", nanoseconds
    yield "tx_bytes", peer.statistics.tx_bytes
    yield "rx_bytes", peer.statistics.rx_bytes
    yield "persistent_keepalive_interval", peer.timers.persistent_keepalive_interval
    for prefix in device.allowed_ips(peer):
        yield "allowed_ip", f"{format_address(prefix.address)}/{prefix.length}"


def format_endpoint(endpoint: Endpoint) -> str:
    """Return `ADDRESS:PORT`, or for IPv6 `[ADDRESS]:PORT`, or `[ADDRESS%SCOPE]:PORT` if the scope id is not 0."""
    host = format_address(endpoint.address)
    if len(endpoint.address) == IPV4_BYTES:
        return f"{host}:{endpoint.port}"
    scope = f"%{endpoint.scope_id}" if endpoint.scope_id else ""
    return f"[{host}{scope}]:{endpoint.port}"


def _parse_endpoint(text: str, sockets: Sockets) -> Endpoint:
    host, _, port = text.rpartition(":")
    is_ipv6 = host.startswith("[") and host.endswith("]")
    address, percent, scope = host[1:-1].partition("%") if is_ipv6 else (host, "", "")
    try:
        packed = parse_address(address)
    except InvalidArgument as error:
        raise _invalid(f"endpoint {text}: expected ADDRESS:PORT or [ADDRESS]:PORT") from error
    if is_ipv6 is (len(packed) == IPV4_BYTES):
        raise _invalid(f"endpoint {text}: an IPv6 address needs brackets, an IPv4 address must not have them")
    return Endpoint(packed, _number(port, _MAX_U16), _scope_id(scope, sockets) if percent else 0)


def _scope_id(scope: str, sockets: Sockets) -> int:
    return _number(scope, _MAX_U32) if scope.isdecimal() and scope.isascii() else sockets.interface_index(scope)


def _parse_prefix(text: str) -> Prefix:
    address, _, length = text.partition("/")
    try:
        packed = parse_address(address)
    except InvalidArgument as error:
        raise _invalid(f"allowed ip {text}: expected ADDRESS/LENGTH") from error
    return Prefix(packed, _number(length, len(packed) * 8))


def _setting(line: str) -> tuple[str, str]:
    key, equals, value = line.partition("=")
    if not equals:
        raise ConfigError(f"line {line!r}: expected KEY=VALUE", errno.EPROTO)
    return key, value


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_LENGTH or len(text) != 2 * KEY_LENGTH:
        raise _invalid("key: expected 64 hexadecimal digits")
    return key


def _number(text: str, maximum: int) -> int:
    if not (text.isdecimal() and text.isascii() and len(text) <= _MAX_DIGITS) or int(text) > maximum:
        raise _invalid(f"{text!r}: expected a decimal number up to {maximum}")
    return int(text)


def _true(text: str) -> None:
    if text != "true":
        raise _invalid(f"{text!r}: expected 'true'")


def _invalid(message: str) -> ConfigError:
    return ConfigError(message, errno.EINVAL)


def _status(number: int) -> bytes:
    """Return the last two lines of an answer. The errno is negative, as in the driver; wg(8) negates it."""
    return f"errno={-number}\n\n".encode()
