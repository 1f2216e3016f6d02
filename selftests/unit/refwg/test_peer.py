from __future__ import annotations

import pytest

from refwg.boundary import LocalAddress
from refwg.errors import DropReason
from refwg.messages import REKEY_TIMEOUT, SECOND
from refwg.noise import Keypairs
from refwg.peer import StagedPacket, Statistics
from selftests.support.pair import START, Pair


@pytest.mark.requirement("IF-14", "IF-15")
@pytest.mark.parametrize(
    ("reason", "counters"),
    [
        (DropReason.SOURCE_NOT_ALLOWED, ["rx_errors", "rx_frame_errors"]),
        (DropReason.INNER_PROTOCOL, ["rx_errors", "rx_frame_errors"]),
        (DropReason.INNER_LENGTH, ["rx_errors", "rx_length_errors"]),
        (DropReason.NO_PEER, ["tx_errors"]),
        (DropReason.NO_ENDPOINT, ["tx_errors"]),
        (DropReason.NOT_IP, ["tx_errors"]),
        (DropReason.QUEUE_OVERFLOW, ["tx_dropped"]),
        (DropReason.QUEUE_PURGED, ["tx_dropped"]),
        (DropReason.REPLAY, []),
        (DropReason.MALFORMED, []),
        (DropReason.ROUTING_LOOP, []),
        (DropReason.SEND_FAILED, []),
    ],
)
def test_drop_reason_increments_error_counters_of_driver(reason: DropReason, counters: list[str]) -> None:
    statistics = Statistics()
    statistics.drops[reason] += 1
    every = ["rx_errors", "rx_frame_errors", "rx_length_errors", "tx_errors", "tx_dropped"]
    assert [name for name in every if getattr(statistics, name)] == counters


@pytest.mark.requirement("HS-14", "HS-15")
@pytest.mark.parametrize(("now", "may"), [(REKEY_TIMEOUT - 1, False), (REKEY_TIMEOUT, True)])
def test_next_initiation_is_allowed_after_rekey_timeout(now: int, may: bool) -> None:
    peer = Pair().a.peer
    assert peer.may_initiate(0)
    peer.last_sent_handshake = 0
    assert peer.may_initiate(now) is may


@pytest.mark.requirement("RT-15", "RT-16")
def test_endpoint_keeps_other_fields_when_source_is_cleared() -> None:
    pair = Pair()
    peer = pair.a.peer
    peer.set_endpoint(pair.b.endpoint._replace(source=LocalAddress(b"\x0a\0\0\1", 3)), 0)
    peer.clear_endpoint_source()
    assert peer.endpoint == pair.b.endpoint
    unknown = Pair(endpoints=False).a.peer
    unknown.clear_endpoint_source()
    assert unknown.endpoint is None


@pytest.mark.requirement("HS-25")
def test_latest_handshake_is_wall_clock_time_of_completion() -> None:
    pair = Pair()
    pair.send(pair.a)
    pair.run(20 * 10**6)
    assert pair.a.peer.latest_handshake == START + 20 * 10**6
    assert pair.b.peer.latest_handshake == 0
    pair.settle()
    assert pair.b.peer.latest_handshake == START + 30 * 10**6


@pytest.mark.requirement("HS-36", "IF-07", "Q-08")
def test_stopped_peer_has_no_index_timer_or_staged_packet() -> None:
    pair = Pair()
    pair.connect()
    peer = pair.a.peer
    peer.staged.stage([StagedPacket(b"", 0)])
    pair.wire.filter = lambda _: False
    pair.run(5 * SECOND)
    peer.last_sent_handshake = None
    peer.keypairs.forbid_sending()
    pair.send(pair.a)
    assert len(peer.shared.indices) == 2
    assert peer.keypairs.current is not None
    assert peer.handshake.transcript.chaining_key
    peer.stop(pair.now)
    assert len(peer.shared.indices) == len(peer.staged) == 0
    assert peer.keypairs == Keypairs()
    assert (peer.handshake.ephemeral_key, peer.handshake.transcript.chaining_key) == (None, b"")
    assert peer.timers.next_deadline() is None
    assert peer.statistics.drops[DropReason.QUEUE_PURGED] == 2


class Notes:
    """A watcher that records events and their peers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, bytes]] = []

    def note(self, now: int, event: str, peer: bytes, **details: object) -> None:
        del now, details
        self.events.append((event, peer))

    def keys(self, static_private: bytes, remote_static: bytes, ephemeral_private: bytes, preshared: bytes) -> None:
        """Keys are not recorded."""


def test_watcher_receives_device_events_and_their_peer() -> None:
    pair, notes = Pair(), Notes()
    key = pair.a.peer.public_key
    pair.a.peer.shared.watcher = notes
    pair.a.device.clear_keys(0)
    pair.a.device.remove_peer(pair.a.peer, 0)
    pair.a.device.down(0)
    assert notes.events == [("keys cleared", b""), ("peer removed", key), ("down", b"")]
