"""Check the KTAP output by a parser that was written from the kernel's documentation."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from harness.report.ktap import ktap_text
from harness.report.results import GATING, STATES, Result
from harness.sandbox.launcher import REFUSED
from selftests.support.ktap import KtapError, parse_ktap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from selftests.support.ktap import Test

pytest_plugins = ["pytester"]

# The example of ktap.rst, "Example KTAP output".
EXAMPLE = """\
KTAP version 1
1..1
  KTAP version 1
  1..3
    KTAP version 1
    1..1
    # test_1: initializing test_1
    ok 1 test_1
  ok 1 example_test_1
    KTAP version 1
    1..2
    ok 1 test_1 # SKIP test_1 skipped
    ok 2 test_2
  ok 2 example_test_2
    KTAP version 1
    1..3
    ok 1 test_1
    # test_2: FAIL
    not ok 2 test_2
    ok 3 test_3 # SKIP test_3 skipped
  not ok 3 example_test_3
not ok 1 main_test
"""


def test_parser_accepts_example_of_kernel() -> None:
    (main,) = parse_ktap(EXAMPLE)
    assert (main.name, main.ok) == ("main_test", False)
    assert [(test.name, test.ok, len(test.subtests)) for test in main.subtests] == [
        ("example_test_1", True, 1),
        ("example_test_2", True, 2),
        ("example_test_3", False, 3),
    ]
    assert main.subtests[2].subtests[1].diagnostics == ["test_2: FAIL"]
    assert (main.subtests[1].subtests[0].directive, main.subtests[1].subtests[0].data) == ("SKIP", "test_1 skipped")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1..1\nok 1 a\n", "line 1: expected 'KTAP version 1'"),
        ("KTAP version 1\nok 1 a\n", "line 2: expected a plan"),
        ("KTAP version 1\n1..2\nok 1 a\n", "the output ends before result 2"),
        ("KTAP version 1\n1..1\nok 1 a\nok 2 b\n", "line 4 is after the last result"),
        ("KTAP version 1\n1..2\nok 1 a\nok 3 b\n", "line 4: number 3, expected 2"),
        ("KTAP version 1\n1..1\nfailed 1 a\n", "line 3: not a result"),
        ("KTAP version 1\n1..1\nok 1 a # ERROR why\n", "line 3: ERROR needs 'not ok'"),
        ("KTAP version 1\n1..1\n  KTAP version 1\n  1..1\n  not ok 1 b\nok 1 a\n", "the parent must fail"),
        ("KTAP version 1\n1..1\n  KTAP version 1\n  1..2\n  ok 1 b\nok 1 a\n", "1 tests, and the plan has more"),
        (
            "KTAP version 1\n1..1\n   KTAP version 1\n   1..1\n   ok 1 b\nok 1 a\n",
            "line 3: expected '  KTAP version 1'",
        ),
    ],
)
def test_parser_refuses_what_breaks_rule(text: str, complaint: str) -> None:
    with pytest.raises(KtapError, match=complaint):
        parse_ktap(text)


def result(state: str = "passed", message: str = "", **changes: str) -> Result:
    name, lane = changes.get("name", "test_x.py::test_it[a~b]"), changes.get("lane", "netns")
    a, _, b = changes.get("pair", "a~b").partition("~")
    return Result(
        id=name,
        a={"impl": a} if a else None,
        b={"impl": b} if b else None,
        lane=lane,
        kernel="6.1",
        state=state,
        message=message,
        artifacts=changes.get("artifacts", ""),
    )


def leaves(tests: Sequence[Test]) -> list[Test]:
    return [leaf for test in tests for leaf in (leaves(test.subtests) if test.subtests else [test])]


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ("passed", "ok 1 test_it[a~b] # why"),
        ("failed", "not ok 1 test_it[a~b] # why"),
        ("xfailed", "ok 1 test_it[a~b] # XFAIL why"),
        ("xpassed", "not ok 1 test_it[a~b] # xpassed: why"),
        ("differs", "ok 1 test_it[a~b] # differs: why"),
        ("flaky", "not ok 1 test_it[a~b] # flaky: why"),
        ("skipped", "ok 1 test_it[a~b] # SKIP why"),
        ("unsupported", "ok 1 test_it[a~b] # SKIP why"),
        ("error", "not ok 1 test_it[a~b] # ERROR why"),
        ("blocked", "not ok 1 test_it[a~b] # ERROR why"),
        ("not_reached", "not ok 1 test_it[a~b] # ERROR why"),
    ],
)
def test_each_state_has_its_line(state: str, line: str) -> None:
    assert state in STATES
    text = ktap_text([result(state, "why")])
    assert f"    {line}\n" in text
    (leaf,) = leaves(parse_ktap(text))
    assert leaf.ok is (state not in GATING)


def test_results_are_nested_by_file_and_pair() -> None:
    tests = parse_ktap(
        ktap_text(
            [
                result(),
                result(pair="b~a", name="test_x.py::test_it[b~a]"),
                result("failed", "no", name="test_x.py::test_other[a~b]"),
                result("skipped", "no x", name="test_y.py::test_it", pair=""),
                result(lane="vm"),
            ]
        )
    )
    assert [(test.name, test.ok, test.directive) for test in tests] == [
        ("test_x.py", False, ""),
        ("test_y.py", True, "SKIP"),
        ("test_x.py in lane vm, kernel 6.1", True, ""),
    ]
    pairs = [(pair.name, [leaf.name for leaf in pair.subtests]) for pair in tests[0].subtests]
    assert pairs == [("a~b", ["test_it[a~b]", "test_other[a~b]"]), ("b~a", ["test_it[b~a]"])]
    assert [pair.name for pair in tests[1].subtests] == ["without an implementation"]


def test_text_of_program_cannot_break_format() -> None:
    evil = "first # SKIP\nok 9 fake\n  KTAP version 1\n# Subtest: fake\n\x1b[31mred\x00"
    hashed = result("failed", evil, name="test_#.py::test_it[a~b-#1]", artifacts="evidence/x")
    text = ktap_text([hashed, result("failed", f"{evil}\n" * 100)])
    tests = parse_ktap(text)
    first = leaves(tests)[0]
    assert (first.name, first.ok, first.directive) == ("test_it[a~b-_1]", False, "")
    # kunit.py looks for the last ` # SKIP` of a line, and takes `# Subtest: NAME` for the name of a test.
    assert first.data == "first #SKIP"
    assert not re.search(r"ok .* # SKIP|^\s*# Subtest", text, re.MULTILINE)
    assert first.diagnostics == [
        "  ok 9 fake", "    KTAP version 1", "  # Subtest: fake", "  red<00>", "evidence: evidence/x",
    ]  # fmt: skip
    assert len(leaves(tests)[1].diagnostics) == 20


def test_timeout_is_told_apart_from_failure() -> None:
    (leaf,) = leaves(parse_ktap(ktap_text([result("failed", "Timeout (>120.0s) from pytest-timeout.")])))
    assert (leaf.directive, leaf.ok) == ("TIMEOUT", False)
    (leaf,) = leaves(parse_ktap(ktap_text([result("xfailed", "Timeout (>120.0s) from pytest-timeout.")])))
    assert (leaf.directive, leaf.ok) == ("XFAIL", True)


@pytest.mark.parametrize(("results", "number"), [([], 1), ([result()], 2)])
def test_failure_of_run_is_last_test(results: list[Result], number: int) -> None:
    tests = parse_ktap(ktap_text(results, "lane vm did not\nrun"))
    assert len(tests) == number
    assert (tests[-1].name, tests[-1].ok, tests[-1].data) == ("wg-interop run", False, "lane vm did not run")


def test_pytest_writes_file_or_terminal(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFUSED, "unit tests need no sandbox")
    pytester.makepyfile(test_few="def test_good(): pass\ndef test_bad(): assert 'a' == 'b'")
    pytester.runpytest_subprocess("--ktap=out.ktap", "--lane=core")
    (file,) = parse_ktap((pytester.path / "out.ktap").read_text())
    assert [(leaf.name, leaf.ok) for leaf in leaves([file])] == [("test_good", True), ("test_bad", False)]
    run = pytester.runpytest_subprocess("--ktap=-", "--lane=core", "--must-include=refwg")
    lines = run.stdout.lines
    start = lines.index("KTAP version 1")
    end = next(n for n, line in enumerate(lines) if line.startswith("not ok 2 wg-interop run"))
    assert parse_ktap("\n".join(lines[start : end + 1]))[1].data == "--must-include refwg: no test of refwg ran"
