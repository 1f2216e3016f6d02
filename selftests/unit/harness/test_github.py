"""Check what a run writes for GitHub: escaped annotations, and a summary below the limit."""

from __future__ import annotations

import re

import pytest

from harness.report import github
from harness.report.results import Result

MEBIBYTE = 1024 * 1024


def result(number: int = 0, state: str = "failed", message: str = "no answer", pair: str = "mine~refwg") -> Result:
    a, _, b = pair.partition("~")
    return Result(
        id=f"selftests/netns/test_{number}.py::test_it[{pair}]",
        a={"impl": a} if a else None,
        b={"impl": b} if b else None,
        lane="netns",
        kernel="6.1",
        state=state,
        message=message,
    )


@pytest.mark.parametrize(
    ("text", "data", "value"),
    [
        ("100 %", "100 %25", "100 %25"),
        ("a\r\nb", "a%0D%0Ab", "a%0D%0Ab"),
        ("a:b,c", "a:b,c", "a%3Ab%2Cc"),
        ("%0A", "%250A", "%250A"),
    ],
)
def test_commands_are_escaped_by_rules_of_github(text: str, data: str, value: str) -> None:
    assert (github.escape_data(text), github.escape_property(text)) == (data, value)


def test_annotation_names_program_state_file_and_test() -> None:
    (line,) = github.error_commands([result(message="lost 10 %\nof all")], root="lab,1/")
    assert line == (
        "::error file=lab%2C1/selftests/netns/test_0.py,title=mine or refwg%3A failed::"
        "lost 10 %25%0Aof all%0Atest: selftests/netns/test_0.py::test_it[mine~refwg]"
    )
    (line,) = github.error_commands([result(1, pair=""), result(2, pair=""), result(3, "passed")])
    assert line.startswith("::error title=wg-interop%3A failed in 2 tests::no answer%0Atest: ")


@pytest.mark.parametrize(("failure", "errors", "left"), [("", 10, 2), ("lane vm did not run", 10, 3)])
def test_ten_worst_causes_are_annotated(failure: str, errors: int, left: int) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    results = [result(n, message=word) for word in words for n in range(2 if word == "nine" else 1)]
    lines = github.error_commands(results, failure)
    assert sum(line.startswith("::error ") for line in lines) == errors
    assert "failed in 2 tests::nine" in lines[1 if failure else 0]
    assert lines[-1] == f"::warning title=wg-interop::{left} more causes of failures are in the summary and the report"
    assert all("\n" not in line for line in lines)
    if failure:
        assert lines[0] == "::error title=wg-interop::lane vm did not run"


def test_summary_has_matrix_causes_and_baseline() -> None:
    results = [
        result(0, message="lost | <b>\nmore"), result(1, "passed"), result(1, "passed", pair="refwg~mine"),
        result(2, "skipped", pair="mine"), result(3, "passed", pair=""),
    ]  # fmt: skip
    text = github.summary(results, comparison=["baseline k: 1 new"])
    assert text.startswith("## ❌ wg-interop: 3 passed, 1 failed, 1 skipped\n\nbaseline k: 1 new\n\n")
    assert (
        "| A \\ B | mine | refwg | (alone) |\n|---|---|---|---|\n"
        "| **mine** |  | ❌ 1 passed<br>1 failed | 1 skipped |\n| **refwg** | ✅ 1 passed |  |  |\n"
    ) in text
    assert "<details><summary>mine or refwg: 1 test: lost &#124; &lt;b&gt;</summary>" in text
    assert "\n```text\nlost | <b>\nmore\n\ntest: selftests/netns/test_0.py::test_it[mine~refwg]\n```\n" in text
    assert github.summary([result(1, "passed")]).startswith("## ✅ wg-interop: 1 passed\n")
    assert github.summary([], "no test was selected").startswith(
        "## ❌ wg-interop: no test ran\n\n**no test was selected**\n"
    )


def test_message_cannot_leave_its_block_of_code() -> None:
    text = github.summary([result(message="a\n````\n<script>")])
    assert re.search(r"\n`````text\na\n````\n<script>\n\ntest: .*\n`````\n", text)


def test_summary_of_huge_run_is_below_limit() -> None:
    long = "\n".join(f"{'ä' * 2000} {n}" for n in range(50))
    words = ["".join(chr(97 + int(digit)) for digit in str(n)) for n in range(3000)]
    results = [result(n, message=f"{word} {long}") for n, word in enumerate(words)]
    results += [result(n, message="one cause", pair=f"p~q{n % 37}") for n in range(50_000)]
    text = github.summary(results)
    size = len(text.encode())
    assert 0.9 * MEBIBYTE < size <= MEBIBYTE
    assert re.search(r"\n\.\.\. \d+ more parts do not fit here; the report has them\n\Z", text)
    # The largest cause comes first, with a part of its tests.
    assert text.index("one cause") < text.index(" ...")
    assert "... and 49980 more" in text


@pytest.mark.parametrize("room", [0, 150, 300, 1000])
def test_summary_keeps_to_room_that_is_left(room: int) -> None:
    assert len(github.summary([result(message="x" * 400)], room=room).encode()) <= max(room, 0)


def test_long_message_is_cut() -> None:
    text = github.summary([result(message="\n".join(["y" * 600] * 30))])
    assert f"{'y' * 500} ...\n... 10 more lines\n" in text
    assert "y" * 501 not in text
