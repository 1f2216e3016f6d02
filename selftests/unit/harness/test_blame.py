"""Check the verdict on a failed test: which program is to blame, by the states of its reruns."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from harness.report import blame
from harness.report.blame import Blame, Rerun, Trial, judge
from harness.report.results import Result, Results, read_results
from harness.tables import Table

if TYPE_CHECKING:
    from pathlib import Path

PAIR = Trial(a="mine", b="go", referee="refwg")
ITSELF = Trial(a="mine", b="mine", referee="refwg")
ALONE = Trial(a="mine", b=None, referee="refwg")
LETTERS = {"p": "passed", "f": "failed", "e": "error", "b": "blocked", "n": "not_reached", "x": "xfailed",
           "d": "differs", "s": "skipped", "u": "unsupported"}  # fmt: skip


def ran(trial: Trial, states: str) -> dict[str, Rerun]:
    """The reruns of a trial in its order, a letter for each state; a dot: not run."""
    return {
        pair: Rerun(pair=pair, state=LETTERS[letter], message=f"{pair} did it\nand more")
        for pair, letter in zip(trial.pairs, states, strict=True)
        if letter != "."
    }


def test_pairs_are_run_in_fixed_order() -> None:
    assert PAIR.pairs == ["mine~go", "mine~refwg", "refwg~go", "refwg~refwg", "go~mine"]
    assert ITSELF.pairs == ["mine~mine", "mine~refwg", "refwg~mine", "refwg~refwg"]
    assert ALONE.pairs == ["mine", "refwg"]


@pytest.mark.parametrize(
    ("states", "verdict", "programs", "text"),
    [
        ("ffppp", "a_deviates", ("mine",), "mine deviates: mine~refwg fails, too, and refwg~go passes; go~mine passes"),
        ("efpdf", "a_deviates", ("mine",), "mine deviates: mine~refwg fails, too, and refwg~go passes; go~mine fails"),
        ("fxpp.", "a_deviates", ("mine",), "mine deviates: mine~refwg fails, too, and refwg~go passes"),
        ("fpfpp", "b_does_not_tolerate", ("go",),
         "go does not tolerate it: refwg~go fails, too, and mine~refwg passes; go~mine passes"),
        ("fdbp.", "b_does_not_tolerate", ("go",),
         "go does not tolerate it: refwg~go fails, too, and mine~refwg passes"),
        ("ffnps", "both_deviate", ("mine", "go"), "mine and go deviate: A and B fail with refwg, each"),
        ("fpppf", "only_together", ("mine", "go"),
         "mine and go fail only together: each side passes with refwg; go~mine fails"),
        ("fppfp", "test_or_machine", (), "refwg~refwg fails, too: the test or the machine is at fault"),
        ("f..f.", "test_or_machine", (), "refwg~refwg fails, too: the test or the machine is at fault"),
        ("pffff", "flaky", (), "mine~go failed at first, and passed when it was run again with the same seed"),
        ("d....", "flaky", (), "mine~go failed at first, and passed when it was run again with the same seed"),
        (".....", "undecided", (), "mine~go was not run again: no time"),
        ("ff...", "undecided", (), "refwg~go was not run again: no time"),
        ("ffp..", "undecided", (), "refwg~refwg was not run again: no time"),
        ("fspp.", "undecided", (), "mine~refwg is skipped: mine~refwg did it"),
        ("ffpxp", "undecided", (), "refwg~refwg is xfailed: refwg~refwg did it"),
    ],
)  # fmt: skip
def test_verdict_on_pair(states: str, verdict: str, programs: tuple[str, ...], text: str) -> None:
    found = judge(PAIR, ran(PAIR, states), "error", "no time")
    assert (found.verdict, found.programs, found.text, found.first) == (verdict, programs, text, "error")
    assert [rerun.pair for rerun in found.reruns] == list(ran(PAIR, states))


@pytest.mark.parametrize(
    ("states", "verdict", "text"),
    [
        ("ffpp", "a_deviates", "mine deviates: mine~refwg fails, too, and refwg~mine passes"),
        ("ffbp", "both_deviate", "mine deviates: A and B fail with refwg, each"),
        ("fppp", "only_together", "mine fails only together: each side passes with refwg"),
    ],
)
def test_verdict_on_program_with_itself_names_it_once(states: str, verdict: str, text: str) -> None:
    found = judge(ITSELF, ran(ITSELF, states))
    assert (found.verdict, found.programs, found.text) == (verdict, ("mine",), text)


@pytest.mark.parametrize(
    ("states", "verdict", "programs", "text"),
    [
        ("fp", "a_deviates", ("mine",), "mine deviates: refwg passes the same test"),
        ("ff", "test_or_machine", (), "refwg fails, too: the test or the machine is at fault"),
        ("p.", "flaky", (), "mine failed at first, and passed when it was run again with the same seed"),
        ("f.", "undecided", (), "refwg was not run again: it has no result"),
    ],
)
def test_verdict_on_one_implementation(states: str, verdict: str, programs: tuple[str, ...], text: str) -> None:
    found = judge(ALONE, ran(ALONE, states))
    assert (found.verdict, found.programs, found.text) == (verdict, programs, text)


def test_rerun_without_message_is_named_by_state() -> None:
    assert judge(ALONE, {"mine": Rerun(pair="mine", state="not_run")}).text == "mine is not run"


def test_only_settled_verdict_names_programs() -> None:
    assert Blame(verdict="flaky").settled is None
    assert blame.undecided("failed", "no time").settled is None
    assert Blame(verdict="test_or_machine").settled == ()
    assert Blame(verdict="a_deviates", programs=("mine",)).settled == ("mine",)
    assert (Blame(verdict="only_together").words, Blame(verdict="later").words) == ("only together", "later")


def test_sender_of_offending_datagram_is_blamed() -> None:
    assert blame.of_sender("mine", "go", "a") == Blame(
        verdict="a_deviates", programs=("mine",), text="mine deviates: it has sent the datagram"
    )
    assert (blame.of_sender("mine", "go", "b").words, blame.of_sender("mine", "go", "b").settled) == (
        "B deviates",
        ("go",),
    )


def test_referee_is_neither_side() -> None:
    known = ["refwg", "wireguard-go", "kernel"]
    assert blame.choose_referee("mine", "go", known) == "refwg"
    assert blame.choose_referee("refwg", "wireguard-go", known) == "kernel"
    assert blame.choose_referee("refwg+no-roaming", None, known) == "refwg"
    assert blame.choose_referee("refwg", None, known[:1]) == ""


def test_each_cause_has_its_first_turn_before_second() -> None:
    assert blame.by_turns([["a1", "a2", "a3"], ["b1"], ["c1", "c2"]]) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert blame.by_turns([]) == []


LATE = blame.undecided("failed", "no time")
LIKE = ", like the other tests of this cause; not run again itself"


@pytest.mark.parametrize(
    ("pair", "others", "verdict", "programs", "text"),
    [
        ("mine~go", [("a_deviates", "mine")], "a_deviates", ("mine",), f"mine deviates{LIKE}"),
        ("mine", [("a_deviates", "mine")], "a_deviates", ("mine",), f"mine deviates{LIKE}"),
        # Undecided ones do not count; the program has the other role in this test.
        ("go~mine", [("a_deviates", "mine"), ("undecided",)], "b_does_not_tolerate", ("mine",),
         f"mine does not tolerate it{LIKE}"),
        ("mine~mine", [("b_does_not_tolerate", "mine")], "b_does_not_tolerate", ("mine",),
         f"mine does not tolerate it{LIKE}"),
        ("go~mine", [("only_together", "mine", "go")], "only_together", ("go", "mine"),
         f"only together: go and mine{LIKE}"),
        ("mine~go", [("both_deviate", "mine", "go")], "both_deviate", ("mine", "go"), f"to blame: mine and go{LIKE}"),
        ("mine~go", [("test_or_machine",)] * 2, "test_or_machine", (), f"the test or the machine is at fault{LIKE}"),
    ],
)  # fmt: skip
def test_late_test_is_blamed_like_others_of_its_cause(
    pair: str, others: list[tuple[str, ...]], verdict: str, programs: tuple[str, ...], text: str
) -> None:
    a, _, b = pair.partition("~")
    found = blame.like_others(a, b, LATE, [Blame(verdict=one, programs=tuple(names)) for one, *names in others])
    assert found == Blame(verdict=verdict, programs=programs, text=text, inferred=True)
    assert found.settled == programs


@pytest.mark.parametrize(
    "others",
    [
        [],
        [("undecided",)],
        [("flaky",)],
        [("a_deviates", "mine"), ("flaky",)],
        [("a_deviates", "mine"), ("b_does_not_tolerate", "go")],
        [("only_together", "mine", "go"), ("both_deviate", "mine", "go")],
        [("a_deviates", "rust")],
        [("only_together", "mine", "rust")],
    ],
)
def test_late_test_stays_undecided_unless_others_agree(others: list[tuple[str, ...]]) -> None:
    made = [Blame(verdict=one, programs=tuple(names)) for one, *names in others]
    assert blame.like_others("mine", "go", LATE, made) == LATE


@pytest.mark.parametrize(
    ("identity", "other"),
    [
        ("t.py::test_x[mine~go]", "t.py::test_x[refwg~go]"),
        ("t.py::test_x[mine~go-v4[1]]", "t.py::test_x[refwg~go-v4[1]]"),
        ("t.py::test_x[v4-mine~go]", ""),
        ("t.py::test_x[mine~go2]", ""),
        ("t.py::test_x", ""),
    ],
)
def test_id_of_other_pair_keeps_other_parameters(identity: str, other: str) -> None:
    assert blame.other_id(identity, "mine~go", "refwg~go") == other


def test_blame_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = judge(PAIR, ran(PAIR, "ffppp"))
    results = Results(7)
    results.by_id["x", "netns", "6.1"] = Result(id="x", state="failed", blame=found)
    inferred = blame.like_others("mine", "go", LATE, [found])
    results.by_id["z", "netns", "6.1"] = Result(id="z", state="failed", blame=inferred)
    results.by_id["y", "netns", "6.1"] = Result(id="y", state="passed")
    results.write(tmp_path / "results.json")
    blamed, late, unblamed = read_results(tmp_path / "results.json").results
    assert (blamed.blame, blamed.blamed) == (found, ("mine",))
    assert (late.blame, late.is_inferred, blamed.is_inferred) == (inferred, True, False)
    assert (unblamed.blame, unblamed.blamed) == (None, None)


def test_blame_of_other_version_is_read_with_defaults() -> None:
    assert blame.read_blame(Table("results", {"verdict": "later"})) == Blame(verdict="later")
    assert json.loads(json.dumps(asdict(Blame(verdict="flaky"))))["programs"] == []
