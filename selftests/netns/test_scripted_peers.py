"""Send replays and malformed messages from scripted peers, and hold a thousand sessions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from harness import (
    COOKIE_REPLY,
    DATA,
    INITIATION,
    RESPONSE,
    ZERO_KEY,
    differs,
    let_pass,
    twin,
)
from harness.lanes import GUESTS, LANE
from harness.wire.messages import (
    FIELDS,
    counter_of,
    with_mac1,
)
from selftests.support.scripted import Scripted, Stage

if TYPE_CHECKING:
    from harness import Lab, Manifest

NEWEST = 100_000
WINDOW = 8128
# Windows of other programs and machines; each is correct if it accepts every counter in it once.
ALSO_KNOWN = {8191: "that of GotaTun", 8160: "that of 32-bit kernels", 1023: "that of boringtun"}
# Distances of a message's counter from the newest one: at the edges of all these windows.
BEHIND = (8192, 8191, 8161, 8160, 8129, 8128, 8127, 1024, 1023, 1)
AT_ONCE = 5.0
MACS, RECEIVER = FIELDS[INITIATION]["mac1"][0], FIELDS[DATA]["receiver"][0]
LOAD_IS_OVER = 1.5
PEERS = 1000
PATIENCE = 60.0


@pytest.mark.requirement("DT-05", "DT-03")
@pytest.mark.bug("IB-44", "IB-45")
def test_replay_window_accepts_each_counter_once_and_no_older(lab: Lab, implementation: Manifest) -> None:
    peer = Scripted(1)
    stage = Stage(lab, implementation, [peer])
    stage.exchange(b"a session", AT_ONCE)
    peer.count_from(NEWEST)
    stage.exchange(b"the newest", AT_ONCE)
    for behind in BEHIND * 2:
        peer.count_from(NEWEST - behind)
        stage.send(peer, str(behind).encode())
    # A tunnel keeps order: no earlier message can arrive after this one.
    peer.count_from(NEWEST + 1)
    with twin("a message with a new counter is delivered"):
        stage.send(peer, b"the end")
        stage.wait_for(lambda: stage.arrived[-1] == b"the end", AT_ONCE, "the last message")
    taken = [int(data) for data in stage.arrived[2:-1]]
    window = max(taken, default=0)
    assert taken == [behind for behind in BEHIND if behind <= window], (
        "a counter in the window was accepted twice or not at all"
    )
    if window in ALSO_KNOWN:
        differs(
            f"the window is {window}, {ALSO_KNOWN[window]}, not {WINDOW}", by=[implementation.name], requirement="DT-05"
        )
    assert window == WINDOW


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param("length", marks=pytest.mark.requirement("MSG-07", "MSG-08", "MSG-10")),
        pytest.param("type", marks=pytest.mark.requirement("MSG-06", "MSG-09", "ROB-10")),
        pytest.param("recipient", marks=pytest.mark.requirement("HS-06", "DT-12")),
    ],
)
def test_message_of_wrong_length_type_or_peer_is_not_answered(lab: Lab, implementation: Manifest, wrong: str) -> None:
    first, last, other, stranger = (Scripted(number) for number in range(1, 5))
    stage = Stage(lab, implementation, [first, last, other])
    target = lab.key("key1").public()
    stranger.add_target(target)
    stage.send(first, b"a session")
    stage.wait_for(lambda: stage.answers == 1, AT_ONCE, "an answer")
    if first.cookies:
        let_pass(LOAD_IS_OVER, "the driver answers by cookie replies until its load from another test is over")
    before = stage.wg0.peer(other.public_key)
    (initiation,), (unknown,), (data,) = (
        other.encapsulated(b""),
        stranger.encapsulated(b""),
        first.encapsulated(b"as it was"),
    )
    for datagram in malformed_messages(initiation, data, unknown, target.raw)[wrong]:
        stage.send_datagram(datagram)
    stage.send(last, b"after all these")
    stage.wait_for(lambda: last.received == [b"after all these"], AT_ONCE, "an answer to the last message")
    assert stage.unowned == [], "a malformed message was answered"
    assert stage.arrived == [b"a session", b"after all these"], "a malformed message was delivered"
    seen = stage.wg0.peer(other.public_key)
    assert seen.rx_bytes == before.rx_bytes, f"a malformed message was counted: {seen.rx_bytes - before.rx_bytes} bytes"
    assert seen.endpoint is None, f"a malformed message moved the endpoint to {seen.endpoint}"
    with twin("the unchanged initiation and data are answered"):
        stage.send_datagram(initiation)
        stage.send_datagram(data)
        stage.wait_for(
            lambda: len(stage.unowned) == 1 and len(first.received) > 1, AT_ONCE, "a response, and an answer"
        )
    assert stage.unowned == ["response"]


def malformed_messages(initiation: bytes, data: bytes, unknown: bytes, target: bytes) -> dict[str, list[bytes]]:
    """Return initiations and data messages with one thing wrong each, and a valid mac1 where there is one."""
    # A program that does not check the length may find the macs at their offset, or before the end.
    longer = initiation[:MACS] + b"\0" + initiation[MACS:]
    return {
        "length": [
            *(initiation[:size] for size in (0, 1, 3, 4, 31, 32, 92, 147)),
            initiation + b"\0",
            with_mac1(longer, target),
            *(data[:size] for size in (4, 8, 15, 16, 31)),
        ],
        "type": [
            *(with_mac1(with_byte(initiation, at, 1), target) for at in (1, 2, 3)),
            *(
                with_mac1(with_byte(initiation, 0, kind), target)
                for kind in (0, RESPONSE, COOKIE_REPLY, DATA, 5, 129, 255)
            ),
            *(with_byte(data, at, 1) for at in (1, 2, 3)),
            *(with_byte(data, 0, kind) for kind in (0, INITIATION, RESPONSE, COOKIE_REPLY, 5, 132, 255)),
        ],
        "recipient": [
            unknown,
            with_byte(data, RECEIVER, data[RECEIVER] ^ 1),
        ],
    }


def with_byte(message: bytes, offset: int, value: int) -> bytes:
    """Return the message with another byte at this offset."""
    return message[:offset] + bytes([value]) + message[offset + 1 :]


@pytest.mark.requirement("CR-17", "CR-15", "HS-03")
def test_handshake_without_preshared_key_mixes_zeros(lab: Lab, implementation: Manifest) -> None:
    # No peer here has a preshared key; the first one's is then set to 32 zero bytes, which must change nothing.
    first, second = Scripted(1), Scripted(2)
    stage = Stage(lab, implementation, [first])
    counters: list[int] = []
    stage.on_data = lambda message: counters.append(counter_of(message))
    stage.exchange(b"no key", AT_ONCE)
    assert first.received == [b"no key"], f"the initiator opened {first.received} under the responder's sending key"
    assert counters[:1] == [0], f"the responder's first data message has the counter {counters[0]}, not 0"
    stage.add(second, preshared_key=ZERO_KEY)
    stage.exchange(b"a key of zeros", AT_ONCE)
    assert second.received == [b"a key of zeros"], (
        "a peer with a preshared key of zeros has no session with one without"
    )
    wrong = stage.wg0.peer(second.public_key).preshared_key
    assert wrong is None, f"a preshared key of zeros is reported as {wrong}"


@pytest.mark.long_in_guest
@pytest.mark.requirement("ROB-11")
def test_thousand_peers_keep_sessions_and_get_own_replies(lab: Lab, implementation: Manifest) -> None:
    if os.environ.get(LANE) in GUESTS and implementation.kind != "kernel":
        pytest.skip(f"a thousand peers of {implementation.name} take minutes where the processor is emulated")
    stage = Stage(lab, implementation, [Scripted(number) for number in range(1, PEERS + 1)])
    stage.exchange(b"a session", PATIENCE)
    # Again, now that all sessions exist.
    stage.exchange(b"again", PATIENCE)
    assert all(peer.received == [b"a session", b"again"] for peer in stage.peers), "an answer went to another peer"
    states = stage.wg0.get().peers
    assert {state.public_key for state in states} == {peer.public_key for peer in stage.peers}
    assert all(state.latest_handshake for state in states), "a peer has no latest handshake"
