"""Generate rules of fault scripts for hypothesis, and frames for them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from hypothesis import strategies as st

from harness.wire.messages import FIELDS, FRAGMENT, OTHER
from harness.wire.script import MESSAGES, RULES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.wire.script import Rule

NODES: Final = ("ns1", "ns2")
# Message type and length of each sort of message, by the word that selects it alone.
KINDS: Final = {
    "initiation": (1, 148),
    "response": (2, 92),
    "cookie-reply": (3, 64),
    "keepalive": (4, 32),
    "data": (4, 48),
    "unknown": (5, 48),
}
_WITH_COUNTERS: Final = ("any", "transport", "data", "keepalive")

_small = st.integers(0, 9)
_range = st.tuples(_small, _small).map(lambda pair: f"{min(pair)}-{max(pair)}")
_number: st.SearchStrategy[int | str] = st.one_of(_small, _small.map(str), _range, _small.map("{}-".format))
numbers = st.one_of(_number, st.lists(_number, min_size=1, max_size=3).map(tuple))
# Whole milliseconds, so that sums are not rounded differently.
seconds = st.integers(1, 500).map(lambda milliseconds: milliseconds / 1000)


def _some(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=values)


_SHARES: Final = st.sampled_from([1.0, 0.25, 0.5])
_OWN_VALUES: Final[dict[str, st.SearchStrategy[dict[str, Any]]]] = {
    "drop": st.just({}),
    "hold": _some(behind=st.integers(1, 3), gather=st.integers(1, 3), seconds=seconds),
    "delay": st.fixed_dictionaries({"seconds": seconds}, optional={"jitter": seconds}),
    "duplicate": _some(copies=st.integers(1, 3)),
    "replay": _some(behind=st.integers(1, 3), seconds=seconds, port=st.integers(1, 65535)).filter(
        lambda values: bool({"behind", "seconds"} & {*values})
    ),
}


_COUNTERS: Final = _some(counters=numbers)


def rules(*sorts: str, share: st.SearchStrategy[float] = _SHARES) -> st.SearchStrategy[Rule]:
    """Valid rules of these sorts, or of any, with any of the values that they may have."""
    return st.one_of(*(_rules_of(do, share) for do in sorts or RULES))


def _rules_of(do: str, share: st.SearchStrategy[float]) -> st.SearchStrategy[Rule]:
    conditions = _some(sender=st.sampled_from(NODES), nth=numbers, share=share)
    messages = st.fixed_dictionaries({"message": st.sampled_from(MESSAGES)})
    own_values = st.sampled_from(_FLIPS) if do == "flip" else st.tuples(messages, _OWN_VALUES[do]).map(_merged)
    own_values = own_values.filter(lambda values: "port" not in values or values["message"] not in {FRAGMENT, OTHER})
    make: Callable[..., Rule] = RULES[do]

    def rule(parts: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> Rule:
        values, conditions, counters = parts
        return make(**values, **conditions, **(counters if values["message"] in _WITH_COUNTERS else {}))

    return st.tuples(own_values, conditions, _COUNTERS).map(rule)


def _merged(parts: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _flips() -> Iterator[dict[str, Any]]:
    """Some bits, among them the first and the last, of every field that a flip may change."""
    for message, (kind, _) in KINDS.items():
        for field, (start, end) in FIELDS.get(kind, {}).items():
            if field != "packet":
                last = 8 * ((0 if end is None else end) - start) - 1
                yield from ({"message": message, "field": field, "bit": bit} for bit in (0, 13, last))
            elif message == "data":
                yield from ({"message": message, "field": field, "bit": bit} for bit in (0, 7))


_FLIPS: Final = tuple(_flips())


def frame(message: str, counter: int = 0) -> bytes:
    """An IPv4 frame with a message of this sort, whose bytes 8 to 15 are the counter."""
    kind, size = KINDS[message]
    payload = (bytes([kind, 0, 0, 0]) + bytes(4) + struct.pack("<Q", counter)).ljust(size, b"x")
    udp = struct.pack(">HHHH", 1, 2, 8 + size, 0) + payload
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), bytes(4))
    return bytes(12) + b"\x08\x00" + ip + udp
