"""Check the handshake against a scripted peer: what is answered, what is refused, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import LOW_ORDER_POINTS, Initiation, Response, later, let_pass, twin

if TYPE_CHECKING:
    from harness import Target

SECOND = 1_000_000_000
# Seconds after which no initiation is refused for coming too soon after the last one (HS-12: 20 ms).
FLOOD_LIMIT_IS_OVER = 0.03


@pytest.mark.requirement("HS-08")
def test_initiation_with_older_timestamp_is_refused(target: Target) -> None:
    peer = target.peer()
    peer.handshake()
    let_pass(FLOOD_LIMIT_IS_OVER, "an initiation is refused for its timestamp only")
    peer.send(Initiation(timestamp=later(peer.timestamp, -SECOND)))
    peer.expect_silence(after="an initiation whose timestamp is one second older than the last one")
    with twin("an initiation with a later timestamp is answered"):
        peer.handshake()


@pytest.mark.requirement("HS-35")
@pytest.mark.bug("IB-69")
@pytest.mark.parametrize("point", LOW_ORDER_POINTS, ids=lambda point: point.hex()[:8])
def test_initiation_with_low_order_ephemeral_is_refused(target: Target, point: bytes) -> None:
    peer = target.peer()
    peer.send(Initiation(ephemeral=point))
    peer.expect_silence(after=f"an initiation whose ephemeral {point.hex()} is a point of low order")
    with twin("an initiation with another ephemeral is answered"):
        peer.send(Initiation())
        peer.expect(Response)
