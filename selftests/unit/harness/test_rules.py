"""Check the rules of a wire, without a wire: which fault each message meets."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from harness.errors import UsageError
from harness.wire import frames
from harness.wire.fragments import Fragments, Piece
from harness.wire.rules import Rules
from harness.wire.script import Delay, Drop, Duplicate, Flip, Hold, Replay, Script
from selftests.support.fragments import fragments, piece

if TYPE_CHECKING:
    from harness.wire.fragments import Arrival
    from harness.wire.script import Numbers, Rule

NODES = ("ns1", "ns2")
SECOND = 1_000_000_000
KINDS = {"i": (1, 148), "r": (2, 92), "c": (3, 64), "k": (4, 32), "d": (4, 48)}


def frame(message: str, counter: int = 0) -> bytes:
    """A frame with an initiation, response, cookie reply, keepalive or data: by first letter."""
    kind, size = KINDS[message]
    payload = (bytes([kind, 0, 0, 0]) + bytes(4) + struct.pack("<Q", counter)).ljust(size, b"x")
    udp = struct.pack(">HHHH", 1, 2, 8 + size, 0) + payload
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), bytes(4))
    return bytes(12) + b"\x08\x00" + ip + udp


def rules(*rules: Rule, seed: int = 1) -> Rules:
    return Rules(Script(rules), NODES, seed=seed)


def decisions(rule: Rule, messages: str, side: int = 0) -> str:
    """Return the first letter of the decision on each message."""
    active = rules(rule)
    return "".join(active.arrive(frame(message), side, 0)[0].did[0] for message in messages)


def counters(deliveries: list[bytes]) -> list[int]:
    return [struct.unpack_from("<Q", delivery, 50)[0] for delivery in deliveries]


def carried(active: Rules, numbers: range, now: int = 0) -> list[int]:
    """The counters of the messages that leave while data messages with these counters arrive."""
    out = [active.arrive(frame("d", number), 0, now)[1] for number in numbers]
    return counters([delivery.frame for deliveries in out for delivery in deliveries])


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("any", "ddddd"),
        ("handshake", "dddpp"),
        ("initiation", "dpppp"),
        ("response", "pdppp"),
        ("cookie-reply", "ppdpp"),
        ("transport", "pppdd"),
        ("keepalive", "pppdp"),
        ("data", "ppppd"),
        ("unknown", "ppppp"),
        ("fragment", "ppppp"),
        ("other", "ppppp"),
    ],
)
def test_message_word_selects_its_messages(word: str, expected: str) -> None:
    assert decisions(Drop(message=word), "irckd") == expected


ARP = bytes(12) + b"\x08\x06" + bytes(28)
NOT_WIREGUARD = {
    # Another type, reserved bytes that are set, and a length that no initiation has.
    "unknown": [frame("i").replace(b"\1\0\0\0", word) for word in (b"\5\0\0\0", b"\1\0\0\1", b"\3\0\0\0")],
    "fragment": [piece(frame("i"), 0, 60)],
    "other": [ARP, frame("i")[:100]],
}


@pytest.mark.parametrize("word", NOT_WIREGUARD)
def test_rule_that_names_it_drops_what_is_not_wireguard(word: str) -> None:
    active, passing = rules(Drop(message=word)), rules(Drop())
    for other, whole in NOT_WIREGUARD.items():
        for one in whole:
            decision, deliveries = active.arrive(one, 0, 0)
            taken = other == word
            assert (decision.did, len(deliveries)) == (("dropped", 0) if taken else ("passed", 1))
            assert decision.message.name.partition(" ")[0] == other
            assert passing.arrive(one, 0, 0)[0].did == "passed"


def test_frame_that_is_not_wireguard_counts_for_no_held_message() -> None:
    active = rules(Hold(message="data", behind=1), Duplicate(message="unknown"))
    active.arrive(frame("d"), 0, 0)
    for word, copies in (("unknown", 2), ("other", 1)):
        assert len(active.arrive(NOT_WIREGUARD[word][0], 0, 0)[1]) == copies
    assert active.holds == 1


# A message in fragments, which a rule takes as a whole

DID = [
    (Drop(message="data"), "dropped", 0),
    (Hold(message="data"), "held", 0),
    (Delay(message="data", seconds=1.0), "delayed", 0),
    (Duplicate(message="data", copies=2), "duplicated", 9),
    (Replay(message="data", behind=1, port=7777), "replayed", 3),
    (Flip(message="data", field="tag", bit=0), "flipped", 3),
    (Drop(message="keepalive"), "passed", 3),
]


def in_fragments(whole: bytes, order: tuple[int, ...] = (2, 0, 1)) -> Arrival:
    """What a wire decides about when the message comes in three fragments."""
    gathering = Fragments()
    for number in order:
        one = fragments(whole, 16, 32)[number]
        place = frames.read(one)
        assert isinstance(place, frames.Fragment)
        for _, arrival in gathering.arrive(Piece(one, place), 0, 0):
            return arrival
    raise AssertionError("not complete")


@pytest.mark.parametrize(("rule", "did", "count"), DID, ids=[rule.do + rule.message for rule, _, _ in DID])
def test_rule_takes_all_fragments_of_message(rule: Rule, did: str, count: int) -> None:
    active, arrival = rules(rule), in_fragments(frame("d", 5))
    decision, deliveries = active.decide(arrival, 0, 0)
    assert (decision.did, decision.message.counter, len(deliveries)) == (did, 5, count)
    assert [comment.rpartition("; ")[2] for comment in decision.comments] == [
        f"fragment {number} of 3 of data" for number in (3, 1, 2)
    ]
    if did in {"passed", "duplicated", "replayed"}:
        assert tuple(delivery.frame for delivery in deliveries[:3]) == arrival.frames
    later = [*active.arrive(frame("k"), 0, 0)[1][1:], *active.release()]
    assert len(later) == (0 if did in {"dropped", "passed", "duplicated", "flipped"} else 3)
    assert all("; fragment " in delivery.comment for delivery in later)
    if did in {"held", "delayed"}:
        assert tuple(delivery.frame for delivery in later) == arrival.frames


def test_flip_changes_field_in_fragment_and_checksum_in_first() -> None:
    arrival = in_fragments(frame("d"), (0, 1, 2))
    _, deliveries = rules(Flip(message="data", field="tag", bit=0)).decide(arrival, 0, 0)
    changed = [delivery.frame for delivery in deliveries]
    # The fragments have the bytes 0 to 15, 16 to 31 and 32 to 55 of the UDP datagram; the tag begins at byte 40.
    different = [
        (number, place - 34)
        for number, pair in enumerate(zip(changed, arrival.frames, strict=True))
        for place, (new, old) in enumerate(zip(*pair, strict=True))
        if new != old
    ]
    assert different == [(0, 6), (0, 7), (2, 8)]


def test_fragments_that_have_passed_are_not_sent_again() -> None:
    active = rules(Drop(message="data"))
    decision, deliveries = active.decide(replace(in_fragments(frame("d")), is_gone=True), 0, 0)
    assert (decision.did, deliveries, active.unmatched()) == ("passed", [], ["rule 1 (drop message=data)"])


def test_rules_of_one_sender_cannot_take_from_other() -> None:
    active = rules(Drop(sender="ns1"))
    assert (active.may_take(0), active.may_take(1), rules().may_take(0)) == (True, False, False)


# A rule that matched nothing


@pytest.mark.parametrize(
    ("rule", "messages", "is_matched"),
    [
        (Drop(message="data"), "irck", False),
        (Drop(message="data"), "d", True),
        (Drop(message="data", nth=2), "d", False),
        (Drop(message="data", nth=2), "dd", True),
        (Drop(message="data", counters="1-"), "d", False),
        (Drop(message="data", sender="ns2"), "d", False),
        # Chance decides about what matched.
        (Drop(message="data", share=1e-9), "d", True),
        (Drop(message="data", share=1e-9), "i", False),
        (Drop(message="data", optional=True), "i", True),
    ],
)
def test_rule_without_match_is_listed_unless_optional(rule: Rule, messages: str, is_matched: bool) -> None:
    active = rules(rule)
    for message in messages:
        active.arrive(frame(message), 0, 0)
    assert active.unmatched() == ([] if is_matched else [f"rule 1 ({rule})"])


@pytest.mark.parametrize(
    ("nth", "expected"), [(2, "pdppp"), ("2-3", "pddpp"), ("4-", "pppdd"), ((1, "3-4"), "dpddp"), (9, "ppppp")]
)
def test_nth_counts_only_messages_that_meet_other_conditions(nth: Numbers, expected: str) -> None:
    assert decisions(Drop(message="data", nth=nth), "ddddd") == expected
    # Other messages in between are not counted.
    assert decisions(Drop(message="data", nth=nth), "idrdcdkdid")[1::2] == expected


def test_sender_selects_direction_and_unknown_node_is_refused() -> None:
    assert decisions(Drop(sender="ns1"), "d", side=0) == "d"
    assert decisions(Drop(sender="ns1"), "d", side=1) == "p"
    with pytest.raises(
        UsageError, match=r"rule 1 \(drop sender=ns3\): sender: this wire has no node ns3; it connects ns1 and ns2"
    ):
        rules(Drop(sender="ns3"))


def test_first_matching_rule_decides() -> None:
    active = rules(Drop(message="data", nth=1), Duplicate(message="data", nth=1))
    assert [len(active.arrive(frame("d"), 0, 0)[1]) for _ in range(3)] == [0, 2, 1]


def test_held_messages_are_released_after_next_message() -> None:
    assert carried(rules(Hold(message="data", counters="5-9", behind=1)), range(12)) == [
        0,
        1,
        2,
        3,
        4,
        10,
        5,
        6,
        7,
        8,
        9,
        11,
    ]


def test_held_message_waits_for_others_of_its_own_direction() -> None:
    active = rules(Hold(message="data", nth=1, behind=1))
    active.arrive(frame("d"), 0, 0)
    assert len(active.arrive(frame("k"), 1, 0)[1]) == 1
    assert len(active.arrive(frame("k"), 0, 0)[1]) == 2


def test_held_message_is_released_when_its_time_is_over() -> None:
    active = rules(Hold(message="data", behind=9, seconds=2.0))
    assert carried(active, range(1), now=SECOND) == []
    assert active.next_deadline() == 3 * SECOND
    assert active.due(3 * SECOND - 1) == []
    (delivery,) = active.due(3 * SECOND)
    assert delivery.comment == "released: data 1 (rule 1: hold message=data behind=9 seconds=2.0)"
    assert (active.holds, active.next_deadline()) == (0, None)


def test_deadline_of_released_message_is_removed() -> None:
    active = rules(Hold(message="data", seconds=2.0))
    carried(active, range(3))
    assert counters([delivery.frame for delivery in active.release()]) == [0, 1, 2]
    assert active.next_deadline() is None


def test_equal_delays_keep_order_and_jitter_does_not() -> None:
    for jitter, in_order in ((0.0, True), (0.5, False)):
        active = rules(Delay(message="data", seconds=0.3, jitter=jitter))
        carried(active, range(50))
        late = counters([delivery.frame for delivery in active.due(SECOND)])
        assert sorted(late) == list(range(50))
        assert (late == list(range(50))) is in_order


def test_replay_passes_message_and_sends_copy_later() -> None:
    active = rules(Replay(message="data", nth=1, behind=2))
    assert carried(active, range(4)) == [0, 1, 2, 0, 3]


def test_comment_names_message_number_and_rule() -> None:
    active = rules(Drop(message="response", nth=2))
    comments = [active.arrive(frame("r"), 1, 0)[0].comment for _ in range(2)]
    assert comments == ["", "dropped: response 2 (rule 1: drop message=response nth=2)"]


def random_decisions(seed: int, others: int) -> list[str]:
    """The decisions on 200 messages of ns1, with this many messages of ns2 after each."""
    active = rules(Drop(share=0.1), seed=seed)
    decided = []
    for _ in range(200):
        decided.append(active.arrive(frame("d"), 0, 0)[0].did)
        for _ in range(others):
            active.arrive(frame("d"), 1, 0)
    return decided


def test_random_drops_depend_on_seed_and_not_on_other_direction() -> None:
    assert random_decisions(1, 0) == random_decisions(1, 3) != random_decisions(2, 0)
    assert 5 <= random_decisions(1, 0).count("dropped") <= 45


def test_script_seed_takes_precedence_over_lab_seed() -> None:
    outcomes = []
    for seed in (1, 2):
        active = Rules(Script((Drop(share=0.5),), seed=3), NODES, seed=seed)
        outcomes.append([active.arrive(frame("d"), 0, 0)[0].did for _ in range(50)])
    assert outcomes[0] == outcomes[1]


def test_non_wireguard_frame_passes_drop_rule() -> None:
    active = rules(Drop())
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    truncated = frame("i")[:100]
    other_datagram = frame("i").replace(b"\1\0\0\0", b"\5\0\0\0")
    for other in (arp, truncated, other_datagram):
        decision, deliveries = active.arrive(other, 0, 0)
        assert (decision.did, [delivery.frame for delivery in deliveries]) == ("passed", [other])


def test_gathered_messages_are_released_together() -> None:
    gathering = rules(Hold(message="data", gather=3))
    assert carried(gathering, range(2)) == []
    assert carried(gathering, range(2, 3)) == [0, 1, 2]


def test_flipped_bit_is_only_change_besides_checksum() -> None:
    flipping = rules(Flip(message="data", field="tag", bit=0))
    before = frame("d")
    decision, (delivery,) = flipping.arrive(before, 0, 0)
    assert (decision.did, delivery.comment) == ("flipped", "flipped: data 1 (rule 1: flip message=data field=tag)")
    changed = [place for place, (old, new) in enumerate(zip(before, delivery.frame, strict=True)) if old != new]
    # Behind Ethernet, IPv4 and UDP of 42 bytes the tag begins at byte 32 of the message; 40 and 41 are the checksum.
    assert changed == [40, 41, 42 + 32]


def test_replayed_copy_comes_from_chosen_port() -> None:
    replaying = rules(Replay(message="data", nth=1, behind=1, port=7777))
    before = frame("d")
    assert replaying.arrive(before, 0, 0)[1][0].frame == before
    copy = replaying.arrive(frame("d", 1), 0, 0)[1][1].frame
    assert (copy[34:36], copy[42:]) == ((7777).to_bytes(2), before[42:])
