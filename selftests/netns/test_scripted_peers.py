"""What an interface makes of peers whose every message is the test's own choice (`scripted`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from harness.lanes import GUESTS, LANE
from harness.messages import COOKIE_REPLY, DATA, RESPONSE, with_mac1
from harness.verdicts import differs, twin
from harness.wait import let_pass
from selftests.netns.scripted import Scripted, Stage

if TYPE_CHECKING:
    from harness.implementation import Manifest
    from harness.lab import Lab

NEWEST = 100_000
WINDOW = 8128
# Windows of other programs and machines: any is right that forgets no counter within it.
ALSO_KNOWN = {8191: "that of GotaTun", 8160: "that of 32-bit kernels", 1023: "that of boringtun"}
# At the edges of all these: how far behind the newest message one comes.
BEHIND = (8192, 8191, 8161, 8160, 8129, 8128, 8127, 1024, 1023, 1)
AT_ONCE = 5.0
LOAD_IS_OVER = 1.5
PEERS = 1000
PATIENCE = 60.0


@pytest.mark.requirement("DT-05", "DT-03")
def test_messages_within_the_window_are_taken_once_and_older_ones_never(lab: Lab, implementation: Manifest) -> None:
    peer = Scripted(1)
    stage = Stage(lab, implementation, [peer])
    stage.converse(b"a session", AT_ONCE)
    peer.count_from(NEWEST)
    stage.converse(b"the newest", AT_ONCE)
    for behind in BEHIND * 2:
        peer.count_from(NEWEST - behind)
        stage.say(peer, str(behind).encode())
    # Nothing overtakes anything in a tunnel, so behind this one no other can come.
    peer.count_from(NEWEST + 1)
    with twin("a message with a counter that is new arrives"):
        stage.say(peer, b"the end")
        stage.wait_for(lambda: stage.arrived[-1] == b"the end", AT_ONCE, "the last message")
    taken = [int(data) for data in stage.arrived[2:-1]]
    window = max(taken, default=0)
    assert taken == [behind for behind in BEHIND if behind <= window], "not once, or not all of them"
    if window in ALSO_KNOWN:
        differs(f"the window is {window}, {ALSO_KNOWN[window]}, not {WINDOW}", by=[implementation.name])
    assert window == WINDOW


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param("length", marks=pytest.mark.requirement("MSG-07", "MSG-08", "MSG-10")),
        pytest.param("type", marks=pytest.mark.requirement("MSG-06", "MSG-09", "ROB-10")),
        pytest.param("recipient", marks=pytest.mark.requirement("HS-06", "HS-17")),
    ],
)
def test_what_is_no_message_for_it_is_not_answered(lab: Lab, implementation: Manifest, wrong: str) -> None:
    first, last, other, stranger = (Scripted(number) for number in range(1, 5))
    stage = Stage(lab, implementation, [first, last, other])
    target = lab.key("key1").public()
    stranger.know(target)
    stage.say(first, b"a session")
    stage.wait_for(lambda: stage.answers == 1, AT_ONCE, "an answer")
    if first.cookies:
        let_pass(LOAD_IS_OVER, "the driver still knows of another test's flood, and asks everyone for a cookie")
    (initiation,), (unknown,) = other.say(b""), stranger.say(b"")
    for datagram in no_messages(initiation, unknown, target.raw)[wrong]:
        stage.throw(datagram)
    stage.say(last, b"behind all these")
    stage.wait_for(lambda: stage.answers == 2, AT_ONCE, "an answer to what came last")
    assert stage.unowned == [], "one of them was answered"
    with twin("the initiation as it was is answered"):
        stage.throw(initiation)
        stage.wait_for(lambda: len(stage.unowned) == 1, AT_ONCE, "a response")
    assert stage.unowned == ["response"]


def no_messages(initiation: bytes, unknown: bytes, target: bytes) -> dict[str, list[bytes]]:
    """What looks like an initiation, or like another message, but for one thing; mac1, if there is one, is right."""
    return {
        "length": [
            *(initiation[:size] for size in (0, 1, 3, 4, 31, 32, 92, 147)),
            initiation + b"\0",
            *(bytes([kind]) + initiation[1:] for kind in (RESPONSE, COOKIE_REPLY)),
            *(bytes([DATA]) + initiation[1:size] for size in (15, 16, 31)),
        ],
        "type": [
            *(with_mac1(initiation[:at] + b"\1" + initiation[at + 1 :], target) for at in (1, 2, 3)),
            *(bytes([kind]) + initiation[1:] for kind in (0, 5, 129, 255)),
        ],
        "recipient": [
            unknown,
            with_mac1(bytes([RESPONSE]) + initiation[1:92], target),
            bytes([COOKIE_REPLY]) + initiation[1:64],
            bytes([DATA]) + initiation[1:],
        ],
    }


@pytest.mark.requirement("ROB-11")
def test_thousand_peers_have_sessions_and_are_answered(lab: Lab, implementation: Manifest) -> None:
    if os.environ.get(LANE) in GUESTS and implementation.kind != "kernel":
        pytest.skip(f"a thousand peers of {implementation.name} take minutes where the processor is emulated")
    stage = Stage(lab, implementation, [Scripted(number) for number in range(1, PEERS + 1)])
    stage.converse(b"a session", PATIENCE)
    # Now that there are all of them.
    stage.converse(b"again", PATIENCE)
    assert all(peer.heard == [b"a session", b"again"] for peer in stage.peers), "an answer went to another peer"
    states = stage.wg0.get().peers
    assert {state.public_key for state in states} == {peer.public_key for peer in stage.peers}
    assert all(state.latest_handshake for state in states), "a peer is reported to have had no handshake"
