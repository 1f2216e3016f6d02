"""Check fault scripts: TOML gives the same records, each mistake is named in one line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import UsageError
from harness.wire import script
from harness.wire.script import Delay, Drop, Duplicate, Flip, Hold, Replay, Script

if TYPE_CHECKING:
    from harness.wire.script import Rule

ROOT = Path(script.__file__).parents[2]
EVERYTHING = """\
seed = 7

[[rule]]
do = "drop"
message = "response"
nth = 2

[[rule]]
do = "hold"
message = "data"
sender = "ns1"
counters = "5-9"
behind = 1

[[rule]]
do = "flip"
message = "initiation"
field = "mac1"
bit = 127
nth = [1, "4-6", "9-"]

[[rule]]
do = "replay"
message = "initiation"
seconds = 0.05
port = 7777

[[rule]]
do = "delay"
seconds = 0.3
jitter = 0.1
share = 0.5

[[rule]]
do = "duplicate"
message = "keepalive"
copies = 2
optional = true
"""


def test_fault_script_file_loads_as_equal_records(tmp_path: Path) -> None:
    path = tmp_path / "script.toml"
    path.write_text(EVERYTHING)
    assert script.load_script(path) == Script(
        rules=(
            Drop(message="response", nth=2),
            Hold(message="data", sender="ns1", counters="5-9", behind=1),
            Flip(message="initiation", field="mac1", bit=127, nth=(1, "4-6", "9-")),
            Replay(message="initiation", seconds=0.05, port=7777),
            Delay(seconds=0.3, jitter=0.1, share=0.5),
            Duplicate(message="keepalive", copies=2, optional=True),
        ),
        seed=7,
    )


def test_fault_script_in_manual_is_valid() -> None:
    manual = (ROOT / "docs" / "wires.md").read_text()
    parsed = script.parse_script(tomllib.loads(manual.partition("```toml\n")[2].partition("```")[0]))
    assert [rule.do for rule in parsed.rules] == ["drop", "hold", "flip", "delay"]


def test_rule_is_printed_as_it_was_written() -> None:
    assert str(Drop(message="response", nth=2)) == "drop message=response nth=2"


def test_unreadable_fault_script_is_named_in_error(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("rule = = 1")
    with pytest.raises(UsageError, match=r"fault script .*bad\.toml: not TOML: Invalid value \(at line 1"):
        script.load_script(tmp_path / "bad.toml")
    with pytest.raises(UsageError, match=r"fault script .*none\.toml: No such file or directory"):
        script.load_script(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"rules": []}, "unknown key rules; there are: seed, rule (as [[rule]])"),
        ({"seed": "7"}, "seed: want a whole number, not '7'"),
        ({"seed": True}, "seed: want a whole number, not True"),
        ({"rule": {"do": "drop"}}, "rule: each begins with a line [[rule]]"),
        ({"rule": [{"do": {}}]}, "rule 1: do: unknown fault {}; there are: drop, hold, delay, duplicate, replay, flip"),
        ({"rule": [{}]}, "rule 1: do: is missing; there are: drop, hold, delay, duplicate, replay, flip"),
        (
            {"rule": [{"do": "lose"}]},
            "rule 1: do: unknown fault 'lose'; there are: drop, hold, delay, duplicate, replay, flip",
        ),
        (
            {"rule": [{"do": "drop"}, {"do": "drop", "mesage": "data"}]},
            "rule 2 (drop): unknown key mesage; there are: message, sender, nth, counters, share, optional",
        ),
        ({"rule": [{"do": "hold", "behind": 0}]}, "rule 1 (hold): behind: want a whole number above 0, not 0"),
    ],
)
def test_mistake_in_fault_script_is_reported_with_rule_and_key(data: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        script.parse_script(data)
    assert str(refusal.value) == f"fault script: {complaint}"


RANGE = 'want a number, a range "5-9" or "3-", or a list of them'


@pytest.mark.parametrize(
    ("rule", "values", "complaint"),
    [
        (
            Drop,
            {"message": "datum"},
            "message: unknown 'datum'; there are: any, handshake, initiation, response, cookie-reply",
        ),
        (Drop, {"sender": 1}, "sender: want the name of a node, not 1"),
        (Drop, {"nth": "2-1"}, f"nth: {RANGE}, not '2-1'"),
        (Drop, {"nth": -1}, f"nth: {RANGE}, not -1"),
        (Drop, {"nth": True}, f"nth: {RANGE}, not True"),
        (Drop, {"nth": ("x",)}, f"nth: {RANGE}, not 'x'"),
        (Drop, {"counters": "-5"}, f"counters: {RANGE}, not '-5'"),
        (
            Drop,
            {"message": "response", "counters": 1},
            'counters: response has none; use nth, or message = "transport"',
        ),
        (Drop, {"share": 0}, "share: want a number above 0 and at most 1, not 0"),
        (Drop, {"share": "10 %"}, "share: want a number above 0 and at most 1, not '10 %'"),
        (Drop, {"optional": 1}, "optional: want true or false, not 1"),
        (Drop, {"message": "unknown", "counters": 1}, "counters: unknown has none; use nth"),
        (Hold, {"gather": 1.5}, "gather: want a whole number above 0, not 1.5"),
        (Hold, {"seconds": "1"}, "seconds: want a number above 0, not '1'"),
        (Delay, {}, "seconds: is missing; give the delay, for example"),
        (Delay, {"seconds": -1}, "seconds: want a number of seconds, not -1"),
        (Duplicate, {"copies": 0}, "copies: want a whole number above 0, not 0"),
        (Replay, {}, "behind: is missing; say when the copy comes: "),
        (Replay, {"behind": 1, "port": 65536}, "port: want a number from 1 to 65535, not 65536"),
        (Replay, {"behind": 1, "port": 1, "message": "fragment"}, "port: a message that is 'fragment' has none"),
        (Flip, {"field": "tag", "message": "unknown"}, "message: flip needs one kind of message"),
        (Flip, {"field": "mac1"}, "message: flip needs one kind of message"),
        (Flip, {"message": "data"}, "field: is missing; there are: receiver, counter, packet, tag"),
        (
            Flip,
            {"message": "data", "field": "mac1"},
            "field: unknown 'mac1'; there are: receiver, counter, packet, tag",
        ),
        (Flip, {"message": "keepalive", "field": "packet"}, 'field: a keepalive carries no packet; use field = "tag"'),
        (Flip, {"message": "transport", "field": "packet"}, 'field: a keepalive carries no packet; use field = "tag"'),
        (Flip, {"message": "response", "field": "mac1", "bit": 128}, "bit: mac1 has the bits 0 to 127, not 128"),
        (Flip, {"message": "data", "field": "packet", "bit": 8}, "bit: packet has the bits 0 to 7, not 8"),
    ],
)
def test_invalid_rule_value_is_reported_with_remedy(rule: type[Rule], values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        rule(**values)
    assert str(refusal.value).startswith(complaint)


@pytest.mark.parametrize(
    ("message", "field", "bit", "size", "place"),
    [
        ("initiation", "sender", 0, 148, 4),
        ("initiation", "mac2", 127, 148, 147),
        ("response", "nothing", 8, 92, 45),
        ("cookie-reply", "nonce", 0, 64, 8),
        ("data", "counter", 63, 48, 15),
        ("data", "packet", 0, 48, 16),
        ("transport", "tag", 0, 48, 32),
        ("keepalive", "tag", 127, 32, 31),
    ],
)
def test_flip_changes_one_bit_of_field_and_nothing_else(
    message: str, field: str, bit: int, size: int, place: int
) -> None:
    kinds = {"initiation": 1, "response": 2, "cookie-reply": 3}
    before = bytes([kinds.get(message, 4)]).ljust(size, b"\0")
    after = Flip(message=message, field=field, bit=bit).apply(before)
    assert after == before[:place] + bytes([1 << bit % 8]) + before[place + 1 :]
