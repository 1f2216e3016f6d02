"""Check causes: equal failures are one entry, and the program in all of them is to blame.

The messages are those of real runs: refwg's mutants and other programs against wireguard-go.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from harness.report.blame import Blame
from harness.report.causes import find_causes, fingerprint, tally_of_causes
from harness.report.results import Result

if TYPE_CHECKING:
    from harness.report.causes import Cause

# A lost ping where B does not follow A's endpoint, and one where no handshake is completed.
ROAMING: Final = (
    "ns1: ping 192.168.241.2: 0 of 1 answered, not [0]: B's endpoint for A is 127.0.0.1:1, A listens on 9998\n"
    "A (wireguard-go) has a handshake, sent 404 and received 220 bytes; its endpoint for B is [::1]:2\n"
    "B (refwg+no-roaming) has a handshake, sent 348 and received 404 bytes; its endpoint for A is 127.0.0.1:1"
)
MAC: Final = (
    "ns2: ping fd00::1: 0 of 10 answered, not [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]: neither has a handshake\n"
    "A (refwg+wrong-mac1) has no handshake, sent 148 and received 0 bytes; its endpoint for B is 127.0.0.1:2"
)


def result(name: str, pair: str, message: str, state: str = "failed", *requirements: str) -> Result:
    """A result of a test; name: with its parameters, as `test_x[v4]`."""
    sides = [{"impl": impl, "version": "1"} for impl in pair.split("~") if impl]
    test, _, parameters = name.removesuffix("]").partition("[")
    inside = "-".join(filter(None, (pair, parameters)))
    return Result(
        id=f"t.py::{test}" + (f"[{inside}]" if inside else ""),
        a=sides[0] if sides else None,
        b=sides[1] if len(sides) > 1 else None,
        state=state,
        message=message,
        requirements=list(requirements),
    )


def shape(causes: list[Cause[Result]]) -> list[tuple[str, int]]:
    return [(cause.blame, len(cause.witnesses)) for cause in causes]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ROAMING, ROAMING.replace("ns1", "ns2").replace("192.168.241.2", "fd00::2").replace("9998", "9999")),
        (ROAMING, ROAMING.replace("B's", "A's").replace("A listens", "B listens").replace("A is", "B is")),
        (ROAMING, ROAMING.replace("127.0.0.1:1,", "[fd00:aa::1]:51820,") + "\nA logs 'Failed to load updated MTU'"),
        (MAC, MAC.replace("0 of 10", "0 of 1").replace("[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]", "[0]")),
        (MAC, MAC.replace("[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]", "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, and 290 more]")),
        ("A received 1280 bytes, not 1428: 148 too few", "B received 0 bytes, not 1372: 1372 too few"),
        ("a reflected message was counted\nassert (0, 768) == (768, 768)",
         "a reflected message was counted\nassert (768, 1) == (768, 768)"),
        ("mine (pid 123) ended with status -9 during the test", "mine (pid 4) ended with status 2 during the test"),
        ("it keeps AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=, not clamped",
         "it keeps j0DFrbaPJWJK5bIU6nZ6bslNgp09e14a0bpvPiE4KF8=, not clamped"),
        ("waited 3 s for A to confirm; seen: no message", "waited 30 s for A to confirm; seen: 1.3 1>2 data 3 (128)"),
        ("A rekeys 119.98 s after its initiation", "A rekeys 119.2 s after its initiation"),
        ("A has confirmed session '0a1b2c3d'", "A has confirmed session 'deadbee1'"),
        ("assert Endpoint(10.0.0.1:1) == Endpoint(10.0.0.2:1)", "assert Endpoint([::1]:1) == Endpoint([::2]:1)"),
    ],
)  # fmt: skip
def test_same_deviation_has_one_fingerprint(one: str, other: str) -> None:
    assert fingerprint(result("test_x", "mine~go", one)) == fingerprint(result("test_x[v6]", "rust~mine", other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ROAMING, MAC),
        ("ns2: ping ::1: 0 of 10 answered", "ns2: ping ::1: 8 of 10 answered"),
        ("A received 148 bytes, not 92: 56 too many", "A received 92 bytes, not 148: 56 too few"),
        ("assert 'ns1 data' == 'ns1 keepalive'", "assert 'ns2 initiation' == 'ns1 data'"),
        (
            "assert 0 == 1428\n +  where 0 = PeerState(peer j0DFrbaP...=).rx_bytes",
            "assert 0 == 25\n +  where 0 = PeerState(peer j0DFrbaP...=).persistent_keepalive",
        ),
        (
            "wg0 (uapi): EINVAL: set private_key: Invalid argument",
            "wg0 (uapi): EADDRINUSE: set listen_port 1: Address already in use",
        ),
        ("[XPASS(strict)] it passes: RT-11: it differs", "[XPASS(strict)] it passes: RT-05: it differs"),
    ],
)
def test_different_deviations_have_different_fingerprints(one: str, other: str) -> None:
    assert fingerprint(result("test_x", "mine~go", one)) != fingerprint(result("test_x", "mine~go", other))


@pytest.mark.parametrize(
    ("message", "is_shared"),
    [
        (ROAMING, True),
        ("a replayed message was counted\nassert 0 == 1764", True),
        ("assert (0, 660) == (604, 660)", False),
        ("DID NOT RAISE ControlError", False),
        ("Timeout (>120.0s) from pytest-timeout.", False),
        ("TypeError: 'NoneType' object is not subscriptable", False),
        ("", False),
    ],
)
def test_message_that_says_little_belongs_to_its_test(message: str, is_shared: bool) -> None:
    witnesses = [result(name, "mine~go", message) for name in ("test_x[v4]", "test_x[v6]", "test_y")]
    assert shape(find_causes(witnesses)) == (
        [("go or mine", 3)] if is_shared else [("go or mine", 2), ("go or mine", 1)]
    )


def test_program_in_all_failures_is_blamed() -> None:
    pairs = ["mine~go", "mine~rust", "go~mine", "rust~mine", "mine~mine"]
    assert shape(find_causes(result("test_x", pair, ROAMING) for pair in pairs)) == [("mine", 5)]


def test_two_programs_with_equal_defect_are_two_causes() -> None:
    pairs = ["mine~go", "rust~mine", "mine~mine", "yours~go", "rust~yours"]
    assert shape(find_causes(result("test_x", pair, MAC) for pair in pairs)) == [("mine", 3), ("yours", 2)]


def test_failure_of_one_pair_blames_both_programs() -> None:
    passed = [result("test_x", pair, "", "passed") for pair in ("go~go", "mine~go")]
    witnesses = [result("test_x[v6]", "go~mine", MAC)]
    assert shape(find_causes(witnesses, passed)) == [("go or mine", 1)]


def test_program_that_passes_with_other_peer_is_cleared() -> None:
    passed = [result("test_x[v6]", pair, "", "passed") for pair in ("go~go", "rust~mine")]
    assert shape(find_causes([result("test_x[v6]", "go~mine", MAC)], passed[:1])) == [("mine", 1)]
    # Both are cleared: it is the pair.
    assert shape(find_causes([result("test_x[v6]", "go~mine", MAC)], passed)) == [("go or mine", 1)]


def test_passing_in_other_role_clears_nothing() -> None:
    passed = [result("test_x", "rust~go", "", "passed")]
    assert shape(find_causes([result("test_x", "go~mine", MAC)], passed)) == [("go or mine", 1)]


def test_program_that_fails_with_itself_is_blamed_first() -> None:
    pairs = ["go~mine", "mine~mine", "go~rust"]
    assert shape(find_causes(result("test_x", pair, MAC) for pair in pairs)) == [("mine", 2), ("go or rust", 1)]


def with_blame(witness: Result, verdict: str, *programs: str) -> Result:
    return replace(witness, blame=Blame(verdict=verdict, programs=programs))


def test_program_that_reruns_name_is_blamed() -> None:
    passed = [result("test_x", pair, "", "passed") for pair in ("rust~mine", "rust~go")]
    seen = [result("test_x", pair, MAC) for pair in ("go~mine", "mine~go", "mine~rust")]
    seen[1] = with_blame(seen[1], "b_does_not_tolerate", "go")
    # go~mine was not run again, and has the same message and the same program. mine~rust has not.
    causes = find_causes(seen, passed)
    assert shape(causes) == [("go", 2), ("mine or rust", 1)]
    assert [cause.proof for cause in causes] == [seen[1], None]
    assert [witness.pair for witness in causes[0].witnesses] == ["go~mine", "mine~go"]


def test_pair_that_fails_only_together_blames_both_in_any_order() -> None:
    seen = [
        with_blame(result("test_x", pair, MAC), "only_together", *pair.split("~")) for pair in ("go~mine", "mine~go")
    ]
    assert shape(find_causes(seen)) == [("go or mine", 2)]


def test_one_program_explains_more_than_two_together() -> None:
    seen = [
        with_blame(result("test_x", "go~mine", MAC), "only_together", "go", "mine"),
        with_blame(result("test_x", "mine~rust", MAC), "a_deviates", "mine"),
        result("test_x", "mine~go", MAC),
    ]
    assert shape(find_causes(seen)) == [("mine", 2), ("go or mine", 1)]


def test_failure_that_no_program_caused_blames_test_or_machine() -> None:
    seen = [with_blame(result("test_x", "go~mine", MAC), "test_or_machine"), result("test_x", "go~rust", MAC)]
    assert shape(find_causes(seen)) == [("the test or the machine", 1), ("go or rust", 1)]


def test_proof_of_cause_is_test_that_was_run_again() -> None:
    seen = [with_blame(result(name, "go~mine", MAC), "a_deviates", "go") for name in ("test_a", "test_b")]
    seen[0].blame = replace(seen[0].blame or Blame(verdict=""), inferred=True)
    (cause,) = find_causes(seen)
    assert cause.proof is seen[1]


def test_flaky_failure_is_not_blamed_like_constant_one() -> None:
    seen = [
        with_blame(result("test_x", "go~mine", MAC), "a_deviates", "go"),
        with_blame(result("test_y", "mine~go", MAC, "flaky"), "flaky"),
    ]
    assert shape(find_causes(seen)) == [("go", 1), ("go or mine", 1)]


def test_failures_without_implementation_blame_none() -> None:
    assert shape(find_causes([result("test_x", "", "node 'left' already exists")] * 2)) == [("", 2)]


def test_tests_blocked_for_one_reason_are_one_cause() -> None:
    reason = "mine does not complete a handshake with refwg"
    blocked = [result(f"test_{n}[v4]", "mine~refwg", reason, "blocked") for n in range(12)]
    (cause,) = find_causes(blocked)
    assert (len(cause.witnesses), cause.states) == (12, [("blocked", 12)])


NO_COOKIE: Final = "made with neither cookie, expected made with the first cookie"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a refused message (replay) moved data to ('192.168.1.77', 47199)",
         "a refused message (too old) moved data to ('192.168.1.77', 59976)"),
        ("it sent nothing (v4)", "it sent nothing"),
        (f"mac2 of response 2 is {NO_COOKIE}", f"mac2 of the initiation after a cookie reply is {NO_COOKIE}"),
        ("a replay was answered: response of 92 bytes from 192.168.1.1:1",
         "positive control failed: no replay is answered: a replay was answered: response of 92 bytes from [::1]:1"),
    ],
)  # fmt: skip
def test_variants_of_one_deviation_are_one_cause(one: str, other: str) -> None:
    states = ["blocked" if text.startswith("positive control failed") else "failed" for text in (one, other)]
    seen = [result("test_x", "mine", one, states[0]), result("test_a", "mine", other, states[1])]
    (cause,) = find_causes(seen)
    assert (len(cause.witnesses), cause.typical.state) == (2, "failed")
    # The same with two programs are two deviations.
    assert len(find_causes([seen[0], result("test_a", "yours", other, states[1])])) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mac2 of a response is 7, expected 9", "mac2 of an initiation is 8, expected 9"),
        (f"mac2 of a response is {NO_COOKIE}", f"mac1 of a response is {NO_COOKIE}"),
        ("positive control failed: x: a replay was answered", "positive control failed: x: a replay was delivered"),
        ("positive control failed: x: assert 1 == 2", "assert 1 == 2"),
    ],
)
def test_other_deviations_are_other_causes(one: str, other: str) -> None:
    assert len(find_causes([result("test_x", "mine", one), result("test_a", "mine", other)])) == 2


def test_causes_are_same_in_any_order_of_results() -> None:
    witnesses = [
        *(result(f"test_{n}", f"mine~{peer}", ROAMING, "failed", "RT-03") for n in range(6) for peer in ("go", "rust")),
        *(result("test_7", f"{peer}~mine", MAC, "error", "HS-01", "RT-03") for peer in ("go", "rust")),
        result("test_8", "go~rust", "assert 1 == 2"),
    ]
    expected = find_causes(witnesses)
    assert shape(expected) == [("mine", 12), ("mine", 2), ("go or rust", 1)]
    for seed in range(9):
        assert find_causes(random.Random(seed).sample(witnesses, len(witnesses))) == expected  # noqa: S311


def test_equally_frequent_causes_begin_with_clearest() -> None:
    # The failures of a wireguard-go that accepts an initiation whose timestamp is equal to the last one.
    flood = replace(result("test_x", "mine", "a flood is answered", "failed", "DOS-01"), id="test_floods.py::test_x")
    expected = [
        flood,
        result("test_forgotten", "mine", "positive control failed: x: it answered again", "blocked", "HS-10"),
        result("test_bad", "mine", "a bad initiation was answered", "failed", "DOS-10", "DOS-07"),
        result("test_named", "mine", "a bad initiation has an effect", "failed"),
        result("test_older", "mine", "the device answered an older timestamp", "failed", "HS-08"),
    ]
    _, blocked, several, none, clear = expected
    causes = find_causes(expected)
    assert [cause.typical for cause in causes] == [clear, several, none, blocked, flood]


def test_most_frequent_message_is_shown_with_all_requirements() -> None:
    texts = ["1 lost\nlog a", "2 lost", "3 lost", "2 lost"]
    (cause,) = find_causes(result(f"test_{n}", "mine", text, "failed", f"R-{n % 2}") for n, text in enumerate(texts))
    assert (cause.typical.message, cause.requirements) == ("2 lost", ["R-0", "R-1"])


def test_requirement_that_most_tests_cite_stands_first() -> None:
    cited = [("R-1", "R-2"), ("R-2", "R-3"), ("R-3", "R-2")]
    (cause,) = find_causes(result(f"test_{n}", "mine", MAC, "failed", *ids) for n, ids in enumerate(cited))
    assert cause.requirements == ["R-2", "R-3", "R-1"]


@pytest.mark.parametrize(
    ("failures", "causes", "text"),
    [(38, 7, "38 failures of 7 causes"), (2, 1, "2 failures of 1 cause"), (1, 1, "1 failure of 1 cause")],
)
def test_causes_are_counted_in_words(failures: int, causes: int, text: str) -> None:
    assert tally_of_causes(failures, causes) == text
