"""Check the reprs of records: short, in words, without whole keys or raw bytes."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

import pytest

import harness
from harness import (
    AllowedIP,
    Arrivals,
    Delay,
    Device,
    DeviceConfig,
    DeviceState,
    Drop,
    Duplicate,
    End,
    Endpoint,
    Flip,
    Hold,
    Key,
    Message,
    NetNS,
    Pair,
    PeerConfig,
    PeerState,
    Pings,
    Plan,
    PolicyRule,
    Queue,
    Registry,
    Replay,
    Route,
    Rule,
    Script,
    Sighting,
    Veth,
    allowed_ips,
)
from harness.sandbox.process import Completed
from harness.scripted.intents import CookieReply, Initiation, Response
from harness.scripted.received import ReceivedInitiation
from harness.scripted.session import Session
from harness.wire.fragments import Arrival
from harness.wire.pcapng import Packet
from harness.wire.rules import Decision, Delivery
from refwg.crypto import Aead
from refwg.noise import Keypair, Transcript

pytest_plugins = ["pytester"]

# pytest cuts the middle out of a longer repr (_pytest._io.saferepr.DEFAULT_REPR_MAX_SIZE).
LONGEST = 240

SECRET = Key(bytes(range(0xE0, 0x100)))
PEER = PeerState(
    public_key=SECRET.public(),
    preshared_key=SECRET,
    endpoint=Endpoint.parse("[fd00:aa::1]:51820"),
    persistent_keepalive=25,
    latest_handshake=1_764_489_601_123_456_789,
    rx_bytes=1372,
    tx_bytes=1428,
    allowed_ips=allowed_ips("192.168.241.2/32", "fd00::2/128"),
)
CONFIG = PeerConfig(public_key=SECRET.public(), preshared_key=SECRET, allowed_ips=PEER.allowed_ips * 99, remove=True)
DATAGRAM = Message(time=1_764_489_601_123_456_789, source=("::1", 1), destination=("::1", 2), payload=b"\4\0\0\0" * 300)
RULES = (Drop(message="data"), Hold(nth=2), Delay(seconds=1.0), Flip(message="initiation", field="mac1", bit=3))

PEER_TEXT = (
    "PeerState(peer c2hF1U6H...=; preshared key 4OHi4+Tl...=; endpoint [fd00:aa::1]:51820; allowed ips "
    "192.168.241.2/32, fd00::2/128; latest handshake 1764489601.123; transfer 1372 B received, 1428 B sent; "
    "persistent keepalive every 25 seconds)"
)
CONFIG_TEXT = (
    "PeerConfig(peer c2hF1U6H...=; preshared key 4OHi4+Tl...=; allowed ips 192.168.241.2/32, fd00::2/128, "
    "192.168.241.2/32 and 195 more; remove)"
)


def node(name: str) -> NetNS:
    """A node without its namespace, which no repr needs."""
    bare = object.__new__(NetNS)
    bare.name = name
    return bare


ANSWERED = ReceivedInitiation(
    datagram=b"\xff" * 148,
    time=0,
    source=("::1", 1),
    at=("::1", 2),
    tos=0,
    sender_index=1,
    ephemeral=SECRET.raw,
    static=SECRET.raw,
    timestamp=bytes(12),
    mac1=bytes(16),
    mac2=bytes(16),
    transcript=Transcript.start(SECRET.raw),
)
SESSION = Session(
    Keypair(
        i_am_the_initiator=True,
        local_index=1,
        remote_index=2,
        sending=Aead(SECRET.raw),
        receiving=Aead(SECRET.raw),
        birthdate=0,
    )
)
RECORDS: list[Any] = [
    SECRET,
    AllowedIP.parse("10.0.0.0/8"),
    PEER.endpoint,
    PEER,
    CONFIG,
    DeviceState(private_key=SECRET, public_key=SECRET.public(), listen_port=51820, fwmark=3, peers=(PEER,) * 99),
    DeviceConfig(private_key=SECRET, listen_port=51820, fwmark=0, replace_peers=True, peers=(CONFIG,) * 99),
    Arrivals(5000, tuple(range(4999)), 1),
    Pings("192.168.241.1", sent=5000, answered={3: 0.1}),
    DATAGRAM,
    Sighting(message=DATAGRAM, sender="ns1", did="dropped", rule=1, arrival=Arrival(b"\xff" * 1500, "ARP")),
    Script(RULES * 9, seed=7),
    *RULES,
    Rule(),
    Duplicate(),
    Replay(behind=2),
    Registry().get("refwg"),
    Pair(Registry().get("refwg"), Registry().get("wireguard-go")),
    Plan(),
    harness.NAT,
    End("ns1", "veth1", ("192.168.1.1/24", "fd00:aa::1/96")),
    Route("ns1", "default", "192.168.1.1"),
    node("ns1"),
    Veth((node("ns1"), "veth1"), (node("ns2"), "veth2")),
    Device(node="ns0", device="br0", kind="bridge", members=("veth1", "veth2"), addresses=("192.168.1.1/24",)),
    Queue(node="ns0", device="veth1", kind="tbf", options={"rate": 1_000_000}),
    PolicyRule(node="ns1", fwmark=1, table=100),
    Completed(argv=("wg", "show", *"x" * 500), status=1, stdout="x" * 5000, stderr="\x1b[0m"),
    Arrival(b"\xff" * 1500, "ARP"),
    Delivery(b"\xff" * 1500, 1),
    Decision(DATAGRAM, "dropped", 1),
    Packet(0, 1, b"\xff" * 1500, True),
    Initiation(timestamp=b"\xff" * 12, mac1=bytes(16)),
    Response(to=ANSWERED, preshared_key=SECRET.raw),
    CookieReply(to=ANSWERED, value=b"\xff" * 16),
    SESSION,
    SESSION.data(b"\xff" * 1500),
    SESSION.keepalive(),
    ANSWERED,
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_record_has_short_repr_without_raw_bytes(record: Any) -> None:
    text = repr(record)
    assert len(text) <= LONGEST
    assert not [mark for mark in ("\\x", "raw=", " object at 0x", str(SECRET)) if mark in text]


def test_every_record_of_facade_is_tried() -> None:
    values = {name: getattr(import_module(module), name) for name, module in harness.NAMES.items()}
    records = {
        name
        for name, value in values.items()
        if isinstance(value, type) and (dataclasses.is_dataclass(value) or hasattr(value, "_fields"))
    }
    assert records
    assert records - {type(record).__name__ for record in RECORDS} == set()


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (SECRET, "Key(4OHi4+Tl...=)"),
        (PEER.endpoint, "Endpoint([fd00:aa::1]:51820)"),
        (allowed_ips("10.0.0.0/8", "-::/0"), "(AllowedIP(10.0.0.0/8), AllowedIP(-::/0))"),
        (PEER, PEER_TEXT),
        (PeerState(public_key=SECRET.public()), "PeerState(peer c2hF1U6H...=)"),
        (CONFIG, CONFIG_TEXT),
        (DeviceState(), "DeviceState(interface: (none))"),
        (
            DeviceState(private_key=SECRET, listen_port=51820, fwmark=10, peers=(PEER,)),
            "DeviceState(interface: private key 4OHi4+Tl...=; listening port 51820; fwmark 0xa; peers c2hF1U6H...=)",
        ),
        (DeviceConfig(listen_port=0, replace_peers=True), "DeviceConfig(listen port 0; replace peers)"),
        (Arrivals(2, (0, 0), 1), "Arrivals(1 of 2 datagrams arrived; 1 lost, 1 duplicated, 0 reordered, 1 broken)"),
        (Pings("::1", 12), "Pings(::1: 0 of 12 answered, not [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, and 2 more])"),
        (harness.NAT, "topology nat"),
        (Veth((node("ns1"), "veth1"), (node("ns2"), "veth2")), "ns1 veth1 - ns2 veth2"),
    ],
)
def test_repr_says_what_record_holds(record: object, text: str) -> None:
    assert repr(record) == text


def test_failed_assertion_about_keys_reveals_none(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from harness.control.records import DeviceState, Key, PeerState

        secret, other = Key(b"A" * 32), Key(b"A" * 31 + b"B")

        def test_key(): assert secret == other

        def test_state(): assert DeviceState(private_key=secret) == DeviceState(private_key=other)
        """
    )
    output = pytester.runpytest("-vv").stdout.str()
    assert "Key(QUFBQUFB...=)" in output
    assert not [text for text in (str(Key(b"A" * 32)), "AAAAAAAA") if text in output]
