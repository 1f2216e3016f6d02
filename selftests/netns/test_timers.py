"""Check rekey, keepalives, retries, rejection and erasure over time (`loopback`, `nat`)."""

from __future__ import annotations

import os
import socket
import struct
import time
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from harness import (
    DATA,
    INITIATION,
    RESPONSE,
    V4_OF_A,
    V4_OF_B,
    Capture,
    Datagram,
    differs,
    let_pass,
    ping,
    slack,
    steps,
    twin,
    udp_message,
    udp_receiver,
    wait_for,
)
from harness.lanes import LANE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Message, Tunnel

pytestmark = pytest.mark.waiting

SECOND = 1_000_000_000
REKEY_AFTER_TIME = 120
REJECT_AFTER_TIME = 180
# Session ages at which an initiator would rekey: when it sends, and at the last two also when it receives.
NO_RESPONDER_REKEY = (121, 166, 178)
KEEPALIVE_TIMEOUT = 10
REKEY_TIMEOUT = 5
# Seconds after which a side that has sent data and received nothing initiates (TM-16).
NEW_HANDSHAKE = KEEPALIVE_TIMEOUT + REKEY_TIMEOUT
MAX_JITTER = 1 / 3
INITIATIONS_OF_A_SERIES = 20
DISCARD = 9
PORT_OF_A, PORT_OF_B = 1, 2
# Bounds of the last initiation of a series, in seconds after the first (TM-04): a retry before 90 s, or the twentieth.
LAST_RETRY = (84, 110)
GIVEN_UP = 120
ERASURE = 3 * REJECT_AFTER_TIME
# The timer wheel of Linux may be an eighth of a duration late.
COARSE = 1 / 8
INTERVAL = 25
MAPPING = 30
HOUR = 3600
# Seconds by which a keepalive may be early: some programs read their clock four times a second.
TICK = 0.25


@pytest.fixture
def wire(loopback: Tunnel) -> Iterator[Capture]:
    """A capture of both sides, with a session that A initiated."""
    with Capture(loopback.nodes["ns0"], "lo") as capture:
        loopback.must_ping("ns1", V4_OF_B)
        yield capture


def initiations(wire: Capture, port: int, after: int = 0) -> list[Message]:
    return [message for message in wire.messages(kind=INITIATION, port=port) if message.time > after]


def session_start(wire: Capture) -> int:
    """Return when the first initiation was sent, in ns."""
    return wire.messages(kind=INITIATION)[0].time


def longest_retry() -> float:
    """Return the seconds between an initiation and its retry, at most (TM-01)."""
    return REKEY_TIMEOUT + MAX_JITTER + slack(REKEY_TIMEOUT)


def drop(loopback: Tunnel, condition: str) -> None:
    """Drop every datagram that meets the condition."""
    chain = f"type filter hook input priority 0\n{condition} counter drop"
    loopback.nodes["ns0"].nft(f"table inet cut {{\nchain input {{\n{chain}\n}}\n}}\n")


@pytest.mark.requirement("TM-07")
def test_initiator_rekeys_when_it_sends_after_two_minutes(loopback: Tunnel, wire: Capture) -> None:
    # wireguard-go may start its timers of 15 s and 5 s after the answer has come. Then it initiates when they expire.
    let_pass(NEW_HANDSHAKE + slack(NEW_HANDSHAKE) + longest_retry(), "late timers of A have expired")
    start = initiations(wire, PORT_OF_A)[-1].time
    let_pass(start / SECOND + REKEY_AFTER_TIME - 5 - time.time(), "the session is not old enough")
    loopback.must_ping("ns1", V4_OF_B)
    assert not initiations(wire, PORT_OF_A, after=start), "rekeyed too early"
    let_pass(6, "now the session is old enough")
    loopback.must_ping("ns1", V4_OF_B)
    again = wire.wait_for(lambda m: m.kind == INITIATION and m.time > start, 2.0, "A to rekey when it has sent")
    assert again.source[1] == PORT_OF_A, f"{(again.time - start) // SECOND} s after A's initiation B sends one"
    age = (again.time - start) / SECOND
    assert age >= REKEY_AFTER_TIME, f"A rekeys {age:.3f} s after its initiation"


