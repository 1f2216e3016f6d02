"""Unit tests of `harness.wire.oracle`: what it reports of real conversations, and of each with one datagram changed.

The conversations are those of two devices of refwg in virtual time. Messages that no correct device sends are written
by the scripted peers' code.
"""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from harness.scripted.intents import CookieReply, Initiation
from harness.scripted.transcripts import Draw, write_cookie_reply, write_initiation
from harness.wire.messages import DATA, INITIATION, RESPONSE, with_mac1
from harness.wire.noise import index
from harness.wire.oracle import Datagram, Device, Oracle
from refwg.messages import SECOND
from refwg.noise import StaticIdentity, timestamp
from selftests.support.pair import START, Pair, private_key

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

A, B, C = (StaticIdentity.from_private(private_key(name)) for name in "ABC")
IDENTITIES = {"A": A, "B": B}
NODES, PORTS = {"A": "ns1", "B": "ns2"}, {"A": 1, "B": 2}
DEVICES = {
    name: Device(name=name, node=NODES[name], privates=(private_key(name),), ports=((0, PORTS[name]),), least_mtu=552)
    for name in "AB"
}
MS = 1_000_000
# A cookie, and the tag that it has as an initiation's answer.
COOKIE = bytes(range(16))


def datagram(sender: str, payload: bytes, at: int, *, port: int = 0, address: str = "") -> Datagram:
    """A datagram on the link of both nodes. at: ns since the beginning."""
    other = "B" if sender == "A" else "A"
    source = (f"10.0.0.{PORTS[sender]}", port or PORTS[sender])
    destination = (address or f"10.0.0.{PORTS[other]}", PORTS[other])
    return Datagram(START + at, NODES[sender], NODES[other], source, destination, payload, "link, frame 1")


def recorded(pair: Pair) -> list[Datagram]:
    return [datagram(sent.sender, sent.datagram, sent.time) for sent in pair.log]


@cache
def conversation() -> tuple[Datagram, ...]:
    """A begins; data both ways, a passive keepalive, a rekey by A after 120 s, data again."""
    pair = Pair()
    for sender in (pair.a, pair.b, pair.a, pair.b):
        pair.send(sender)
        pair.settle()
    pair.run(125 * SECOND)
    for sender in (pair.a, pair.b, pair.a):
        pair.send(sender)
        pair.settle()
    made = recorded(pair)
    assert len([one for one in made if one.payload[0] == INITIATION]) == 2
    return tuple(made)


def messages(kind: int, sender: str = "A") -> list[Datagram]:
    return [one for one in conversation() if one.payload[0] == kind and one.left == NODES[sender]]


def judged(datagrams: Sequence[Datagram], *devices: Device, **knowledge: Any) -> Oracle:
    oracle = Oracle(devices or tuple(DEVICES.values()), **knowledge)
    for one in datagrams:
        oracle.take(one)
    return oracle


def changed(one: Datagram, position: int, data: bytes) -> Datagram:
    payload = one.payload[:position] + data + one.payload[position + len(data) :]
    return one._replace(payload=payload)


def signed(one: Datagram, recipient: bytes) -> Datagram:
    return one._replace(payload=with_mac1(one.payload, recipient))


def in_place(old: Datagram, new: Datagram) -> list[Datagram]:
    return [new if one is old else one for one in conversation()]


def initiation(at: int = 0, *, stamp: bytes = b"", cookie: bytes = b"", message: Initiation | None = None) -> Datagram:
    """An initiation of A to B whose index and ephemeral follow from its time. at: seconds."""
    draw = Draw(
        identity=A,
        remote=B.public,
        ephemeral=struct.pack(">Q", at + 1) * 4,
        index=1000 + at,
        timestamp=stamp or timestamp(START + at * SECOND),
        preshared_key=bytes(32),
        cookie=cookie,
    )
    return datagram("A", write_initiation(message or Initiation(), draw).datagram, at * SECOND)


