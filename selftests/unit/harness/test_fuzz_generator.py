from __future__ import annotations

from collections import Counter

import pytest

from harness.fuzz import inputs
from harness.fuzz.choices import Guided, Seeded, pick, weighted
from harness.fuzz.generator import CONFIGURATION, STATES, Generator, length_of_way
from harness.fuzz.grammar import Inner, inner_packet, request
from harness.fuzz.inputs import Case, Step

INNER = Inner("192.168.241.2", "fd00::2", "192.168.241.1", "fd00::1")


def cases(seed: int, count: int, *surfaces: str) -> list[Case]:
    generator, choose = Generator(INNER, surfaces or ("packets", "uapi")), Seeded(str(seed))
    made: list[Case] = []
    for number in range(count):
        made.append(generator.case(choose, made[:10] if number > count // 2 else ()))
    return made


def test_seed_makes_cases_reproducible() -> None:
    assert cases(1, 200) == cases(1, 200)
    assert cases(1, 200) != cases(2, 200)


def test_every_message_is_sent_in_every_state() -> None:
    pairs = {(case.state, step.kind) for case in cases(3, 3000, "packets") for step in case.steps if step.changes}
    messages = (inputs.INITIATION, inputs.RESPONSE, inputs.COOKIE, inputs.DATA)
    assert {(state, kind) for state in STATES for kind in messages} <= pairs


def test_way_to_state_ends_at_first_other_step() -> None:
    way = STATES["two sessions"]
    assert length_of_way(Case("two sessions", (*way, Step(inputs.DATA)))) == len(way)
    # A long wait that the generator made must not be waited for, though it stands where the state has a wait.
    without_first = (*way[1:2], way[0], Step(inputs.WAIT, counter=5000))
    assert length_of_way(Case("two sessions", without_first)) == 0
    assert length_of_way(Case("two sessions", (*way[:2], Step(inputs.WAIT, counter=5000)))) == 2
    assert length_of_way(Case(CONFIGURATION, (Step(inputs.UAPI),))) == 0


def test_every_kind_of_step_and_change_is_made() -> None:
    made = cases(4, 3000)
    steps = [step for case in made for step in case.steps]
    assert {step.kind for step in steps} == set(inputs.STEPS)
    assert {change.kind for step in steps for change in step.changes} == set(inputs.CHANGES)


@pytest.mark.parametrize("surface", ["packets", "uapi"])
def test_surface_is_only_one_attacked(surface: str) -> None:
    states = {case.state for case in cases(5, 300, surface)}
    assert (CONFIGURATION in states) == (surface == "uapi")
    assert bool(states & STATES.keys()) == (surface == "packets")


def test_fresh_case_begins_with_steps_of_its_state() -> None:
    generator = Generator(INNER, ("packets",))
    for seed in range(100):
        case = generator.case(Seeded(str(seed)))
        assert case.steps[: len(STATES[case.state])] == STATES[case.state]
        assert len(case.steps) > len(STATES[case.state])


def test_case_of_corpus_is_varied_even_when_empty() -> None:
    generator = Generator(INNER)
    for state in ("no session", CONFIGURATION):
        varied = [generator.case(Seeded(str(seed)), [Case(state, ())]) for seed in range(40)]
        assert any(case.state == state and case.steps for case in varied)


def test_varied_steps_keep_their_length_bounded() -> None:
    generator, choose = Generator(INNER), Seeded("7")
    case = Case("no session", (Step(inputs.BYTES, bytes(5000)),) * 200)
    for _ in range(200):
        made = generator.case(choose, [case])
        assert len(made.steps) <= 60


def test_guided_choices_follow_their_bytes() -> None:
    choose = Guided(bytes([5, 1, 2, 200]))
    assert choose.below(10) == 5
    assert choose.below(1000) == 258
    assert choose.below(100) == 0
    assert choose.below(7) == 0
    assert choose.content(3) == bytes(3)
    assert Guided(b"abcdefgh").content(10) == b"abcdabcdab"
    assert Guided(b"").below(1) == 0


def test_guided_generator_makes_case_of_any_bytes() -> None:
    generator = Generator(INNER)
    contents = [Seeded(str(seed)).content(300) for seed in range(200)]
    made = {generator.case(Guided(content)).to_json() for content in contents}
    assert len(made) > 190
    assert generator.case(Guided(b"")).steps


def test_weights_decide_how_often_item_is_chosen() -> None:
    choose = Seeded("1")
    counts = Counter(weighted(choose, [(3, "often"), (0, "never"), (1, "seldom")]) for _ in range(4000))
    assert counts.keys() == {"often", "seldom"}
    assert 2800 < counts["often"] < 3200
    assert {pick(choose, "abc") for _ in range(100)} == set("abc")


def test_inner_packets_are_valid_and_broken() -> None:
    choose = Seeded("2")
    packets = [inner_packet(choose, INNER) for _ in range(4000)]
    firsts = Counter(packet[:1] for packet in packets)
    assert firsts[b"\x45"] > 500
    assert firsts[b"\x60"] > 500
    assert len(firsts) > 50
    assert b"" in packets
    assert max(map(len, packets)) > 60000
    short = [packet for packet in packets if packet[:1] == b"\x45" and int.from_bytes(packet[2:4]) > len(packet)]
    assert len(short) > 100


def test_requests_are_valid_and_broken() -> None:
    choose = Seeded("3")
    requests = [request(choose) for _ in range(4000)]
    assert max(map(len, requests)) > 70000
    assert any(b"\0" in text for text in requests)
    assert any(b"\r\n" in text for text in requests)
    assert any(text.count(b"set=1") == 2 for text in requests)
    assert sum(not text.endswith(b"\n\n") for text in requests) > 100
    keys = {line.partition(b"=")[0] for text in requests for line in text.split(b"\n")}
    assert {b"private_key", b"public_key", b"endpoint", b"allowed_ip", b"fwmark", b"listen_port"} <= keys
