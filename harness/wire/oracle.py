"""Judge captured datagrams by rules that every WireGuard device must keep to.

The oracle gets the datagrams of a lab in the order of their time stamps, and the lab's static keys. It has its own
handshake code (`harness.wire.noise`), because it judges refwg too. It sees what a device sent and received, not what
the device has dropped. So a message that may have confirmed or begun a session counts as one that has, and a finding
needs a proof: a datagram that no correct device can have sent after what had arrived.

Only datagrams of a device under test are judged: from its port in its node, or with its static key inside. What a
scripted peer or a wire has sent counts as received. Nothing is judged after the first frame that a capture has lost.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from harness.wire import inner, noise
from harness.wire.messages import (
    COOKIE_REPLY,
    DATA,
    FIELDS,
    INITIATION,
    KEEPALIVE_SIZE,
    NAMES,
    NANOSECONDS,
    RESPONSE,
    SIZES,
    counter_of,
    kind_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# By the type of a message: the invariants that each one is judged by.
_OF_ALL: Final = ("MSG-05", "MSG-15")
_BY_TYPE: Final[dict[int, tuple[str, ...]]] = {
    0: _OF_ALL,
    INITIATION: (*_OF_ALL, "MSG-01", "HS-39", "CK-01", "CK-02", "CR-16"),
    RESPONSE: (*_OF_ALL, "MSG-02", "MSG-11", "HS-39", "CK-01", "CK-02", "CR-16"),
    COOKIE_REPLY: (*_OF_ALL, "MSG-11"),
    DATA: (*_OF_ALL, "MSG-04", "MSG-12", "DT-01", "DT-02", "DT-21"),
}
# The requirements that the oracle judges. Those of the second line need more than a message of some type.
INVARIANTS: Final = frozenset(name for names in _BY_TYPE.values() for name in names) | frozenset(
    ("MSG-19", "CR-11", "CR-12", "CR-14", "HS-14", "HS-20", "HS-24")
)
_NEVER: Final = 1 << 63
_TAI64: Final = struct.Struct(">QI")
# 2^62 + 10 is the protocol's base; boringtun's has the 37 s of today's leap seconds, which interoperates.
_BASES: Final = (2**62 + 10, 2**62 + 37)
_WHITENING: Final = 1 << 24
# Seconds by which a time stamp may differ from the clock of the captures: a program may have been stopped in between.
_STAMP_TOLERANCE: Final = 120
# Two equal stamps this many ns apart in the capture are wrong; nearer ones may be of one step of the whitening.
_STEP: Final = NANOSECONDS
_REKEY_TIMEOUT: Final = 5 * NANOSECONDS
_SPACING_TOLERANCE: Final = NANOSECONDS // 2
_REJECT_AFTER_TIME: Final = 180 * NANOSECONDS
# A datagram leaves after the decision to send it: a program may be stopped in between.
_AGE_TOLERANCE: Final = 5 * NANOSECONDS
_BLOCK: Final = 16
_MAC: Final = 16
_NO_MAC2: Final = bytes(_MAC)
_TYPE_AND_INDEX: Final = 8


class Datagram(NamedTuple):
    """A UDP datagram of a capture.

    time: ns of wall time. left: the node whose device sent it onto this link; "" if this is the far end of a wire.
    reached: the node that it has arrived at; "" for the near end of a wire. place: capture and number of the frame.
    """

    time: int
    left: str
    reached: str
    source: tuple[str, int]
    destination: tuple[str, int]
    payload: bytes
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Device:
    """A device under test, and what the lab has told it. All times are ns of wall time.

    name: for findings. node: with its sockets. privates: every private key it has had. ports: every listen port with
    its time; 0 for one that is not known. began, ended: its life. resets: when something was changed that lifts the
    rule of 5 s between initiations. least_mtu: below this length every plaintext must be padded. sees_all: whether
    all links of its node are captured, so that what has not been seen has not arrived.
    """

    name: str
    node: str
    privates: tuple[bytes, ...] = ()
    ports: tuple[tuple[int, int], ...] = ()
    began: int = 0
    ended: int = _NEVER
    resets: tuple[int, ...] = ()
    least_mtu: int = 0
    sees_all: bool = True

    def ports_at(self, time: int) -> set[int]:
        """Return the ports that it has had until then; none if one of them is not known."""
        ports = {port for since, port in self.ports if since <= time}
        return set() if 0 in ports else ports

    def lives_at(self, time: int) -> bool:
        """Return whether it exists at this time."""
        return self.began <= time <= self.ended


@dataclass(frozen=True, slots=True)
class Finding:
    """The first datagram of a device that violates an invariant.

    device: its name. message: what it did, in the protocol's words. since: for a gap, the time when its session began.
    """

    requirement: str
    device: str
    message: str
    datagram: Datagram
    since: int = 0


@dataclass(slots=True, kw_only=True)
class _Session:
    """A session as one device has it. index: the peer's, in the data that the device sends. own: the device's."""

    device: Device
    index: int
    own: int
    time: int
    is_initiator: bool
    is_confirmed: bool
    is_ambiguous: bool = False
    expected: int = 0
    missing: set[int] = field(default_factory=set)
    has_gap: bool = False


@dataclass(slots=True, kw_only=True)
class _Sent:
    """A handshake message that a device has sent. recipient: its public key; None if no known one fits."""

    device: Device
    payload: bytes
    time: int
    recipient: bytes | None
    stamp: int = 0


class Oracle:
    """Judges the datagrams of one lab: give each to `take`, then read `findings` and `checked`.

    checked: for each device and invariant, how many datagrams were judged. gaps: the first missing counters of each
    session, which violate DT-01 only if no send has failed and none was filtered.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        privates: Iterable[bytes] = (),
        publics: Iterable[bytes] = (),
        transport_keys: Mapping[int, bytes] | None = None,
        responses: Mapping[bytes, bool] | None = None,
        knows_all_keys: bool = True,
        has_steady_clock: bool = True,
    ) -> None:
        """devices: under test. privates, publics: other static keys of the lab, such as those of scripted peers.

        transport_keys: those that are known, by the receiver index of the data that they decrypt.
        responses: those whose keys are known, and whether they authenticate with them (`harness.wire.inner`).
        knows_all_keys: False if a program may have keys that are not given here. has_steady_clock: False if a test has
        set the clock.
        """
        self.checked: Counter[tuple[str, str]] = Counter()
        self.gaps: list[Finding] = []
        self._findings: dict[tuple[str, str], Finding] = {}
        self._transport_keys = transport_keys or {}
        self._responses = responses or {}
        self._knows_all_keys = knows_all_keys
        self._has_steady_clock = has_steady_clock
        self._at: dict[str, list[Device]] = {}
        self._statics: dict[bytes, noise.Static] = {}
        self._owners: dict[bytes, list[Device]] = {}
        for device in devices:
            self._at.setdefault(device.node, []).append(device)
            for private in device.privates:
                self._owners.setdefault(self._add(private), []).append(device)
        for private in privates:
            self._add(private)
        self._publics = list(dict.fromkeys([*self._statics, *publics]))
        self._clears = [public for public in self._publics if any(public)]
        # Ports that the lab has not chosen: where an initiation came from that only this device can have made.
        self._learned: dict[tuple[str, int], Device] = {}
        self._recipients: dict[tuple[str, tuple[str, int]], bytes] = {}
        # By node and index. What has arrived there, and what a device there has sent.
        self._arrived: dict[tuple[str, int], list[bytes]] = {}
        self._sent: dict[tuple[str, int], _Sent] = {}
        self._cookie_replies: dict[str, list[bytes]] = {}
        # By node and the peer's index, and by node and the device's own index.
        self._sessions: dict[tuple[str, int], _Session] = {}
        self._own: dict[tuple[str, int], _Session] = {}
        self._ephemerals: dict[Device, set[bytes]] = {}
        self._indices: dict[Device, Counter[int]] = {}
        self._last_index: dict[tuple[Device, bytes | None], int] = {}
        self._last: dict[tuple[Device, bytes], _Sent] = {}

    def _add(self, private: bytes) -> bytes:
        static = noise.static_key(private)
        self._statics[static.public] = static
        return static.public

    @property
    def findings(self) -> list[Finding]:
        """The first violation of each invariant by each device, in the order of the datagrams."""
        return list(self._findings.values())

    def take(self, datagram: Datagram) -> None:
        """Judge the next datagram, and remember it; they come in the order of their times."""
        kind = kind_of(datagram.payload)
        if datagram.left in self._at:
            self._leaves(datagram, kind)
        if datagram.reached in self._at:
            self._arrives(datagram, kind)

    # What arrives: only remembered

    def _arrives(self, datagram: Datagram, kind: int) -> None:
        payload, node = datagram.payload, datagram.reached
        if len(payload) < _TYPE_AND_INDEX:
            return
        index = int.from_bytes(payload[4:8], "little")
        if kind == DATA:
            if (session := self._own.get((node, index))) is not None:
                session.is_confirmed = True
        elif kind == COOKIE_REPLY:
            self._cookie_replies.setdefault(node, []).append(payload)
        else:
            self._arrived.setdefault((node, index), []).append(payload)
            if kind == RESPONSE:
                self._response_arrives(datagram, index)

    def _response_arrives(self, datagram: Datagram, index: int) -> None:
        own = int.from_bytes(datagram.payload[8:12], "little")
        if (sent := self._sent.get((datagram.reached, own))) is not None:
            self._begin(sent.device, datagram, index=index, own=own, is_initiator=True, is_confirmed=True)

    def _begin(
        self, device: Device, datagram: Datagram, *, index: int, own: int, is_initiator: bool, is_confirmed: bool
    ) -> None:
        """Remember a session that this handshake may have made."""
        place = (device.node, index)
        old = self._sessions.get(place)
        if old is not None and old.own == own:
            # A response that came again: the first one may have been dropped behind the capture.
            old.time = datagram.time
            return
        session = _Session(
            device=device,
            index=index,
            own=own,
            time=datagram.time,
            is_initiator=is_initiator,
            is_confirmed=is_confirmed,
            # Two sessions with one index of the peer: its data may be of either.
            is_ambiguous=old is not None,
        )
        self._sessions[place] = session
        self._own[device.node, own] = session

    # What leaves a node: judged if it is a device's

    def _leaves(self, datagram: Datagram, kind: int) -> None:
        match kind:
            case 4:
                self._data(datagram)
            case 1:
                self._initiation(datagram)
            case 2:
                self._response(datagram)
            case 3:
                self._cookie_reply(datagram)
            case _:
                if (device := self._by_port(datagram)) is not None:
                    self._malformed(datagram, device)

    def _by_port(self, datagram: Datagram) -> Device | None:
        """Return the one device of the node that has the source port."""
        port, time = datagram.source[1], datagram.time
        alive = [device for device in self._at[datagram.left] if device.lives_at(time)]
        found = [device for device in alive if port in device.ports_at(time)]
        if not found and (learned := self._learned.get((datagram.left, port))) in alive:
            return learned
        return found[0] if len(found) == 1 else None

    def _count(self, device: Device, kind: int) -> None:
        for requirement in _BY_TYPE[kind]:
            self.checked[device.name, requirement] += 1

    def _violates(self, requirement: str, device: Device, datagram: Datagram, message: str) -> None:
        """Keep the first finding of each invariant and device."""
        finding = Finding(requirement, device.name, message, datagram)
        self._findings.setdefault((requirement, device.name), finding)

    def _malformed(self, datagram: Datagram, device: Device) -> None:
        payload = datagram.payload
        kind = payload[0] if payload else 0
        size = len(payload)
        self._count(device, 0)
        if kind not in NAMES or size < 4:  # noqa: PLR2004 - the type word
            what = f"type {kind}" if payload else "no type"
            self._violates("MSG-15", device, datagram, f"sent a datagram of {size} bytes with {what}")
        elif payload[1:4] != bytes(3):
            text = f"sent a message of type {kind} with reserved bytes {payload[1:4].hex()}, not zero"
            self._violates("MSG-05", device, datagram, text)
        else:
            requirement = {INITIATION: "MSG-01", RESPONSE: "MSG-02", DATA: "MSG-04"}.get(kind, "MSG-15")
            want = f"{SIZES[kind]}" if kind in SIZES else f"at least {KEEPALIVE_SIZE}"
            self._violates(requirement, device, datagram, f"sent {_an(kind)} of {size} bytes, not {want}")

    # Handshake messages

    def _recipient(self, datagram: Datagram) -> bytes | None:
        """Return the public key that mac1 is for; None if none of the known ones."""
        way = (datagram.left, datagram.destination)
        last = self._recipients.get(way)
        for public in ([last] if last is not None else []) + self._publics:
            if noise.has_mac1(datagram.payload, public):
                self._recipients[way] = public
                return public
        return None

    def _initiation(self, datagram: Datagram) -> None:
        recipient = self._recipient(datagram)
        static = self._statics.get(recipient) if recipient else None
        opened = static.open_initiation(datagram.payload) if static else None
        by_port = self._by_port(datagram)
        device = by_port
        if opened is not None and (by_port is None or by_port not in self._owners.get(opened.static, ())):
            device = self._by_key(opened.static, datagram) or by_port
        if device is None:
            return
        if device is not by_port and self._is_repeated(datagram, device):
            # Not the device, but somebody who replays what it sent.
            return
        self._count(device, INITIATION)
        self._judge_port(datagram, device, by_key=opened is not None)
        stamp = 0
        if recipient is None:
            self._wrong_mac1(datagram, device)
        elif opened is None and static is not None:
            self._violates("MSG-01", device, datagram, "sent an initiation whose static key does not authenticate")
        elif opened is not None and opened.timestamp is None:
            self._violates("MSG-01", device, datagram, "sent an initiation whose timestamp does not authenticate")
        elif opened is not None and opened.timestamp is not None:
            stamp = self._judge_timestamp(datagram, device, opened.timestamp)
        sent = _Sent(device=device, payload=datagram.payload, time=datagram.time, recipient=recipient, stamp=stamp)
        is_fresh = self._judge_handshake(sent, datagram, INITIATION)
        if stamp and recipient is not None and is_fresh:
            self._judge_order(sent, datagram, recipient)

    def _by_key(self, public: bytes, datagram: Datagram) -> Device | None:
        alive = (device for device in self._owners.get(public, ()) if device.lives_at(datagram.time))
        return next((device for device in alive if device.node == datagram.left), None)

    def _is_repeated(self, datagram: Datagram, device: Device) -> bool:
        return _field(INITIATION, "ephemeral", datagram.payload) in self._ephemerals.get(device, ())

    def _wrong_mac1(self, datagram: Datagram, device: Device) -> None:
        if self._knows_all_keys:
            kind = datagram.payload[0]
            covered = SIZES[kind] - 2 * _MAC
            text = f"sent {_an(kind)} whose mac1 over its first {covered} bytes fits no peer's public key"
            self._violates("CK-01", device, datagram, text)

    def _judge_port(self, datagram: Datagram, device: Device, *, by_key: bool) -> None:
        if not by_key:
            return
        ports = device.ports_at(datagram.time)
        if not ports:
            self._learned[device.node, datagram.source[1]] = device
            return
        self.checked[device.name, "MSG-19"] += 1
        if datagram.source[1] not in ports:
            text = f"sent an initiation from port {datagram.source[1]}, not from its listen port {max(ports)}"
            self._violates("MSG-19", device, datagram, text)

    def _judge_timestamp(self, datagram: Datagram, device: Device, timestamp: bytes) -> int:
        """Return the stamp as ns of wall time; 0 if it is not one."""
        seconds, nanoseconds = _TAI64.unpack(timestamp)
        self.checked[device.name, "CR-11"] += 1
        self.checked[device.name, "CR-12"] += 1
        if nanoseconds >= NANOSECONDS:
            text = f"sent a timestamp with {nanoseconds} ns, not below 10^9: {timestamp.hex()}"
            self._violates("CR-11", device, datagram, text)
            return 0
        if nanoseconds % _WHITENING:
            text = f"sent a timestamp with {nanoseconds} ns, not a multiple of 2^24"
            self._violates("CR-12", device, datagram, text)
        now = datagram.time // NANOSECONDS
        apart = [seconds - base - now for base in _BASES]
        if self._has_steady_clock and not min(map(abs, apart)) <= _STAMP_TOLERANCE:
            text = f"sent a timestamp that is {apart[0]} s from the wall clock as TAI64N: {timestamp.hex()}"
            self._violates("CR-11", device, datagram, text)
            return 0
        return int((seconds - _BASES[0]) * NANOSECONDS + nanoseconds)

    def _judge_order(self, sent: _Sent, datagram: Datagram, recipient: bytes) -> None:
        """Compare an initiation with the last one to the same peer: its timestamp, and the rule of 5 s."""
        device = sent.device
        last = self._last.get((device, recipient))
        self._last[device, recipient] = sent
        if last is None or not self._has_steady_clock:
            return
        if sent.stamp < last.stamp or (sent.stamp == last.stamp and sent.time - last.time > _STEP):
            text = f"sent a timestamp that is {(sent.stamp - last.stamp) / NANOSECONDS:+.3f} s from the one before"
            self._violates("CR-11", device, datagram, f"{text}, not later")
        if any(last.time - _SPACING_TOLERANCE <= reset <= sent.time for reset in device.resets):
            return
        self.checked[device.name, "HS-14"] += 1
        # The stamps say when each was made: the first one may have left late.
        apart = max(sent.stamp - last.stamp, sent.time - last.time)
        if apart < _REKEY_TIMEOUT - _SPACING_TOLERANCE:
            text = f"sent two initiations to one peer {apart / NANOSECONDS:.3f} s apart, not 5 s"
            self._violates("HS-14", device, datagram, text)

    def _judge_handshake(self, sent: _Sent, datagram: Datagram, kind: int) -> bool:
        """Judge what initiations and responses have in common, and remember the message; False if it was sent again."""
        device, payload = sent.device, sent.payload
        ephemeral = _field(kind, "ephemeral", payload)
        index = int.from_bytes(payload[4:8], "little")
        ephemerals = self._ephemerals.setdefault(device, set())
        indices = self._indices.setdefault(device, Counter())
        if any(public in payload for public in self._clears):
            text = f"sent {_an(kind)} with a static public key in clear"
            self._violates("HS-39", device, datagram, text)
        is_fresh = ephemeral not in ephemerals
        if not is_fresh:
            text = f"sent {_an(kind)} with the ephemeral key of an earlier message, {ephemeral.hex()[:8]}..."
            self._violates("CR-16", device, datagram, text)
        elif self._is_index_reused(sent, index):
            text = f"sent {_an(kind)} with the sender index of an earlier message, {index:#010x}"
            self._violates("CR-16", device, datagram, text)
        ephemerals.add(ephemeral)
        indices[index] += 1
        self._last_index[device, sent.recipient] = index
        self._judge_mac2(sent, datagram, kind)
        self._sent[device.node, index] = sent
        return is_fresh

    def _is_index_reused(self, sent: _Sent, index: int) -> bool:
        """Return whether an index is used again: at once to the same peer, or for the second time by the device.

        Among thousands of random indices of 32 bits one may come twice by chance.
        """
        indices = self._indices[sent.device]
        if self._last_index.get((sent.device, sent.recipient)) == index:
            return True
        return indices[index] > 0 and any(count > 1 for count in indices.values())

    def _judge_mac2(self, sent: _Sent, datagram: Datagram, kind: int) -> None:
        payload = sent.payload
        if payload[-_MAC:] == _NO_MAC2 or sent.recipient is None or not sent.device.sees_all:
            return
        if not any(noise.has_mac2(payload, cookie) for cookie in self._cookies(sent)):
            text = f"sent {_an(kind)} with a mac2 that no cookie it was given makes"
            self._violates("CK-02", sent.device, datagram, text)

    def _cookies(self, sent: _Sent) -> Iterable[bytes]:
        """Return the cookies that a device was given for messages that it has sent."""
        for reply in self._cookie_replies.get(sent.device.node, ()):
            answered = self._sent.get((sent.device.node, int.from_bytes(reply[4:8], "little")))
            if answered is not None and answered.recipient is not None:
                mac1 = answered.payload[-2 * _MAC : -_MAC]
                cookie = noise.open_cookie_reply(reply, answered.recipient, mac1)
                if cookie is not None:
                    yield cookie

    def _response(self, datagram: Datagram) -> None:
        device = self._by_port(datagram)
        if device is None:
            return
        payload = datagram.payload
        own, index = int.from_bytes(payload[4:8], "little"), int.from_bytes(payload[8:12], "little")
        self._count(device, RESPONSE)
        arrived = [p for p in self._arrived.get((datagram.left, index), ()) if p[0] == INITIATION]
        if not arrived:
            self._not_echoed(datagram, device, index)
        recipient = self._recipient(datagram)
        if recipient is None:
            self._wrong_mac1(datagram, device)
        if (is_authentic := self._responses.get(payload)) is not None:
            self.checked[device.name, "HS-20"] += 1
            if not is_authentic:
                text = "sent a response that does not authenticate with the ephemeral and preshared key it has logged"
                self._violates("HS-20", device, datagram, text)
        sent = _Sent(device=device, payload=payload, time=datagram.time, recipient=recipient)
        self._judge_handshake(sent, datagram, RESPONSE)
        # Data that confirms the session may arrive by a link that is not captured.
        self._begin(device, datagram, index=index, own=own, is_initiator=False, is_confirmed=not device.sees_all)

    def _cookie_reply(self, datagram: Datagram) -> None:
        device = self._by_port(datagram)
        if device is None:
            return
        self._count(device, COOKIE_REPLY)
        index = int.from_bytes(datagram.payload[4:8], "little")
        if (datagram.left, index) not in self._arrived:
            self._not_echoed(datagram, device, index)

    def _not_echoed(self, datagram: Datagram, device: Device, index: int) -> None:
        if device.sees_all:
            what = NAMES[datagram.payload[0]]
            text = f"sent a {what} with receiver index {index:#010x}, which no message to it had as its sender index"
            self._violates("MSG-11", device, datagram, text)

    # Data

    def _data(self, datagram: Datagram) -> None:
        payload = datagram.payload
        index = int.from_bytes(payload[4:8], "little")
        session = self._sessions.get((datagram.left, index))
        device = self._by_port(datagram)
        if device is None:
            return
        self._count(device, DATA)
        if session is None or session.device is not device:
            if device.sees_all:
                text = f"sent data with receiver index {index:#010x}, which no peer has chosen in a handshake with it"
                self._violates("DT-02", device, datagram, text)
            return
        length = len(payload) - KEEPALIVE_SIZE
        if length % _BLOCK and length < device.least_mtu:
            text = f"sent a plaintext of {length} bytes, not padded to a multiple of 16"
            self._violates("MSG-12", device, datagram, text)
        if session.is_ambiguous:
            return
        if (key := self._transport_keys.get(index)) is not None:
            self._judge_inside(datagram, device, key)
        self._judge_counter(datagram, session, counter_of(payload))
        age = datagram.time - session.time
        if age > _REJECT_AFTER_TIME + _AGE_TOLERANCE:
            text = f"sent data on a session that is {age / NANOSECONDS:.1f} s old, not below 180 s"
            self._violates("DT-21", device, datagram, text)
        self.checked[device.name, "HS-24"] += device.sees_all and not session.is_initiator
        if not session.is_confirmed:
            text = "sent data as the responder of a session before any data of the initiator had confirmed it"
            self._violates("HS-24", device, datagram, text)

    def _judge_inside(self, datagram: Datagram, device: Device, key: bytes) -> None:
        self.checked[device.name, "CR-14"] += 1
        plaintext = inner.open_data(key, datagram.payload)
        if plaintext is None:
            text = "sent data that does not authenticate with the keys of its session"
            self._violates("CR-14", device, datagram, text)
        elif any(padding := plaintext[len(inner.packet_of(plaintext)) :]):
            text = f"padded a packet with {padding.lstrip(bytes(1)).hex()[:32]}, not with zeros"
            self._violates("MSG-12", device, datagram, text)

    def _judge_counter(self, datagram: Datagram, session: _Session, counter: int) -> None:
        device, expected = session.device, session.expected
        if counter == expected:
            session.expected += 1
            return
        if counter > expected:
            session.missing.update(range(expected, min(counter, expected + _MOST_MISSING)))
            session.expected = counter + 1
            if not session.has_gap:
                session.has_gap = True
                text = f"sent data with counter {counter}, where {expected} was next"
                self.gaps.append(Finding("DT-01", device.name, text, datagram, since=session.time))
            return
        if counter in session.missing:
            session.missing.discard(counter)
            text = f"sent data with counter {counter} after counter {expected - 1}"
        else:
            text = f"sent data with counter {counter} for the second time in a session"
        self._violates("DT-01", device, datagram, text)


# Counters of a gap that are remembered, to distinguish a late one from one that is used twice.
_MOST_MISSING: Final = 1 << 13


def _field(kind: int, name: str, payload: bytes) -> bytes:
    start, end = FIELDS[kind][name]
    return payload[start:end]


def _an(kind: int) -> str:
    name = NAMES[kind]
    return f"an {name}" if name[0] in "aeiou" else f"a {name}" if kind != DATA else name
