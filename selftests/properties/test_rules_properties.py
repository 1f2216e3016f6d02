"""Check the rules of a wire: how often, when and how changed each message leaves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hypothesis import given, settings
from hypothesis import strategies as st

from harness.net.checksum import checksum
from harness.wire.messages import FIELDS
from harness.wire.rules import Rules
from harness.wire.script import Delay, Duplicate, Flip, Hold, Replay, Script, ranges
from selftests.support.strategies import flip
from selftests.support.wire_rules import KINDS, NODES, frame, rules

if TYPE_CHECKING:
    from harness.wire.rules import Decision, Delivery
    from harness.wire.script import Numbers, Rule

MILLISECOND: Final = 1_000_000
SECOND: Final = 1000 * MILLISECOND
# Offsets in a frame of IPv4, UDP and the message.
IPV4, UDP, PAYLOAD = 14, 34, 42
# The decisions after which a message leaves the wire at once.
AT_ONCE: Final = {"passed", "duplicated", "replayed", "flipped"}
# The messages that each word of a script stands for (docs/wires.md).
WORDS: Final = {
    "any": {*KINDS} - {"unknown"},
    "handshake": {"initiation", "response", "cookie-reply"},
    "transport": {"keepalive", "data"},
    **{kind: {kind} for kind in KINDS},
    # No frame of this file is one of these.
    "fragment": set(),
    "other": set(),
}

# Each example draws some rules and runs up to thirty messages past them.
fewer = settings(max_examples=60)
# Sort of message, the end that it comes from, and milliseconds since the one before.
Traffic = list[tuple[str, int, int]]
traffics: st.SearchStrategy[Traffic] = st.lists(
    st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from([0, 1]), st.sampled_from([0, 1, 100, 600])),
    min_size=6,
    max_size=30,
)


def scripts(*sorts: str, **conditions: st.SearchStrategy[float]) -> st.SearchStrategy[Script]:
    return st.lists(rules(*sorts, **conditions), min_size=1, max_size=4).map(lambda drawn: Script(tuple(drawn)))


@dataclass
class Arrival:
    """A message that arrived, the decision on it, and what left the wire because of it."""

    kind: str
    frame: bytes
    side: int
    time: int
    decision: Decision
    rule: Rule | None
    deliveries: list[Delivery]

    @property
    def leaves(self) -> int:
        """The number of copies that leave the wire."""
        if isinstance(self.rule, Duplicate):
            return 1 + self.rule.copies
        return {"dropped": 0, "replayed": 2}.get(self.decision.did, 1)


@dataclass
class Course:
    """All messages that arrived, by number, and all that left, with time and number."""

    arrivals: list[Arrival] = field(default_factory=list)
    departures: list[tuple[int, int, Delivery]] = field(default_factory=list)
    # The departures from this one on were released at the end.
    released: int = 0

    def left(self, time: int, deliveries: list[Delivery]) -> None:
        self.departures += [(time, number_of(delivery.frame), delivery) for delivery in deliveries]

    def departures_of(self, number: int) -> list[tuple[int, Delivery]]:
        return [(time, delivery) for time, other, delivery in self.departures if other == number]


def numbered(kind: str, number: int) -> bytes:
    """A frame with its number in the Ethernet address, where no fault changes it."""
    return number.to_bytes(2) + frame(kind, number)[2:]


def number_of(frame: bytes) -> int:
    return int.from_bytes(frame[:2])


def course_of(script: Script, traffic: Traffic, *, seed: int = 1) -> Course:
    """Let traffic arrive, release timed messages at their deadlines, and all others at the end."""
    rules, course, now = Rules(script, NODES, seed=seed), Course(), 0
    for number, (kind, side, pause) in enumerate(traffic):
        now += pause * MILLISECOND
        release_until(now, rules, course)
        arriving = numbered(kind, number)
        decision, deliveries = rules.arrive(arriving, side, now)
        rule = None if decision.rule is None else script.rules[decision.rule - 1]
        course.arrivals.append(Arrival(kind, arriving, side, now, decision, rule, deliveries))
        course.left(now, deliveries)
        assert rules.holds == sum(arrival.leaves for arrival in course.arrivals) - len(course.departures)
    now += 2 * SECOND
    release_until(now, rules, course)
    course.released = len(course.departures)
    course.left(now, rules.release())
    assert (rules.holds, rules.next_deadline()) == (0, None)
    return course


def release_until(end: int, rules: Rules, course: Course) -> None:
    while (deadline := rules.next_deadline()) is not None and deadline <= end:
        assert rules.due(deadline - 1) == []
        due = rules.due(deadline)
        assert due
        course.left(deadline, due)


@fewer
@given(scripts(), traffics)
def test_messages_in_are_messages_out_dropped_and_held(script: Script, traffic: Traffic) -> None:
    """`course_of` checks the number held after each message."""
    course = course_of(script, traffic)
    out = Counter(number for _, number, _ in course.departures)
    assert out == Counter({number: arrival.leaves for number, arrival in enumerate(course.arrivals) if arrival.leaves})
    for _, number, delivery in course.departures:
        assert delivery.side == course.arrivals[number].side


@fewer
@given(scripts("drop", "hold", "delay", "replay", "flip"), traffics)
def test_message_that_is_not_held_leaves_at_once_and_in_order(script: Script, traffic: Traffic) -> None:
    course = course_of(script, traffic)
    for number, arrival in enumerate(course.arrivals):
        first = next((number_of(delivery.frame) for delivery in arrival.deliveries), None)
        if arrival.decision.did in AT_ONCE:
            assert first == number
        elif arrival.decision.did in {"dropped", "delayed"}:
            assert arrival.deliveries == []
    at_once = [number for number, arrival in enumerate(course.arrivals) if arrival.decision.did in AT_ONCE]
    left = [number for _, number, _ in course.departures if number in at_once]
    assert list(dict.fromkeys(left)) == at_once


@fewer
@given(scripts(), traffics)
def test_same_seed_makes_same_deliveries(script: Script, traffic: Traffic) -> None:
    first, second = (course_of(script, traffic, seed=7) for _ in range(2))
    assert first == second


def contains(value: Numbers | None, number: int) -> bool:
    spans = ranges("", value)
    return spans is None or any(first <= number <= (number if last is None else last) for first, last in spans)


@fewer
@given(scripts(share=st.just(1.0)), traffics)
def test_first_rule_whose_conditions_are_met_decides(script: Script, traffic: Traffic) -> None:
    candidates = [0] * len(script.rules)
    for number, arrival in enumerate(course_of(script, traffic).arrivals):
        has_counter = arrival.kind in WORDS["transport"]
        for place, rule in enumerate(script.rules):
            is_chosen = arrival.kind in WORDS[rule.message] and rule.sender in {None, NODES[arrival.side]}
            if is_chosen and (rule.counters is None or (has_counter and contains(rule.counters, number))):
                candidates[place] += 1
                if contains(rule.nth, candidates[place]):
                    assert arrival.decision.rule == place + 1
                    assert arrival.decision.comment.startswith(f"{arrival.decision.did}: ")
                    break
        else:
            assert (arrival.decision.rule, arrival.decision.did) == (None, "passed")


@fewer
@given(scripts("hold", "delay", "replay"), traffics)
def test_timed_message_leaves_neither_early_nor_late(script: Script, traffic: Traffic) -> None:
    course = course_of(script, traffic)
    for number, arrival in enumerate(course.arrivals):
        rule = arrival.rule
        if not isinstance(rule, Delay | Hold | Replay) or not rule.seconds:
            continue
        # The last departure: the copy of a replayed message.
        waited = course.departures_of(number)[-1][0] - arrival.time
        span = int(rule.seconds * SECOND)
        if isinstance(rule, Delay):
            assert span <= waited <= (rule.seconds + rule.jitter) * SECOND
        elif rule.behind is None and not (isinstance(rule, Hold) and rule.gather):
            assert waited == span
        else:
            assert waited <= span


@fewer
@given(scripts("hold", "replay"), traffics)
def test_message_held_behind_others_leaves_after_last_of_them(script: Script, traffic: Traffic) -> None:
    course = course_of(script, traffic)
    for number, arrival in enumerate(course.arrivals):
        rule = arrival.rule
        if not isinstance(rule, Hold | Replay) or not rule.behind or rule.seconds:
            continue
        if isinstance(rule, Hold) and rule.gather:
            continue
        later = [other for other in course.arrivals[number + 1 :] if other.side == arrival.side]
        passing = [other for other in later if other.decision.did in AT_ONCE and other.kind in WORDS["any"]]
        if len(passing) < rule.behind:
            last = [other for _, other, _ in course.departures[course.released :]]
        else:
            last = [number_of(delivery.frame) for delivery in passing[rule.behind - 1].deliveries[1:]]
        assert number in last


@fewer
@given(scripts("hold", "drop"), traffics)
def test_rule_never_holds_as_many_messages_as_it_gathers(script: Script, traffic: Traffic) -> None:
    for place, rule in enumerate(script.rules, 1):
        if isinstance(rule, Hold) and rule.gather is not None:
            running = Rules(script, NODES, seed=1)
            held: set[int] = set()
            for number, (kind, side, _) in enumerate(traffic):
                decision, deliveries = running.arrive(numbered(kind, number), side, 0)
                held |= {number} if (decision.rule, decision.did) == (place, "held") else set()
                held -= {number_of(delivery.frame) for delivery in deliveries}
                assert len(held) < rule.gather


def udp_checksum_of(frame: bytes) -> int:
    """0 for the right checksum: over the pseudo-header of RFC 768 and the datagram."""
    datagram = frame[UDP:]
    return checksum(frame[IPV4 + 12 : UDP] + bytes([0, 17]) + len(datagram).to_bytes(2) + datagram)


@fewer
@given(scripts("flip", "replay", "duplicate"), traffics)
def test_only_flip_and_port_of_replay_change_message(script: Script, traffic: Traffic) -> None:
    course = course_of(script, traffic)
    for number, arrival in enumerate(course.arrivals):
        frames = [delivery.frame for _, delivery in course.departures_of(number)]
        changed = frames[-1] if frames else b""
        match arrival.rule:
            case Flip(field=name, bit=bit):
                start, _, _ = slice(*FIELDS[KINDS[arrival.kind][0]][name]).indices(len(arrival.frame) - PAYLOAD)
                assert changed[PAYLOAD:] == flip(arrival.frame[PAYLOAD:], 8 * start + bit)
                assert changed[: UDP + 6] == arrival.frame[: UDP + 6]
                assert udp_checksum_of(changed) == 0
            case Replay(port=int(port)):
                assert frames[0] == arrival.frame
                before, after = arrival.frame[:UDP], arrival.frame[UDP + 2 : UDP + 6]
                assert changed[: UDP + 6] == before + port.to_bytes(2) + after
                assert changed[PAYLOAD:] == arrival.frame[PAYLOAD:]
                assert udp_checksum_of(changed) == 0
            case _:
                assert {*frames} <= {arrival.frame}
