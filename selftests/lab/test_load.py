"""Check the load generator of scripted peers: it reports load only where there is load, and keeps its rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import Registry, Target, let_pass
from harness.errors import LoadNotReached

if TYPE_CHECKING:
    from harness import Lab

RATE, SECONDS = 2_000, 1.0


@pytest.fixture
def target(lab: Lab) -> Target:
    return Target(lab, Registry().get("refwg"))


@pytest.mark.alone
def test_device_that_answers_nothing_is_never_under_load(target: Target) -> None:
    target.node.set_link("wg0", up=False)
    with pytest.raises(LoadNotReached, match=r"no cookie reply to \d+ initiations in"), target.load():
        pass


@pytest.mark.alone
def test_canary_is_unanswered_without_load(target: Target) -> None:
    with target.load() as load:
        assert load.lasts()
        let_pass(2.0, "a device forgets load after a second")
        assert not load.lasts()
        assert load.during(lambda: None), "the load was not renewed"
    assert not load.others


@pytest.mark.alone
def test_flood_keeps_its_rate_and_ends(target: Target) -> None:
    with target.load() as load, load.flood(RATE) as flood:
        let_pass(SECONDS, "the flood goes on")
        flood.stop()
        sent = flood.sent
        assert flood.late_replies(sent) <= sent
    assert flood.sent == sent
    assert flood.rate <= RATE * 1.2
    assert 0 < flood.replies <= sent