def cookie_reply(to: Datagram, at: int) -> Datagram:
    """The cookie reply of B to an initiation of A."""

    class Answered:
        sender_index = int.from_bytes(to.payload[4:8], "little")
        mac1 = to.payload[-32:-16]

    draw = Draw(
        identity=B, remote=A.public, ephemeral=bytes(32), index=0, timestamp=b"", preshared_key=bytes(32),
        nonce=bytes(24), value=COOKIE,
    )  # fmt: skip
    return datagram("B", write_cookie_reply(CookieReply(to=Answered()), draw).datagram, at * SECOND)


def stamped(seconds: int, nanoseconds: int) -> bytes:
    return struct.pack(">QI", 2**62 + 10 + START // SECOND + seconds, nanoseconds)


def data(index: int, counter: int, size: int = 32, *, sender: str = "A", at: int = 0) -> Datagram:
    return datagram(sender, struct.pack("<IIQ", DATA, index, counter).ljust(size, b"\xaa"), at)


FIRST, SECOND_INITIATION = messages(INITIATION)
ANSWER = messages(RESPONSE, "B")[0]
FIRST_DATA = messages(DATA)[0]
LAST_DATA = messages(DATA)[-1]
END = conversation()[-1].time - START


class Wrong(NamedTuple):
    """Datagrams with one violation: its requirement, the device that it is of, and the message."""

    requirement: str
    device: str
    message: str
    datagrams: Callable[[], list[Datagram]]


def more(*datagrams: Datagram) -> list[Datagram]:
    return [*conversation(), *datagrams]


WRONG = {
    "unknown-type": Wrong(
        "MSG-15", "A", "datagram of 40 bytes with type 5", lambda: more(datagram("A", b"\x05" + bytes(39), END))
    ),
    "empty": Wrong("MSG-15", "B", "datagram of 0 bytes with no type", lambda: more(datagram("B", b"", END))),
    "long-cookie-reply": Wrong(
        "MSG-15", "B", "a cookie reply of 65 bytes, not 64", lambda: more(datagram("B", b"\x03" + bytes(64), END))
    ),
    "reserved-bytes": Wrong("MSG-05", "A", "reserved bytes 000100", lambda: more(changed(LAST_DATA, 2, b"\x01"))),
    "long-initiation": Wrong(
        "MSG-01", "A", "an initiation of 149 bytes, not 148", lambda: more(datagram("A", FIRST.payload + b"x", END))
    ),
    "short-response": Wrong(
        "MSG-02", "B", "a response of 91 bytes, not 92", lambda: more(datagram("B", ANSWER.payload[:-1], END))
    ),
    "short-data": Wrong(
        "MSG-04", "A", "data of 31 bytes, not at least 32", lambda: more(datagram("A", FIRST_DATA.payload[:31], END))
    ),
    "other-static": Wrong(
        "MSG-01", "A", "static key does not authenticate",
        lambda: [signed(changed(FIRST, 50, b"\xff\xfe"), B.public)],
    ),
    "other-timestamp": Wrong(
        "MSG-01", "A", "timestamp does not authenticate",
        lambda: [signed(changed(FIRST, 95, b"\xff\xfe"), B.public)],
    ),
    "mac1-of-initiation": Wrong(
        "CK-01", "A", "an initiation whose mac1 over its first 116 bytes", lambda: [changed(FIRST, 120, b"\xff\xfe")]
    ),
    "mac1-of-response": Wrong(
        "CK-01", "B", "a response whose mac1 over its first 60 bytes",
        lambda: in_place(ANSWER, changed(ANSWER, 65, b"\xff\xfe")),
    ),
    "receiver-of-response": Wrong(
        "MSG-11", "B", "a response with receiver index 0x04030201",
        lambda: [FIRST, signed(changed(ANSWER, 8, b"\1\2\3\4"), A.public)],
    ),
    "receiver-of-cookie-reply": Wrong(
        "MSG-11", "B", "a cookie reply with receiver index 0x00000000",
        lambda: more(datagram("B", b"\x03" + bytes(63), END)),
    ),
    "same-ephemeral": Wrong(
        "CR-16", "A", "an initiation with the ephemeral key of an earlier message",
        lambda: [initiation(), initiation(6, message=Initiation(ephemeral_private=struct.pack(">Q", 1) * 4))],
    ),
    "same-message": Wrong(
        "CR-16", "A", "an initiation with the ephemeral key", lambda: [FIRST, FIRST._replace(time=FIRST.time + MS)]
    ),
    "same-index": Wrong(
        "CR-16", "A", "with the sender index of an earlier message, 0x000003e8",
        lambda: [initiation(), initiation(6, message=Initiation(sender_index=1000))],
    ),
    "two-indices-again": Wrong(
        "CR-16", "A", "with the sender index of an earlier message, 0x000003ee",
        lambda: [
            initiation(), initiation(6), initiation(12, message=Initiation(sender_index=1000)),
            initiation(18, message=Initiation(sender_index=1006)),
        ],
    ),
    "static-in-clear": Wrong(
        "HS-39", "A", "an initiation with a static public key in clear",
        lambda: [initiation(message=Initiation(ephemeral_private=A.private))],
    ),
    "mac2-without-cookie": Wrong(
        "CK-02", "A", "an initiation with a mac2 that no cookie it was given makes", lambda: [initiation(cookie=COOKIE)]
    ),
    "mac2-of-other-cookie": Wrong(
        "CK-02", "A", "with a mac2 that no cookie",
        lambda: [initiation(), cookie_reply(initiation(), 1), initiation(6, cookie=bytes(15) + b"\x01")],
    ),
    "mac2-of-forged-cookie": Wrong(
        "CK-02", "A", "with a mac2 that no cookie",
        lambda: [initiation(), changed(cookie_reply(initiation(), 1), 40, b"\xff\xfe"), initiation(6, cookie=COOKIE)],
    ),
    "mac2-of-strange-cookie": Wrong(
        "CK-02", "A", "with a mac2 that no cookie",
        lambda: [initiation(), cookie_reply(initiation(9), 1)._replace(left="ns3"), initiation(6, cookie=COOKIE)],
    ),
    "full-second-of-nanoseconds": Wrong(
        "CR-11", "A", "with 1000000000 ns, not below", lambda: [initiation(stamp=stamped(0, 1_000_000_000))]
    ),
    "other-base": Wrong(
        "CR-11", "A", "-121 s from the wall clock as TAI64N", lambda: [initiation(stamp=stamped(-121, 0))]
    ),
    "exact-timestamp": Wrong(
        "CR-12", "A", "with 5 ns, not a multiple of 2", lambda: [initiation(stamp=stamped(0, 5))]
    ),
    "earlier-timestamp": Wrong(
        "CR-11", "A", "-1.000 s from the one before, not later",
        lambda: [initiation(6), initiation(12, stamp=stamped(5, 0))],
    ),
    "equal-timestamp": Wrong(
        "CR-11", "A", "+0.000 s from the one before", lambda: [initiation(6), initiation(12, stamp=stamped(6, 0))]
    ),
    "spacing": Wrong("HS-14", "A", "4.000 s apart, not 5 s", lambda: [initiation(6), initiation(10)]),
    "other-port": Wrong(
        "MSG-19", "A", "from port 7, not from its listen port 1",
        lambda: [initiation()._replace(source=("10.0.0.1", 7))],
    ),
    "unknown-receiver": Wrong(
        "DT-02", "A", "data with receiver index 0x00000001, which no peer has chosen", lambda: more(data(1, 0, at=END))
    ),
    "index-of-own": Wrong(
        "DT-02", "B", "which no peer has chosen",
        lambda: more(datagram("B", FIRST_DATA.payload, END)),
    ),
    "counter-again": Wrong(
        "DT-01", "A", "with counter 0 for the second time", lambda: [*conversation()[:8], FIRST_DATA]
    ),
    "counter-late": Wrong(
        "DT-01", "A", "with counter 1 after counter 2",
        lambda: [
            FIRST, ANSWER,
            *(changed(FIRST_DATA, 8, bytes([counter])) for counter in (0, 2, 1)),
        ],
    ),
    "no-padding": Wrong(
        "MSG-12", "A", "a plaintext of 1 bytes",
        lambda: [FIRST, ANSWER, FIRST_DATA._replace(payload=FIRST_DATA.payload[:33])],
    ),
    "old-session": Wrong(
        "DT-21", "A", "on a session that is 186.0 s old",
        lambda: [FIRST, ANSWER, FIRST_DATA._replace(time=ANSWER.time + 186 * SECOND)],
    ),
    "before-confirmation": Wrong(
        "HS-24", "B", "before any data of the initiator had confirmed it",
        lambda: [FIRST, ANSWER, messages(DATA, "B")[0]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_oracle_reports_violation(case: str) -> None:
    requirement, device, message, datagrams = WRONG[case]
    findings = {(each.requirement, each.device): each for each in judged(datagrams()).findings}
    assert [*findings] == [(requirement, device)]
    assert re.search(re.escape(message), findings[requirement, device].message)


def device(name: str, **changes: Any) -> Device:
    return replace(DEVICES[name], **changes)


def without_port(name: str) -> Device:
    return device(name, ports=((0, 0),))


def via(port: int, datagrams: Sequence[Datagram]) -> list[Datagram]:
    """The datagrams again, a second later and from another port of the same node."""
    return [one._replace(time=one.time + SECOND, source=(one.source[0], port)) for one in datagrams]


class Right(NamedTuple):
    """Datagrams without a violation that can be proved, and what the oracle knows besides."""

    datagrams: Callable[[], list[Datagram]]
    devices: tuple[Device, ...] = ()
    knowledge: Mapping[str, Any] = MappingProxyType({})


RIGHT = {
    "conversation": Right(lambda: list(conversation())),
    "on-one-node": Right(
        lambda: [one._replace(left="ns0", reached="ns0") for one in conversation()],
        (device("A", node="ns0"), device("B", node="ns0")),
    ),
    "near-end-then-far-end": Right(
        lambda: [part for one in conversation() for part in (one._replace(reached=""), one._replace(left=""))]
    ),
    "replays-of-others": Right(lambda: [*conversation(), *via(9, conversation())]),
    "replays-by-node-without-device": Right(lambda: more(*(one._replace(left="ns3") for one in conversation()))),
    "response-again": Right(
        lambda: [FIRST, ANSWER, FIRST_DATA, ANSWER._replace(left="ns3"), changed(FIRST_DATA, 8, b"\x01")]
    ),
    "response-again-after-long-time": Right(
        lambda: [
            FIRST,
            ANSWER,
            ANSWER._replace(time=ANSWER.time + 400 * SECOND, left="ns3"),
            FIRST_DATA._replace(time=ANSWER.time + 401 * SECOND),
        ]
    ),
    "initiation-again": Right(lambda: [FIRST, FIRST._replace(left="ns3"), ANSWER]),
    "unknown-peer": Right(
        lambda: [signed(FIRST, C.public)], (device("A"),), {"knows_all_keys": False}
    ),
    "peer-without-private-key": Right(
        lambda: [signed(changed(FIRST, 50, b"\xff\xfe"), C.public)], (device("A"),), {"publics": [C.public]}
    ),
    "scripted-peer": Right(
        lambda: [changed(initiation(), 0, b"\x01")._replace(source=("10.0.0.1", 7))], (device("B", node="ns1"),),
        {"privates": [private_key("A")]},
    ),
    "port-before-it-is-set": Right(lambda: [LAST_DATA], (device("A", ports=((1 << 62, 1),)),)),
    "two-devices-of-one-port": Right(lambda: [LAST_DATA], (device("A"), device("B", node="ns1", ports=((0, 1),)))),
    "device-that-has-ended": Right(lambda: [initiation(), LAST_DATA, *via(9, [ANSWER])], (device("A", ended=0),)),
    "random-port": Right(lambda: list(conversation()), (without_port("A"), without_port("B"))),
    "links-that-are-not-captured": Right(
        lambda: [ANSWER, LAST_DATA, datagram("B", b"\x03" + bytes(63), END)],
        tuple(device(name, sees_all=False) for name in "AB"),
    ),
    "confirmation-by-link-that-is-not-captured": Right(
        WRONG["before-confirmation"].datagrams, tuple(device(name, sees_all=False) for name in "AB")
    ),
    "cookie-by-link-that-is-not-captured": Right(
        WRONG["mac2-without-cookie"].datagrams, tuple(device(name, sees_all=False) for name in "AB")
    ),
    "clock-that-was-set": Right(
        lambda: [initiation(6, stamp=stamped(-1000, 0)), initiation(7, stamp=stamped(-1001, 0))],
        (),
        {"has_steady_clock": False},
    ),
    "change-between-initiations": Right(
        lambda: [initiation(6), initiation(7)], (device("A", resets=(START + 7 * SECOND,)), device("B"))
    ),
    "first-initiation-left-late": Right(
        lambda: [initiation(4, stamp=stamped(0, 0)), initiation(5)]
    ),
    "equal-timestamps-at-once": Right(
        lambda: [initiation(6), initiation(7, stamp=stamped(6, 0))._replace(time=START + 6 * SECOND + MS)],
        (device("A", resets=(START + 6 * SECOND,)), device("B")),
    ),
    "boringtun-base": Right(lambda: [initiation(stamp=stamped(27, 0))]),
    "cookie": Right(lambda: [initiation(), cookie_reply(initiation(), 1), initiation(6, cookie=COOKIE)]),
    "mac2-to-unknown-peer": Right(
        lambda: [signed(initiation(cookie=COOKIE), C.public)], (device("A"),), {"knows_all_keys": False}
    ),
    "cookie-for-unknown-peer": Right(
        lambda: [signed(initiation(), C.public), cookie_reply(initiation(), 1), initiation(6, cookie=b"")],
        (device("A"), device("B")),
        {"knows_all_keys": False},
    ),
    "index-twice-by-chance": Right(
        lambda: [initiation(), initiation(6), initiation(12, message=Initiation(sender_index=1000))]
    ),
    "short-last-packet-of-small-mtu": Right(
        lambda: [FIRST, ANSWER, FIRST_DATA._replace(payload=FIRST_DATA.payload[:33])],
        (device("A", least_mtu=1), device("B")),
    ),
    "indices-of-two-sessions": Right(
        lambda: [FIRST, ANSWER, FIRST_DATA, initiation(6),
                 signed(changed(changed(ANSWER, 8, initiation(6).payload[4:8]), 20, b"\x01"), A.public)
                 ._replace(left="ns3"), changed(FIRST_DATA, 8, b"\x09")],
    ),
    "tiny-datagram-from-elsewhere": Right(lambda: more(datagram("B", b"\x01\0", END)._replace(left="ns3"))),
    "garbage-from-other-port": Right(lambda: more(datagram("B", b"\x09" * 40, END, port=9))),
    "cookie-reply-from-other-port": Right(lambda: more(datagram("B", b"\x03" + bytes(63), END, port=9))),
    "response-from-other-port": Right(lambda: [ANSWER._replace(source=("10.0.0.2", 9))]),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_oracle_reports_nothing_that_may_be_right(case: str) -> None:
    datagrams, devices, knowledge = RIGHT[case]
    assert judged(datagrams(), *devices, **knowledge).findings == []


@pytest.mark.parametrize(
    ("invariant", "count"),
    [("MSG-01", 2), ("MSG-19", 2), ("CR-11", 2), ("HS-14", 1), ("DT-01", 6), ("HS-24", 0), ("MSG-11", 0)],
)
def test_oracle_counts_what_it_judged_of_initiator(invariant: str, count: int) -> None:
    assert judged(conversation()).checked["A", invariant] == count


@pytest.mark.parametrize(("invariant", "count"), [("MSG-02", 2), ("MSG-11", 2), ("HS-24", 3), ("CK-01", 2)])
def test_oracle_counts_what_it_judged_of_responder(invariant: str, count: int) -> None:
    assert judged(conversation()).checked["B", invariant] == count


def test_oracle_names_first_datagram_of_violation() -> None:
    wrong = [datagram("A", b"\x07" * size, END + size, port=1)._replace(place=f"frame {size}") for size in (40, 41)]
    (finding,) = judged(more(*wrong)).findings
    assert finding.datagram.place == "frame 40"


def test_first_gap_of_each_session_is_told_apart() -> None:
    late = [changed(FIRST_DATA, 8, bytes([counter])) for counter in (3, 9, 1)]
    oracle = judged([FIRST, ANSWER, *late])
    assert [(gap.message, gap.since) for gap in oracle.gaps] == [
        ("sent data with counter 3, where 0 was next", ANSWER.time)
    ]
    assert [finding.message for finding in oracle.findings] == ["sent data with counter 1 after counter 9"]


def test_port_of_other_device_is_not_listen_port() -> None:
    devices = (device("A", node="ns0"), device("B", node="ns0"))
    wrong = initiation()._replace(left="ns0", source=("127.0.0.1", 2))
    (finding,) = judged([wrong], *devices).findings
    assert (finding.requirement, finding.device) == ("MSG-19", "A")


def inside(plaintext: bytes, key: bytes) -> list[Datagram]:
    """The first data of A with this plaintext, sealed with a key."""
    header = FIRST_DATA.payload[:16]
    sealed = ChaCha20Poly1305(key).encrypt(bytes(4) + header[8:], plaintext, None)
    return [FIRST, ANSWER, FIRST_DATA._replace(payload=header + sealed)]


@pytest.mark.parametrize(
    ("trailer", "found"),
    [(bytes(11), []), (b"\0" * 9 + b"\x01\x02", [("MSG-12", "A", "padded a packet with 0102, not with zeros")])],
    ids=["zeros", "other"],
)
def test_oracle_reads_padding_where_transport_keys_are_known(trailer: bytes, found: list[tuple[str, str, str]]) -> None:
    key = bytes(range(32))
    packet = bytes([0x45, 0, 0, 21]) + bytes(17)
    oracle = judged(inside(packet + trailer, key), transport_keys={index(FIRST_DATA.payload): key})
    assert [(finding.requirement, finding.device, finding.message) for finding in oracle.findings] == found
    assert oracle.checked["A", "CR-14"] == 1


def test_oracle_reports_data_that_its_key_does_not_open() -> None:
    key = {index(FIRST_DATA.payload): bytes(32)}
    (finding,) = judged(inside(bytes(32), b"k" * 32), transport_keys=key).findings
    assert (finding.requirement, finding.device) == ("CR-14", "A")
    assert finding.message == "sent data that does not authenticate with the keys of its session"


@pytest.mark.parametrize("is_authentic", [True, False])
def test_oracle_reports_response_that_logged_keys_do_not_open(is_authentic: bool) -> None:
    oracle = judged([FIRST, ANSWER], responses={ANSWER.payload: is_authentic})
    text = "sent a response that does not authenticate with the ephemeral and preshared key it has logged"
    assert [(finding.requirement, finding.device, finding.message) for finding in oracle.findings] == (
        [] if is_authentic else [("HS-20", "B", text)]
    )
    assert oracle.checked["B", "HS-20"] == 1
