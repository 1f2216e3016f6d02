"""Two devices under random events: whatever happens, some things must always hold."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from refwg.messages import MILLISECOND, REKEY_TIMEOUT, SECOND, Data, MessageType
from selftests.unit.pair import Pair

if TYPE_CHECKING:
    from selftests.unit.pair import Sent, Side

SIDES = st.sampled_from("ab")


class TwoDevices(RuleBasedStateMachine):
    """Packets, losses, pauses, link changes and forgeries in any order."""

    @initialize(seed=st.integers(0, 1000), loss=st.sampled_from([0, 0.1, 0.5]), reordering=st.sampled_from([0, 50]))
    def begin(self, seed: int, loss: float, reordering: int) -> None:
        self.pair = Pair(seed=seed)
        self.pair.wire.loss, self.pair.wire.reordering = loss, reordering * MILLISECOND
        self.handed_over: list[bytes] = []
        self.bounces: list[tuple[str, int]] = []
        self.number = 0

    def side(self, name: str) -> Side:
        return self.pair.a if name == "a" else self.pair.b

    @rule(name=SIDES, count=st.integers(1, 5))
    def send(self, name: str, count: int) -> None:
        for _ in range(count):
            self.number += 1
            self.handed_over.append(self.pair.send(self.side(name), self.number.to_bytes(4)))

    @rule(milliseconds=st.one_of(st.integers(1, 1000), st.integers(4000, 6000), st.integers(1, 200_000)))
    def wait(self, milliseconds: int) -> None:
        self.pair.run(milliseconds * MILLISECOND)

    @rule(name=SIDES)
    def bounce(self, name: str) -> None:
        side = self.side(name)
        side.device.down(self.pair.now)
        self.bounces.append((side.name, self.pair.now))
        self.pair.carry_out(side, side.device.up(self.pair.now))

    @rule(name=SIDES)
    def forget_keys(self, name: str) -> None:
        self.side(name).device.forget_keys(self.pair.now)

    @rule(name=SIDES, seconds=st.sampled_from([0, 5, 25]))
    def keep_alive(self, name: str, seconds: int) -> None:
        side = self.side(name)
        self.pair.carry_out(side, side.device.set_persistent_keepalive(side.peer, seconds, self.pair.now))

    @rule(name=SIDES, which=st.integers(0, 10_000), bit=st.integers(0, 10_000))
    def replay_or_forge(self, name: str, which: int, bit: int) -> None:
        if self.pair.log:
            datagram = bytearray(self.pair.log[which % len(self.pair.log)].datagram)
            datagram[bit // 8 % len(datagram)] ^= (1 << bit % 8) if bit % 2 else 0
            self.pair.inject(self.side(name), bytes(datagram))

    @invariant()
    def nothing_is_delivered_that_was_not_sent_and_nothing_twice(self) -> None:
        delivered = self.pair.a.delivered + self.pair.b.delivered
        assert len(delivered) == len(set(delivered))
        assert set(delivered) <= set(self.handed_over)

    @invariant()
    def no_counter_is_used_twice(self) -> None:
        used = [sent.datagram[:16] + sent.sender.encode() for sent in self.pair.log if sent.type is MessageType.DATA]
        assert len(used) == len(set(used))

    @invariant()
    def no_data_is_sent_under_an_expired_key(self) -> None:
        for side in (self.pair.a, self.pair.b):
            session = side.peer.keypairs.current
            if session is not None:
                late = session.birthdate + 180 * SECOND
                indices = [Data.parse(sent.datagram).receiver_index for sent in self.sent_after(side, late)]
                assert session.remote_index not in indices

    @invariant()
    def initiations_are_five_seconds_apart_unless_the_link_was_down_between(self) -> None:
        for side in (self.pair.a, self.pair.b):
            times = [sent.time for sent in self.pair.sent(side, MessageType.INITIATION)]
            for earlier, later in pairwise(times):
                was_down = any(name == side.name and earlier <= time <= later for name, time in self.bounces)
                assert later - earlier >= REKEY_TIMEOUT or was_down

    @invariant()
    def indices_in_use_are_those_of_handshake_and_sessions(self) -> None:
        for side in (self.pair.a, self.pair.b):
            peer = side.peer
            slots = (peer.keypairs.previous, peer.keypairs.current, peer.keypairs.next)
            sessions = sum(slot is not None for slot in slots)
            assert len(peer.shared.indices) == sessions + (peer.handshake.local_index is not None)

    def sent_after(self, side: Side, time: int) -> list[Sent]:
        return [sent for sent in self.pair.sent(side, MessageType.DATA) if sent.time >= time]


TwoDevices.TestCase.settings = settings(max_examples=250, stateful_step_count=30, deadline=None)


TestTwoDevices = pytest.mark.requirement("DT-01", "DT-03", "DT-21")(TwoDevices.TestCase)


@pytest.mark.requirement("ROB-14")
@pytest.mark.parametrize("seed", range(20))
def test_two_sides_that_start_together_always_get_through(seed: int) -> None:
    pair = Pair(seed=seed)
    packets = [pair.send(pair.a), pair.send(pair.b)]
    pair.run(15 * SECOND)
    assert pair.b.delivered + pair.a.delivered == packets