@pytest.mark.requirement("TM-08", "DT-21")
@pytest.mark.bug("IB-06")
def test_responder_initiates_only_when_session_has_expired(loopback: Tunnel, wire: Capture) -> None:
    start = session_start(wire)
    with udp_receiver(loopback.nodes["ns2"], V4_OF_B, 1111) as receiver:
        send_to_b(loopback, receiver)
        # A rekeys as soon as it sends; B must not get its initiations.
        drop(loopback, f"udp sport {PORT_OF_A} udp length {8 + 148}")
        age = 1
        for then in NO_RESPONDER_REKEY:
            let_pass(then - age, "the session grows old")
            udp_message(loopback.nodes["ns2"], V4_OF_A, DISCARD, b"by B")
            send_to_b(loopback, receiver)
            age = then + 1
    let_pass(REJECT_AFTER_TIME + 1 - age, "the session expires")
    udp_message(loopback.nodes["ns2"], V4_OF_A, DISCARD, b"by B")
    let_pass(1, "it initiates at once")
    sent = [m for m in wire.messages(port=PORT_OF_B) if m.time > start + SECOND and not m.is_keepalive]
    begun = [(m.time - start) / SECOND for m in sent if m.kind == INITIATION]
    assert not begun or min(begun) >= REJECT_AFTER_TIME, f"B initiates {min(begun):.3f} s after A"
    ages = [((m.time - start) // SECOND, m.kind) for m in sent][: len(NO_RESPONDER_REKEY) + 1]
    assert ages == [*((age, DATA) for age in NO_RESPONDER_REKEY), (REJECT_AFTER_TIME + 1, INITIATION)]


def send_to_b(loopback: Tunnel, receiver: socket.socket) -> None:
    """Send a datagram from A to B, one second after B has sent one; B must not initiate 15 s later (TM-16).

    An answer that comes at once, such as an ICMP error, may come too early: wireguard-go starts the timer of 15 s after
    it has sent, so an earlier answer does not stop it.
    """
    let_pass(1, "B has started its timer")
    udp_message(loopback.nodes["ns1"], V4_OF_B, 1111, b"by A")
    wait_for(Datagram(receiver), 2.0, "A's datagram to arrive")


@pytest.mark.requirement("TM-10", "TM-11")
@pytest.mark.bug("IB-11", "IB-12")
def test_keepalive_answers_data_after_ten_seconds(loopback: Tunnel, wire: Capture) -> None:
    with udp_receiver(loopback.nodes["ns1"], V4_OF_A, 1111):
        let_pass(KEEPALIVE_TIMEOUT + slack(KEEPALIVE_TIMEOUT), "the keepalive for the ping's answer has been sent")
        before = wire.messages()[-1].time
        udp_message(loopback.nodes["ns2"], V4_OF_A, 1111, b"no answer to this")
        data = wire.wait_for(lambda m: m.kind == DATA and m.time > before, 2.0, "B's datagram to be sent")
        let_pass(2 * (KEEPALIVE_TIMEOUT + slack(KEEPALIVE_TIMEOUT)) + 1, "A's keepalive, then B's, which must not come")
    answers = [m for m in wire.messages(port=PORT_OF_B) if m.is_keepalive and m.time > data.time]
    assert not answers, f"B answers a keepalive by {answers[0]}"
    keepalives = [m for m in wire.messages(port=PORT_OF_A) if m.is_keepalive and m.time > data.time]
    (after,) = [(m.time - data.time) / SECOND for m in keepalives]
    late = after - KEEPALIVE_TIMEOUT
    assert 0 <= late <= slack(KEEPALIVE_TIMEOUT), f"the keepalive comes {after:.2f} s after the data"


@pytest.mark.requirement("TM-01", "TM-03", "TM-04")
@pytest.mark.bug("IB-18")
def test_unanswered_initiation_is_sent_twenty_times_and_no_more(loopback: Tunnel) -> None:
    drop(loopback, f"udp dport {PORT_OF_B}")
    with Capture(loopback.nodes["ns0"], "lo") as wire:
        udp_message(loopback.nodes["ns1"], V4_OF_B, DISCARD, b"not received")
        let_pass((INITIATIONS_OF_A_SERIES + 6) * longest_retry(), "all retries")
        sent = initiations(wire, PORT_OF_A)
    gaps = [(b.time - a.time) / SECOND for a, b in pairwise(sent)]
    assert min(gaps) >= REKEY_TIMEOUT
    assert max(gaps) <= longest_retry()
    last = (sent[-1].time - sent[0].time) / SECOND
    assert LAST_RETRY[0] <= last <= LAST_RETRY[1]
    if len(sent) != INITIATIONS_OF_A_SERIES:
        how = f"{len(sent)} initiations in {last:.0f} s, not {INITIATIONS_OF_A_SERIES}"
        differs(how, by=[loopback.a.manifest.name], requirement="TM-03")


@pytest.mark.requirement("ROB-09")
def test_wall_clock_set_back_blocks_handshakes_but_not_session(loopback: Tunnel, wire: Capture) -> None:
    with wall_clock_off_by(-HOUR):
        let_pass(REKEY_AFTER_TIME, "the session grows old enough")
        loopback.must_ping("ns1", V4_OF_B)
        let_pass(2 * (REKEY_TIMEOUT + 1), "A initiates, and retries")
        loopback.must_ping("ns1", V4_OF_B)
        begun = len(wire.messages(kind=INITIATION, port=PORT_OF_B))
        assert not begun, f"the test proved nothing: B initiated {begun} sessions, so A need not"
        refused = len(wire.messages(kind=INITIATION, port=PORT_OF_A)) - 1
        answered = len(wire.messages(kind=RESPONSE, port=PORT_OF_B)) - 1
    assert refused, "A does not rekey"
    if answered:
        # A's timestamps come from a clock that clock_settime(2) does not change.
        how = f"a wall clock that is set back does not change A's timestamps: B answers {answered} of {refused}"
        differs(how, by=[loopback.a.manifest.name])
    let_pass(REKEY_TIMEOUT + 1, "A initiates again")
    assert len(wire.messages(kind=RESPONSE, port=PORT_OF_B)) == 2
    loopback.must_ping("ns1", V4_OF_B)


@contextmanager
def wall_clock_off_by(seconds: int) -> Iterator[None]:
    """Set the wall clock wrong for the block. Only guests run this, because a guest's clock affects no other run."""
    assert os.environ[LANE] == "warp"
    steps.record("", f"set the clock {seconds:+} s")
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)
    try:
        yield
    finally:
        time.clock_settime(time.CLOCK_REALTIME, time.time() - seconds)
        steps.record("", f"set the clock {-seconds:+} s")


@pytest.mark.requirement("DT-21")
def test_data_is_not_sent_on_session_older_than_three_minutes(loopback: Tunnel, wire: Capture) -> None:
    start = session_start(wire)
    drop(loopback, "udp length { 100, 156 }")
    let_pass(REJECT_AFTER_TIME - 10, "the session is still good")
    loopback.must_ping("ns1", V4_OF_B)
    let_pass(12, "the session is past its end")
    pings = ping(loopback.nodes["ns1"], V4_OF_B, count=2)
    assert pings.lost == 2
    late = [m for m in wire.messages(kind=DATA) if m.time - start > (REJECT_AFTER_TIME + 1) * SECOND]
    assert not late, f"sent under an expired key: {late[0]}"
    assert initiations(wire, PORT_OF_A, after=start + REJECT_AFTER_TIME * SECOND), "A does not initiate another session"


# TM-27 limits how long keys may live; a program may erase them earlier, which the first row finds.
@pytest.mark.parametrize(
    "late",
    [
        pytest.param(False, id="in-time"),
        pytest.param(True, id="too-late", marks=pytest.mark.requirement("TM-27")),
    ],
)
def test_pending_handshake_is_erased_after_nine_minutes(loopback: Tunnel, late: bool) -> None:
    drop(loopback, f"udp dport {PORT_OF_A}")
    with Capture(loopback.nodes["ns0"], "lo") as wire:
        udp_message(loopback.nodes["ns1"], V4_OF_B, DISCARD, b"no response comes")
        let_pass(GIVEN_UP, "A has given up")
        response = wire.messages(kind=RESPONSE, port=PORT_OF_B)[-1]
        assert response.time - session_start(wire) > (REKEY_TIMEOUT + 1) * SECOND, "A did not try again"
        let_pass(ERASURE * (1 + COARSE) if late else ERASURE - GIVEN_UP, "the wait for the erasure")
        loopback.nodes["ns0"].nft("delete table inet cut")
        deliver(loopback, response)
        let_pass(1, "if A accepted the response, it would confirm the session at once")
        confirmed = [m for m in wire.messages(kind=DATA, port=PORT_OF_A) if m.time > response.time]
    if not (late or confirmed):
        loopback.must_ping("ns1", V4_OF_B)
        how = f"A erases its pending handshake in less than {ERASURE} s, and completes a new one"
        differs(how, by=[loopback.a.manifest.name])
    assert len(confirmed) == (0 if late else 1)


def deliver(loopback: Tunnel, message: Message) -> None:
    """Send a captured datagram again, from its source address."""
    udp = struct.pack(">4H", message.source[1], message.destination[1], 8 + len(message.payload), 0) + message.payload
    ends = socket.inet_aton(message.source[0]) + socket.inet_aton(message.destination[0])
    # The kernel fills in length and checksum of the IP header; UDP over IPv4 may go without.
    header = struct.pack(">BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0) + ends
    with loopback.nodes["ns0"].socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(header + udp, (message.destination[0], 0))


@pytest.mark.requirement("TM-20", "TM-17")
@pytest.mark.bug("IB-10")
@pytest.mark.capability("persistent-keepalive")
def test_persistent_keepalive_leaves_no_gap_in_one_hour(loopback: Tunnel, wire: Capture) -> None:
    # A program may start its timer for sent data after the keepalive for that data has come. Wait until it expires.
    let_pass(KEEPALIVE_TIMEOUT + slack(KEEPALIVE_TIMEOUT), "the keepalive for the ping's answer has been sent")
    loopback.keep_alive(INTERVAL)
    let_pass(HOUR, "keepalives, and a new session every two minutes")
    sent = [m.time / SECOND for m in wire.messages(port=PORT_OF_A)]
    assert max(b - a for a, b in pairwise(sent)) <= INTERVAL + slack(INTERVAL)
    keepalives = [m.time / SECOND for m in wire.messages(port=PORT_OF_A) if m.is_keepalive]
    assert HOUR / (INTERVAL + slack(INTERVAL)) - 1 <= len(keepalives) <= HOUR / INTERVAL * 1.5
    repeated = len(repeated_initiations(wire))
    sessions = len(initiations(wire, PORT_OF_A, after=session_start(wire))) - repeated
    fewest, most = HOUR // (REKEY_AFTER_TIME + 2 * INTERVAL), HOUR // REKEY_AFTER_TIME
    assert fewest <= sessions <= most, f"{sessions} new sessions in an hour, not {fewest} to {most}"
    assert not initiations(wire, PORT_OF_B)
    how = f"A repeats {repeated} answered initiations after {REKEY_TIMEOUT} s, and begins {sessions} sessions"
    # That a response ends the retries is TM-33, and not what this test is about; it only bounds them.
    assert repeated <= sessions / 2, how
    loopback.lab.note("repeated.txt", f"{how}\n")


def repeated_initiations(wire: Capture) -> list[Message]:
    """Return the initiations of A that are retries (TM-01) although B has answered the one before.

    wireguard-go starts the retry's timer after it has sent, so an answer that comes earlier does not stop it.
    """
    answered = {response.payload[8:12] for response in wire.messages(kind=RESPONSE, port=PORT_OF_B)}
    return [
        second
        for first, second in pairwise(initiations(wire, PORT_OF_A))
        if first.payload[4:8] in answered and REKEY_TIMEOUT <= (second.time - first.time) / SECOND <= longest_retry()
    ]


@pytest.mark.requirement("TM-20", "TM-21")
@pytest.mark.capability("persistent-keepalive")
def test_authenticated_packets_delay_persistent_keepalive(loopback: Tunnel, wire: Capture) -> None:
    loopback.keep_alive(INTERVAL)
    let_pass(INTERVAL + slack(INTERVAL), "the keepalives for the ping's reply and for the new setting have been sent")
    last = wire.messages()[-1].time
    wire.wait_for(lambda m: m.is_keepalive and m.time > last, INTERVAL + slack(INTERVAL), "one more keepalive")
    let_pass(INTERVAL / 2, "half of the time until the next")
    loopback.must_ping("ns2", V4_OF_A)
    let_pass(2 * INTERVAL, "the ping postpones the next keepalive, and another one follows")
    recent = [message for message in wire.messages() if message.time >= last]
    gaps = [(kept.time - before.time) / SECOND for before, kept in pairwise(recent) if is_persistent(before, kept)]
    assert len(gaps) >= 2, "A's keepalives have ended"
    assert min(gaps) >= INTERVAL - TICK, f"a keepalive of A comes {min(gaps):.2f} s after the last message of either"


def is_persistent(before: Message, kept: Message) -> bool:
    """Return whether this is a keepalive of A that does not confirm a handshake."""
    return kept.source[1] == PORT_OF_A and kept.is_keepalive and before.kind == DATA


@pytest.mark.scenario("N20")
@pytest.mark.requirement("TM-20", "TM-25")
@pytest.mark.capability("persistent-keepalive")
def test_persistent_keepalive_keeps_nat_mapping_of_30_seconds(nat: Tunnel) -> None:
    for name in ("udp_timeout", "udp_timeout_stream"):
        nat.nodes["ns0"].sysctl(f"net.netfilter.nf_conntrack_{name}", MAPPING)
    nat.keep_alive(INTERVAL)
    nat.must_ping("ns1", V4_OF_B)
    let_pass(10 * MAPPING, "ten lifetimes of a mapping without traffic")
    nat.must_ping("ns2", V4_OF_A)
    nat.keep_alive(0)
    let_pass(KEEPALIVE_TIMEOUT + 2 * MAPPING, "the keepalive for the ping is sent, then the mapping expires")
    unreachable = ping(nat.nodes["ns2"], V4_OF_A).lost
    with twin("a packet from A makes a new mapping"):
        nat.must_ping("ns1", V4_OF_B)
        nat.must_ping("ns2", V4_OF_A)
    assert unreachable == 1
