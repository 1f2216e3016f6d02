"""Check the search of bench/search.py on models of a tunnel whose limit is known."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from bench.search import PRECISION, NothingPassedError, Probe, highest_rate


@dataclass
class Model:
    """A tunnel that carries `limit` packets per second and drops the rest.

    sender: the fastest rate of the sender. overload: share of the limit that is left under overload. accidents: numbers
    of probes, from 0, that lose 5 % whatever the rate.
    """

    limit: float
    sender: float = 1e9
    overload: float = 1.0
    accidents: frozenset[int] = frozenset()
    tried: list[float] = field(default_factory=list)

    def probe(self, rate: float) -> Probe:
        number = len(self.tried)
        self.tried.append(rate)
        sent = min(rate, self.sender)
        received = sent if sent <= self.limit else self.limit * self.overload
        if number in self.accidents:
            received *= 0.95
        return Probe(offered=rate, sent=round(sent), received=round(received), seconds=1.0)


@pytest.mark.parametrize("limit", [300, 5000, 12_345, 900_000])
@pytest.mark.parametrize("first", [5000.0, 20_000.0])
@pytest.mark.parametrize("growth", [1.15, 2.0])
def test_search_finds_limit_within_its_precision(limit: float, first: float, growth: float) -> None:
    model = Model(limit)
    best = highest_rate(model.probe, first, growth)
    # A rate up to 1 % above the limit passes, too.
    assert limit / PRECISION <= best.rate <= limit * 1.01
    assert len(model.tried) <= 24


def test_search_finds_limit_when_overload_collapses() -> None:
    best = highest_rate(Model(40_000, overload=0.2).probe, 640_000.0)
    assert 40_000 / PRECISION <= best.rate <= 40_400


def test_search_begins_near_good_guess() -> None:
    model = Model(40_000)
    highest_rate(model.probe, 39_500.0, 1.15)
    assert len(model.tried) <= 7, model.tried


def test_search_ends_when_sender_is_saturated() -> None:
    model = Model(10**6, sender=50_000)
    best = highest_rate(model.probe, 5000.0)
    assert best.rate == 50_000
    assert max(model.tried) <= 4 * 50_000


def test_single_accident_does_not_lower_result() -> None:
    for number in range(6):
        best = highest_rate(Model(40_000, accidents=frozenset({number})).probe, 5000.0)
        assert best.rate >= 40_000 / PRECISION, f"probe {number} lost 5 % by accident"


def test_tunnel_that_carries_nothing_is_refused() -> None:
    with pytest.raises(NothingPassedError, match="1% or more was lost at"):
        highest_rate(Model(0).probe, 5000.0)


def test_loss_of_one_percent_fails() -> None:
    assert not Probe(offered=1000, sent=1000, received=990, seconds=1.0).passes
    assert Probe(offered=1000, sent=1000, received=991, seconds=1.0).passes
    assert not Probe(offered=1000, sent=0, received=0, seconds=1.0).passes
