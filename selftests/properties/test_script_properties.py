"""Check fault scripts: TOML gives equal records, and ranges contain what they name."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from typing import TYPE_CHECKING, Final

from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.wire.messages import FIELDS
from harness.wire.script import Flip, Script, parse_script, ranges
from selftests.support.strategies import flip
from selftests.support.wire_rules import KINDS, numbers, rules

if TYPE_CHECKING:
    from harness.wire.script import Numbers, Rule

# Drawing a few rules takes longer than all else.
fewer = settings(max_examples=60)
# Higher than any number that `numbers` draws.
HIGHEST: Final = 60


def toml(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value)


def as_file(script: Script) -> str:
    """A script as TOML, with every value that is not a default."""
    lines = [] if script.seed is None else [f"seed = {script.seed}"]
    for rule in script.rules:
        lines += ["[[rule]]", f'do = "{rule.do}"']
        for field in fields(rule):
            value = getattr(rule, field.name)
            if value != field.default:
                lines.append(f"{field.name} = {toml(value)}")
    return "\n".join(lines)


@fewer
@example([], 0)
@given(st.lists(rules(), max_size=4), st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)))
def test_script_is_equal_after_writing_and_parsing_toml(rules: list[Rule], seed: int | None) -> None:
    script = Script(tuple(rules), seed)
    assert parse_script(tomllib.loads(as_file(script))) == script


@fewer
@given(rules())
def test_printed_rule_names_every_value_that_is_not_default(rule: Rule) -> None:
    assert str(rule).split()[0] == rule.do
    for field in fields(rule):
        value = getattr(rule, field.name)
        is_printed = f" {field.name}=" in str(rule)
        assert is_printed is (value != field.default)
        assert not is_printed or f" {field.name}={value}" in str(rule)


def written_out(value: Numbers) -> set[int]:
    """The numbers up to HIGHEST in these ranges."""
    if isinstance(value, int):
        return {value}
    if isinstance(value, tuple):
        return set().union(*map(written_out, value))
    first, dash, last = value.partition("-")
    return set(range(int(first), (int(last or HIGHEST) if dash else int(first)) + 1))


@given(numbers)
def test_ranges_contain_numbers_that_they_name(value: Numbers) -> None:
    spans = ranges("nth", value)
    assert spans is not None
    named = {number for first, last in spans for number in range(first, (HIGHEST if last is None else last) + 1)}
    assert named == written_out(value)


@given(st.sampled_from(sorted({*KINDS} - {"unknown"})), st.integers(32, 200), st.data())
def test_flip_changes_chosen_bit_of_field(message: str, length: int, data: st.DataObject) -> None:
    kind, size = KINDS[message]
    payload = bytes([kind]).ljust(length if message == "data" else size, b"\x5a")
    names = sorted(FIELDS[kind]) if message == "data" else sorted({*FIELDS[kind]} - {"packet"})
    name = data.draw(st.sampled_from(names))
    start, stop, _ = slice(*FIELDS[kind][name]).indices(len(payload))
    bit = data.draw(st.integers(0, 7 if name == "packet" else 8 * (stop - start) - 1))
    assert Flip(message=message, field=name, bit=bit).apply(payload) == flip(payload, 8 * start + bit)
