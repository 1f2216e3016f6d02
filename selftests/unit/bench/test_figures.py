"""Check medians, spreads and paired ratios of bench/figures.py against hand-computed values."""

from __future__ import annotations

import pytest

from bench.figures import Figure, Results, document, identifier, shown, table

TCP = Figure(name="tcp1", title="TCP, one stream", unit="Mbit/s", group="tcp1", more_is_better=True)
LAB = Figure(name="lab_over_shell", title="Set-up", unit="", group="topology")


def results(**rounds: list[float | None]) -> Results:
    """Make results of figure tcp1: a value for each round, None where none was measured."""
    made = Results()
    for name, values in rounds.items():
        for number, value in enumerate(values, 1):
            if value is not None:
                made.add(number, name, {"tcp1": value})
    return made


def test_spread_has_median_least_and_greatest_value() -> None:
    spread = results(refwg=[3.0, 10.0, 1.0, 2.0]).spread("tcp1", "refwg")
    assert spread is not None
    assert (spread.median, spread.least, spread.most) == (2.5, 1.0, 10.0)


def test_spread_of_unmeasured_figure_is_none() -> None:
    assert results(refwg=[1.0]).spread("tcp8", "refwg") is None


def test_ratio_is_median_of_ratios_within_rounds() -> None:
    # The machine was ten times slower in the second round. The ratio of the medians would be 20 / 50.
    made = results(refwg=[50.0, 2.0, 20.0], go=[100.0, 10.0, 50.0])
    ratio = made.ratio("tcp1", "refwg", "go")
    assert ratio is not None
    assert (ratio.median, ratio.least, ratio.most) == (0.4, 0.2, 0.5)
    other = results(refwg=[50.0, 2.0, 20.0], go=[100.0, 8.0, 1000.0]).ratio("tcp1", "refwg", "go")
    assert other is not None
    assert other.median == 0.25, "a ratio of medians would be 0.2"


def test_ratio_ignores_rounds_that_lack_either_value() -> None:
    ratio = results(refwg=[1.0, None, 3.0], go=[None, 7.0, 6.0]).ratio("tcp1", "refwg", "go")
    assert ratio is not None
    assert (ratio.median, ratio.least, ratio.most) == (0.5, 0.5, 0.5)


def test_ratio_without_common_round_is_none() -> None:
    assert results(refwg=[1.0, None], go=[None, 7.0]).ratio("tcp1", "refwg", "go") is None


def test_ratio_to_zero_is_left_out() -> None:
    assert results(refwg=[1.0], go=[0.0]).ratio("tcp1", "refwg", "go") is None


def test_document_has_one_ratio_for_each_pair_in_order() -> None:
    made = Results()
    for name, value in {"refwg+simple": 30.0, "wireguard-go": 60.0, "boringtun": 20.0}.items():
        made.add(1, name, {"tcp1": value})
    content = document(made, [TCP], ["refwg+simple", "wireguard-go", "boringtun"], {"rounds": 1})
    assert content["ratios"] == {
        "tcp1_refwg_simple_over_wireguard_go": 0.5,
        "tcp1_refwg_simple_over_boringtun": 1.5,
        "tcp1_wireguard_go_over_boringtun": 3.0,
    }
    assert content["rounds"] == 1


def test_document_keeps_number_of_round_of_each_value() -> None:
    content = document(results(refwg=[1.0, None, 3.0]), [TCP], ["refwg"], {})
    (run,) = content["runs"]
    assert (run["name"], run["rounds"], run["values"], run["median"]) == ("tcp1_refwg", [1, 3], [1.0, 3.0], 2.0)


def test_document_has_figure_of_lab_under_its_own_name() -> None:
    made = Results()
    made.add(1, "", {"lab_over_shell": 0.25})
    content = document(made, [LAB], ["refwg"], {})
    assert [run["name"] for run in content["runs"]] == ["lab_over_shell"]
    assert content["ratios"] == {"lab_over_shell": 0.25}


def test_table_shows_ratio_to_baseline_and_failures_as_dash() -> None:
    made = results(refwg=[226.0], go=[2290.0])
    made.add(1, "go", {"tcp8": 5.0})
    tcp8 = Figure(name="tcp8", title="", unit="Mbit/s", group="tcp8")
    lines = [line.split() for line in table(made, [TCP, tcp8], ["refwg", "go"], "go").splitlines()]
    assert lines == [
        ["refwg", "go"],
        ["tcp1", "Mbit/s", "226", "(0.10x)", "2290"],
        ["tcp8", "Mbit/s", "-", "5.00"],
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2290.4, "2290"), (226.04, "226"), (12.34, "12.3"), (0.3829, "0.383"), (0.0123, "0.0123"), (1, "1.00")],
)
def test_number_is_shown_with_three_significant_digits(value: float, text: str) -> None:
    assert shown(value) == text


def test_identifier_replaces_signs_of_name() -> None:
    assert identifier("refwg+simple") == "refwg_simple"
    assert identifier("wireguard-go-debian") == "wireguard_go_debian"
