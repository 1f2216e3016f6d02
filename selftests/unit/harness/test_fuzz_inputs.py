from __future__ import annotations

import pytest

from harness.errors import UsageError
from harness.fuzz import inputs
from harness.fuzz.inputs import APPEND, CUT, INSERT, WRITE, XOR, Case, Change, Step, apply

CASE = Case(
    "session as responder",
    (
        Step(inputs.INITIATION),
        Step(inputs.DATA, b"\x45\0", 2**64 - 1, (Change(XOR, 3, b"\x80"), Change(CUT, 40)), is_sealed=False),
        Step(inputs.REPLAY, counter=0),
    ),
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Change(WRITE, 2, b"XY"), b"abXYef"),
        (Change(WRITE, 5, b"XY"), b"abcdeX"),
        (Change(WRITE, 9, b"XY"), b"abcdef"),
        (Change(XOR, 0, b"\x20\x20"), b"ABcdef"),
        (Change(XOR, 5, b"\x20\x20"), b"abcdeF"),
        (Change(INSERT, 3, b"--"), b"abc--def"),
        (Change(INSERT, 99, b"--"), b"abcdef--"),
        (Change(CUT, 2), b"ab"),
        (Change(CUT, 99), b"abcdef"),
        (Change(APPEND, 0, b"--"), b"abcdef--"),
    ],
)
def test_change_affects_only_bytes_it_names(change: Change, expected: bytes) -> None:
    assert apply((change,), b"abcdef") == expected


def test_changes_apply_in_their_order() -> None:
    assert apply((Change(CUT, 3), Change(APPEND, 0, b"x"), Change(WRITE, 3, b"y")), b"abcdef") == b"abcy"


def test_case_survives_its_text_form() -> None:
    text = CASE.to_json()
    assert "\n" not in text
    assert Case.from_json(text) == CASE


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "1", "{}", '{"state": "x"}', '{"state": "x", "steps": [1]}', '{"state": "x", "steps": [{}]}',
        '{"state": "x", "steps": [{"do": "dance"}]}', '{"state": "x", "steps": [{"do": "data", "argument": "4"}]}',
        '{"state": "x", "steps": [{"do": "data", "changes": [["burn", 1, ""]]}]}',
        '{"state": "x", "steps": [{"do": "data", "changes": [["cut", -1, ""]]}]}',
        '{"state": "x", "steps": [{"do": "data", "changes": [["cut", 1]]}]}',
    ],
)  # fmt: skip
def test_file_that_is_not_case_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"^corpus/1\.json: not a case of wg-interop fuzz"):
        Case.from_json(text, "corpus/1.json")
