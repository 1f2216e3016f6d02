from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from refwg import mutants
from refwg.boundary import Endpoint
from refwg.messages import SECOND, MessageType
from selftests.support.pair import Pair

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Apply a mutant until the test ends."""

    def apply(name: str) -> None:
        mutant = mutants.MUTANTS[name]
        monkeypatch.setattr(mutant.owner, mutant.name, getattr(mutant.owner, mutant.name))
        mutants.apply(name)

    return apply


def clamped() -> bool:
    pair = Pair()
    pair.a.device.set_private_key(b"\xff" * 32, 0)
    assert pair.a.device.identity is not None
    return pair.a.device.identity.private[31] == 0x7F


def source_checked() -> bool:
    pair = Pair()
    for prefix in list(pair.b.device.allowed_ips(pair.b.peer)):
        pair.b.device.remove_allowed_ip(pair.b.peer, prefix)
    pair.send(pair.a)
    pair.settle()
    return not pair.b.delivered


def roams() -> bool:
    pair = Pair()
    pair.b.peer.set_endpoint(Endpoint(bytes(4), 9), 0)
    pair.send(pair.a)
    pair.settle()
    return pair.b.peer.endpoint is not None and pair.b.peer.endpoint.port == 1


def keeps_alive() -> bool:
    pair = Pair()
    pair.connect()
    pair.a.device.set_persistent_keepalive(pair.a.peer, 5)
    pair.send(pair.a)
    pair.run(60 * SECOND)
    return len(pair.sent(pair.a, MessageType.DATA)) > 5


def counts() -> bool:
    pair = Pair()
    pair.connect()
    return pair.b.device.statistics.rx_bytes > 0


def makes_mac1() -> bool:
    pair = Pair()
    pair.send(pair.a)
    pair.settle()
    return bool(pair.b.delivered)


PROMISES = {
    "no-clamp": clamped,
    "no-source-check": source_checked,
    "no-roaming": roams,
    "no-keepalive": keeps_alive,
    "stale-counters": counts,
    "wrong-mac1": makes_mac1,
}


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_mutant_breaks_promise_that_holds_without_it(name: str, mutate: Callable[[str], None]) -> None:
    assert PROMISES[name]()
    mutate(name)
    assert not PROMISES[name]()


def test_mutant_without_roaming_takes_configured_endpoint(mutate: Callable[[str], None]) -> None:
    mutate("no-roaming")
    pair = Pair()
    pair.a.peer.set_endpoint(Endpoint(bytes(4), 9), 0)
    assert pair.a.peer.endpoint == Endpoint(bytes(4), 9)
