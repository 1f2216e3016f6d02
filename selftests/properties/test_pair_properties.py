"""Run two devices through random events, and check invariants after each event."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from refwg.boundary import Endpoint
from refwg.messages import MILLISECOND, REJECT_AFTER_TIME, REKEY_TIMEOUT, SECOND, ZERO_KEYS_AFTER, MessageType
from selftests.support.pair import Pair, private_key

if TYPE_CHECKING:
    from selftests.support.pair import Sent, Side

SIDES = st.sampled_from("ab")
PROBABILITIES = st.sampled_from([0, 0.1, 0.5])
FORGER = Endpoint(ip_address("10.6.6.6").packed, 666)
MAC2_LENGTH = 16


class AccountingPair(Pair):
    """A pair that checks that each packet and data message has exactly one fate."""

    def send(self, side: Side, payload: bytes = b"payload", *, version: int = 4) -> bytes:
        staged, fates = self._staged(side), self._sealed(side) + drops(side)
        packet = super().send(side, payload, version=version)
        assert staged + 1 == self._staged(side) + self._sealed(side) + drops(side) - fates
        return packet

    def inject(self, side: Side, datagram: bytes, *, source: Endpoint | None = None, ecn: int = 0) -> None:
        fates = len(side.delivered) + drops(side)
        super().inject(side, datagram, source=source, ecn=ecn)
        if datagram[:4] == b"\4\0\0\0":
            new = len(side.delivered) + drops(side) - fates
            # A keepalive is neither delivered nor dropped.
            assert new == 1 or (new == 0 and len(datagram) == 32)

    def _sealed(self, side: Side) -> int:
        return len(self.sent(side, MessageType.DATA))

    def _staged(self, side: Side) -> int:
        return sum(len(peer.staged) for peer in side.device.peers)


def drops(side: Side) -> int:
    return side.device.statistics.drops.total()


class TwoDevices(RuleBasedStateMachine):
    """Packets, losses, pauses, changes of link, key and address, and forgeries in any order."""

    @initialize(
        seed=st.integers(0, 1000), loss=PROBABILITIES, duplication=PROBABILITIES, reordering=st.sampled_from([0, 50])
    )
    def begin(self, seed: int, loss: float, duplication: float, reordering: int) -> None:
        self.pair = AccountingPair(seed=seed)
        self.pair.wire.loss, self.pair.wire.duplication = loss, duplication
        self.pair.wire.reordering = reordering * MILLISECOND
        self.preshared_key = bytes(32)
        self.handed_over: set[bytes] = set()
        self.number = 0
        self.checked = 0
        self.used: set[tuple[str, bytes]] = set()
        self.last_initiation: dict[str, int] = {}

    def side(self, name: str) -> Side:
        return self.pair.a if name == "a" else self.pair.b

    # Events.

    @rule(name=SIDES, count=st.integers(1, 5))
    def send(self, name: str, count: int) -> None:
        for _ in range(count):
            self.number += 1
            self.handed_over.add(self.pair.send(self.side(name), self.number.to_bytes(4)))

    @rule(
        milliseconds=st.one_of(st.integers(1, 1000), st.integers(4000, 6000), st.integers(1, 200_000), st.just(600_000))
    )
    def wait(self, milliseconds: int) -> None:
        self.pair.run(milliseconds * MILLISECOND)

    @rule(name=SIDES, pause=st.sampled_from([0, 1, 20]))
    def bounce(self, name: str, pause: int) -> None:
        side = self.side(name)
        side.device.down(self.pair.now)
        self.pair.run(pause * SECOND)
        assert not self.new_messages(side)
        self.limit_is_lifted(side)
        self.pair.carry_out(side, side.device.up(self.pair.now))

    @rule(name=SIDES)
    def clear_keys(self, name: str) -> None:
        self.side(name).device.clear_keys(self.pair.now)

    @rule(name=SIDES, seconds=st.sampled_from([0, 7, 25]))
    def keep_alive(self, name: str, seconds: int) -> None:
        # Not 5, the period of retries: two sides in step would initiate at the same time for ever.
        side = self.side(name)
        is_turned_on = side.device.set_persistent_keepalive(side.peer, seconds)
        now = self.pair.now
        self.pair.carry_out(side, side.device.peer_configured(side.peer, now, wants_keepalive=is_turned_on))

    @rule(key=st.binary(min_size=32, max_size=32))
    def change_preshared_key(self, key: bytes) -> None:
        self.preshared_key = key
        for side in (self.pair.a, self.pair.b):
            side.peer.handshake.preshared_key = key

    @rule(name=SIDES)
    def change_private_key(self, name: str) -> None:
        """The other side removes the old peer and adds the new one."""
        self.number += 1
        side, other = self.side(name), self.side("b" if name == "a" else "a")
        for changed in (side, other):
            self.limit_is_lifted(changed)
        self.pair.carry_out(side, side.device.set_private_key(private_key(str(self.number)), self.pair.now))
        other.device.remove_peer(other.peer, self.pair.now)
        peer = other.add_peer(side, self.pair.now)
        peer.handshake.preshared_key = self.preshared_key
        peer.set_endpoint(side.endpoint, self.pair.now)

    @rule(name=SIDES, port=st.integers(1, 65535))
    def roam(self, name: str, port: int) -> None:
        side = self.side(name)
        side.endpoint = Endpoint(side.endpoint.address, port)

    @rule(age=st.integers(1, 6), bit=st.integers(0, 10_000))
    def forge(self, age: int, bit: int) -> None:
        """Inject one of the last messages again, with one bit flipped."""
        if self.pair.log:
            sent = self.pair.log[-min(age, len(self.pair.log))]
            datagram = bytearray(sent.datagram)
            # mac2 is checked only under load: a message with another mac2 is authentic.
            covered = len(datagram) - (0 if datagram[0] == MessageType.DATA else MAC2_LENGTH)
            datagram[bit // 8 % covered] ^= 1 << bit % 8
            self.pair.inject(self.side("b" if sent.sender == "A" else "a"), bytes(datagram), source=FORGER)

    @rule(name=SIDES, which=st.integers(0, 10_000))
    def replay_or_reflect(self, name: str, which: int) -> None:
        if self.pair.log:
            self.pair.inject(self.side(name), self.pair.log[which % len(self.pair.log)].datagram)

    def teardown(self) -> None:
        """Packets arrive at once when nothing is lost and both sides have the right endpoint.

        The sides take turns: if both initiate at once, the retry of each may fall into the five seconds after its own
        response, and then, as in the driver, nothing happens until the next packet.
        """
        if not hasattr(self, "pair"):
            return
        pair = self.pair
        pair.wire.loss = 0
        for side, other in ((pair.a, pair.b), (pair.b, pair.a)):
            side.peer.set_endpoint(other.endpoint, pair.now)
        for name in "abab":
            self.send(name, 1)
            pair.run(16 * SECOND)
        pair.a.delivered.clear()
        pair.b.delivered.clear()
        sent = [pair.send(pair.a, b"last"), pair.send(pair.b, b"last")]
        pair.run(SECOND)
        assert pair.b.delivered + pair.a.delivered == sent

    # Invariants.

    @invariant()
    def nothing_is_delivered_that_was_not_sent_and_nothing_twice(self) -> None:
        delivered = self.pair.a.delivered + self.pair.b.delivered
        assert len(delivered) == len(set(delivered))
        assert set(delivered) <= self.handed_over

    @invariant()
    def messages_sent_since_last_check_were_allowed(self) -> None:
        for sent in self.pair.log[self.checked :]:
            side = self.pair.a if sent.sender == "A" else self.pair.b
            if sent.type is MessageType.DATA:
                self.no_counter_is_used_twice(sent)
                self.no_data_is_sent_under_an_expired_key(sent, side)
            if sent.type is MessageType.INITIATION:
                self.initiations_are_five_seconds_apart(sent)
        self.checked = len(self.pair.log)

    def no_counter_is_used_twice(self, sent: Sent) -> None:
        header = sent.sender, sent.datagram[:16]
        assert header not in self.used
        self.used.add(header)

    def no_data_is_sent_under_an_expired_key(self, sent: Sent, side: Side) -> None:
        assert sent.time < side.births[int.from_bytes(sent.datagram[4:8], "little")] + REJECT_AFTER_TIME

    def initiations_are_five_seconds_apart(self, sent: Sent) -> None:
        last = self.last_initiation.get(sent.sender)
        assert last is None or sent.time >= last + REKEY_TIMEOUT
        self.last_initiation[sent.sender] = sent.time

    @invariant()
    def one_handshake_is_in_flight_and_indices_are_those_of_handshake_and_sessions(self) -> None:
        for side in (self.pair.a, self.pair.b):
            peer = side.peer
            slots = (peer.keypairs.previous, peer.keypairs.current, peer.keypairs.next)
            sessions = sum(slot is not None for slot in slots)
            assert len(peer.shared.indices) == sessions + (peer.handshake.local_index is not None)

    @invariant()
    def no_key_outlives_its_time(self) -> None:
        for side in (self.pair.a, self.pair.b):
            slots = (side.peer.keypairs.current, side.peer.keypairs.next)
            births = [keypair.birthdate for keypair in slots if keypair is not None]
            assert not births or self.pair.now < max(births) + ZERO_KEYS_AFTER

    @invariant()
    def nobody_follows_a_forger(self) -> None:
        for side in (self.pair.a, self.pair.b):
            assert side.peer.endpoint is None or side.peer.endpoint.address != FORGER.address

    def new_messages(self, side: Side) -> list[Sent]:
        return [sent for sent in self.pair.log[self.checked :] if sent.sender == side.name]

    def limit_is_lifted(self, side: Side) -> None:
        """From now on an initiation may follow another at once."""
        self.messages_sent_since_last_check_were_allowed()
        self.last_initiation.pop(side.name, None)


TwoDevices.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


TestTwoDevices = pytest.mark.requirement("DT-01", "DT-03", "DT-21")(TwoDevices.TestCase)


@pytest.mark.requirement("ROB-14")
@pytest.mark.parametrize("seed", range(20))
def test_simultaneous_start_always_delivers_both_packets(seed: int) -> None:
    pair = Pair(seed=seed)
    packets = [pair.send(pair.a), pair.send(pair.b)]
    pair.run(15 * SECOND)
    assert pair.b.delivered + pair.a.delivered == packets
