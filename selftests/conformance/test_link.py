"""Check against a scripted peer what ends with a link that is set down, and that a link set up starts clean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import Initiation, Keepalive, differs, let_pass, poll_until, twin
from selftests.support.target import handshake_soon, is_delivered, set_down, set_up

if TYPE_CHECKING:
    from harness import Target

KEEPALIVE_IS_DUE = 1.5
TIMES = 20


@pytest.mark.requirement("IF-07", "DT-34")
@pytest.mark.bug("IB-68")
def test_sessions_end_with_link(target: Target) -> None:
    peer = target.peer()
    session = peer.connect()
    with twin("data is delivered before the link is down"):
        assert is_delivered(target, peer, session)
    set_down(target)
    set_up(target)
    gone = target.packet(peer, b"of before")
    peer.send(session.data(gone))
    assert is_delivered(target, peer, peer.connect()), (
        "the device refused data on a session after its link was up again"
    )
    if gone in target.inside.packets():
        differs("a session survives that its link is down and up", by=[target.implementation.name])


@pytest.mark.requirement("IF-07")
@pytest.mark.bug("IB-68")
def test_initiation_may_follow_at_once_after_link_is_up(target: Target) -> None:
    peer = target.peer(endpoint=True)
    target.send(peer)
    first = peer.expect(Initiation)
    set_down(target)
    set_up(target)
    target.send(peer)
    came = poll_until(lambda: [one for one in peer.drain() if isinstance(one, type(first))], bool, 1.0)
    if not came:
        differs("no initiation follows within 1 s after the link was down and up", by=[target.implementation.name])


@pytest.mark.requirement("TM-28", "IF-06")
@pytest.mark.bug("IB-68")
def test_device_is_silent_while_link_is_down(target: Target) -> None:
    peer = target.peer(endpoint=True, persistent_keepalive=1)
    session = peer.respond()
    peer.expect(Keepalive)
    peer.drain()
    peer.inbox.clear()
    is_closed = set_down(target)
    for message in (Initiation(), session.keepalive(), session.data(target.packet(peer))):
        peer.send(message)
    let_pass(KEEPALIVE_IS_DUE, "a persistent keepalive is due each second")
    came = ", ".join(map(str, peer.drain()))
    set_up(target)
    if came or not is_closed:
        what = f"it sends while its link is down: {came}" if came else "its port is open while its link is down"
        differs(what, by=[target.implementation.name])


@pytest.mark.requirement("IF-07")
@pytest.mark.bug("IB-68")
def test_device_survives_link_changes_under_initiations(target: Target) -> None:
    peers = [target.peer() for _ in range(2)]
    with twin("an initiation is answered before"):
        target.round_trip()
    for number in range(TIMES):
        for peer in peers:
            peer.send(Initiation())
        target.node.set_link("wg0", up=number % 2 == 1)
    set_up(target)
    peer = target.peer()
    # So many initiations may be a load for the device, which then asks for a cookie first.
    session = handshake_soon(peer)
    assert session, "the device answers no initiation after its link went down and up"
    assert is_delivered(target, peer, session), "the device delivers no data after its link went down and up"
