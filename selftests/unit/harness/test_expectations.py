"""Check known failures: read strictly, applied by test, program, version and role."""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime, timedelta
from fnmatch import filter as filter_names
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness import suite
from harness.errors import UsageError
from harness.implementations.manifest import Manifest
from harness.report import expectations
from harness.report.invariants import PREFIX
from harness.wire.oracle import INVARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest_plugins = ["pytester"]

SHIPPED = Path(__file__).parents[2] / "expectations"
ENTRY = {
    "test": "test_x.py::test_it",
    "versions": "1.*",
    "requirement": "RT-11",
    "observed": "it answers from elsewhere",
    "message": "from elsewhere",
    "link": "https://example.org/1",
}


TODAY = date(2027, 1, 31)


class Fixed(Manifest):
    """A manifest whose program need not exist."""

    def version(self) -> str:
        return "1.2"


PROGRAM = Fixed(name="mine", kind="uapi")
OTHER = Fixed(name="other", kind="uapi")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    expectations.load_expectations.cache_clear()
    yield
    expectations.load_expectations.cache_clear()


def write(directory: Path, name: str = "mine", *more: dict[str, Any], **changes: Any) -> Path:
    """Write a program's expectations: one with these changes, one for each further dict."""
    path = directory / f"{name}.toml"
    path.write_text("".join(map(as_toml, (changes, *more))))
    return path


def as_toml(changes: dict[str, Any]) -> str:
    entry = {key: value for key, value in (ENTRY | changes).items() if value is not None}
    lines = (
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}\n" for key, value in entry.items()
    )
    return "[[expect]]\n" + "".join(lines)


@pytest.mark.parametrize(
    ("changes", "nodeid", "sides", "applies"),
    [
        ({}, "test_x.py::test_it[mine~other]", (PROGRAM, OTHER), True),
        ({}, "test_x.py::test_it[other~mine]", (OTHER, PROGRAM), True),
        ({}, "test_x.py::test_it[mine]", (PROGRAM, None), True),
        ({}, "test_x.py::test_other[mine~other]", (PROGRAM, OTHER), False),
        ({}, "test_x.py::test_it[other~other]", (OTHER, OTHER), False),
        ({"versions": "2.*"}, "test_x.py::test_it[mine~other]", (PROGRAM, OTHER), False),
        ({"side": "a"}, "test_x.py::test_it[mine~other]", (PROGRAM, OTHER), True),
        ({"side": "a"}, "test_x.py::test_it[other~mine]", (OTHER, PROGRAM), False),
        ({"test": "test_x.py::test_it[[]*-v4]"}, "test_x.py::test_it[mine~other-v4]", (PROGRAM, OTHER), True),
        ({"test": "test_x.py::test_it[[]*-v4]"}, "test_x.py::test_it[mine~other-v6]", (PROGRAM, OTHER), False),
    ],
)
def test_expectation_applies_by_test_program_version_and_side(
    tmp_path: Path, changes: dict[str, Any], nodeid: str, sides: tuple[Manifest | None, ...], applies: bool
) -> None:
    write(tmp_path, **changes)
    assert bool(expectations.applying(tmp_path, nodeid, sides)) is applies


LIKE = Fixed(name="a", kind="uapi", like=PROGRAM)


@pytest.mark.parametrize(
    ("changes", "nodeid", "sides", "found"),
    [
        ({}, "test_x.py::test_it[a~other]", (LIKE, OTHER), True),
        ({"versions": "9.*"}, "test_x.py::test_it[a~other]", (LIKE, OTHER), True),
        ({"side": "b"}, "test_x.py::test_it[a~other]", (LIKE, OTHER), False),
        ({"test": "test_x.py::test_it[[]mine~[!m]"}, "test_x.py::test_it[a~other-v4]", (LIKE, OTHER), True),
        ({"test": "test_x.py::test_it[[]mine-v4[]]"}, "test_x.py::test_it[a-v4]", (LIKE, None), True),
        ({"test": "test_x.py::test_it[[]mine-v4[]]"}, "test_x.py::test_it[a-v6]", (LIKE, None), False),
        ({"test": "test_x.py::test_it[[]mine-v4[]]"}, "test_x.py::test_it[a.b-v4]", (LIKE, None), False),
        ({"test": "test_x.py::test_it[[]mine~[!m]"}, "test_x.py::test_it[a~a-v4]", (LIKE, LIKE), False),
    ],
)
def test_expectation_applies_to_any_version_of_like_program(
    tmp_path: Path, changes: dict[str, Any], nodeid: str, sides: tuple[Manifest | None, ...], found: bool
) -> None:
    write(tmp_path, **changes)
    assert bool(expectations.applying(tmp_path, nodeid, sides)) is found


@pytest.mark.parametrize(
    ("message", "known"),
    [("a padded to a block", True), ("mine padded to a block", True), ("it padded to a block", False)],
)
def test_name_in_message_may_be_that_of_program_like_it(tmp_path: Path, message: str, known: bool) -> None:
    write(tmp_path, message="^(mine|other)(-old)? padded to a block")
    found = expectations.applying(tmp_path, "test_x.py::test_it[a]", (LIKE, None))
    assert bool(expectations.explains(found, message, TODAY)) is known


def test_success_mends_failure_of_program_like_its_own(tmp_path: Path) -> None:
    write(tmp_path, "mine", {"always": False})
    write(tmp_path, "other")
    found = expectations.applying(tmp_path, "test_x.py::test_it[a~other]", (LIKE, OTHER))
    reason = "a does not have a known failure of mine: RT-11: it answers from elsewhere (https://example.org/1)"
    assert expectations.fixed(found) == (reason,)
    # The other program still has to fail.
    assert [one.observed for one in expectations.refuted(found)] == ["it answers from elsewhere"]
    alone = expectations.applying(tmp_path, "test_x.py::test_it[a]", (LIKE, None))
    assert not expectations.refuted(alone)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"link": None}, "no link"),
        ({"observed": ""}, "no observed"),
        ({"reason": "it is slow"}, "unknown key reason"),
        ({"side": "c"}, "side is a or b, not 'c'"),
        ({"severity": "grave"}, "severity is one of security, dos, interop, performance, not 'grave'"),
        ({"side": 1}, "expectation 1: side must be a string, not 1"),
        ({"always": "never"}, "expectation 1: always must be a boolean, not 'never'"),
        ({"message": "("}, "message: missing"),
        ({"until": "2027-01-31"}, "until is a day such as 2027-01-31, without quotes, not '2027-01-31'"),
    ],
)
def test_incomplete_or_malformed_expectation_is_refused(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        expectations.load_expectations(write(tmp_path, **changes))


def test_expectations_that_are_not_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("expect = 1")
    with pytest.raises(UsageError, match=r"mine\.toml: expect must be a list, not 1"):
        expectations.load_expectations(tmp_path / "mine.toml")


def test_misspelt_table_of_expectations_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[[expects]]\ntest = 'x'")
    with pytest.raises(UsageError, match="unknown key expects"):
        expectations.load_expectations(tmp_path / "mine.toml")


@pytest.mark.parametrize(("day", "expired"), [(-1, False), (0, False), (1, True)])
def test_expectation_expires_after_its_last_day(tmp_path: Path, day: int, expired: bool) -> None:
    late = {"until": None, "observed": "it is late", "message": "later"}
    path = write(tmp_path, "mine", late)
    path.write_text(path.read_text().replace("[[expect]]\n", "[[expect]]\nuntil = 2027-01-31\n", 1))
    found = expectations.applying(tmp_path, "test_x.py::test_it[mine]", (PROGRAM, None))
    today = TODAY + timedelta(days=day)
    explained = expectations.explains(found, "from elsewhere", today)
    assert explained is not None
    assert explained.has_expired(today) is expired
    # One that still holds comes before one that has expired.
    explained = expectations.explains(found, "from elsewhere, and later", today)
    assert explained is not None
    assert (explained.observed == "it is late") is expired


def test_entry_beside_manifest_needs_test_and_message_only(tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    path.write_text('[[expect]]\ntest = "test_x.py::test_it"\nmessage = "late"\n')
    with pytest.raises(UsageError, match="no versions, no requirement, no observed, no link"):
        expectations.load_expectations(path)
    theirs = Fixed(name="mine", kind="uapi", expectations=path)
    (known,) = expectations.applying(tmp_path, "test_x.py::test_it[mine]", (theirs, None))
    assert str(known.expectation) == "a failure with a message like 'late'"
    # The file of the manifest replaces that of the checkout, and must be there.
    write(tmp_path, message="from elsewhere")
    found = expectations.applying(tmp_path, "test_x.py::test_it[mine]", (theirs, None))
    assert expectations.explains(found, "from elsewhere", TODAY) is None
    path.unlink()
    expectations.load_expectations.cache_clear()
    with pytest.raises(UsageError, match="No such file"):
        expectations.applying(tmp_path, "test_x.py::test_it[mine]", (theirs, None))


def test_expectation_is_printed_as_requirement_fact_and_link(tmp_path: Path) -> None:
    (expectation,) = expectations.load_expectations(write(tmp_path))
    assert str(expectation) == "RT-11: it answers from elsewhere (https://example.org/1)"


@pytest.mark.parametrize("name", ["refwg", "refwg+batch"])
def test_expectations_of_refwg_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="refwg has no expectations"):
        expectations.load_expectations(write(tmp_path, name))


@pytest.mark.parametrize(
    ("message", "observed"),
    [
        ("AssertionError: the answer came from elsewhere", "it answers from elsewhere"),
        ("it came too late", "it is late"),
        ("it never came", "other loses it"),
        ("it came twice", None),
    ],
    ids=["first", "second of the same program", "of the other program", "none"],
)
def test_failure_is_explained_by_any_matching_expectation(tmp_path: Path, message: str, observed: str | None) -> None:
    write(tmp_path, "mine", {"message": "too late", "observed": "it is late"})
    write(tmp_path, "other", message="never came", observed="other loses it", side="b")
    applying = expectations.applying(tmp_path, "test_x.py::test_it[mine~other]", (PROGRAM, OTHER))
    expected = expectations.explains(applying, message, TODAY)
    assert (expected and expected.observed) == observed


def test_program_paired_with_itself_has_each_expectation_once(tmp_path: Path) -> None:
    write(tmp_path, "mine", {"side": "b"})
    assert len(expectations.applying(tmp_path, "test_x.py::test_it[mine~mine]", (PROGRAM, PROGRAM))) == 2


def test_success_refutes_only_expectations_without_race(tmp_path: Path) -> None:
    write(tmp_path, "mine", {"always": False, "observed": "it is late"})
    write(tmp_path, "other", observed="other loses it")
    applying = expectations.applying(tmp_path, "test_x.py::test_it[mine~other]", (PROGRAM, OTHER))
    assert [entry.observed for entry in expectations.refuted(applying)] == [
        "it answers from elsewhere",
        "other loses it",
    ]


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_expectations_can_be_read(path: Path) -> None:
    assert expectations.load_expectations(path)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_expectations_match_existing_tests(path: Path) -> None:
    root = SHIPPED.parents[1]
    tests = [
        f"{file.relative_to(root)}::{name}"
        for file in SHIPPED.parent.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    ]
    tests += [f"{PREFIX}{requirement}" for requirement in INVARIANTS]
    gone = [
        entry.test
        for entry in expectations.load_expectations(path)
        if not filter_names(tests, entry.test.partition("[")[0])
    ]
    assert not gone


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_no_shipped_expectation_is_there_twice(path: Path) -> None:
    keys = [(entry.test, entry.side, entry.message) for entry in expectations.load_expectations(path)]
    assert len(set(keys)) == len(keys), [key for key in set(keys) if keys.count(key) > 1]


@pytest.mark.parametrize(
    ("body", "outcomes"),
    [
        ("raise AssertionError('it came from elsewhere')", {"xfailed": 1}),
        ("raise AssertionError('it came too late')", {"xfailed": 1}),
        ("raise AssertionError('something else')", {"failed": 1}),
        ("pass", {"failed": 1}),
    ],
    ids=["as expected", "as expected second", "otherwise", "not at all"],
)
def test_verdict_follows_expectations(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, body: str, outcomes: dict[str, int]
) -> None:
    program = pytester.path / "program"
    program.write_text("#!/bin/sh\necho 1.2\n")
    program.chmod(0o755)
    (pytester.path / "selftests" / "expectations").mkdir(parents=True)
    monkeypatch.setenv(suite.SUITE, str(pytester.path))
    late = {"test": "*test_it", "message": "too late", "always": False}
    write(pytester.path / "selftests" / "expectations", "mine", late, test="*test_it")
    pytester.makepyfile(f"def test_it(implementation):\n    {body}\n")
    result = pytester.runpytest_subprocess("--impl", f"mine={program}", "--results", "results.json")
    result.assert_outcomes(**outcomes)


@pytest.mark.parametrize(
    ("body", "state", "message"),
    [
        ("raise AssertionError('it came from elsewhere')", "xfailed", "it came from elsewhere"),
        ("pass", "passed", "mine does not have a known failure of wireguard-go: RT-11: it answers from elsewhere"),
        ("raise AssertionError('something else')", "failed", "something else"),
    ],
)
def test_mended_failure_of_like_program_is_reported_as_passed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, body: str, state: str, message: str
) -> None:
    program = pytester.path / "program"
    program.write_text("#!/bin/sh\necho 9.9\n")
    program.chmod(0o755)
    (pytester.path / "selftests" / "expectations").mkdir(parents=True)
    monkeypatch.setenv(suite.SUITE, str(pytester.path))
    write(pytester.path / "selftests" / "expectations", "wireguard-go", test="*test_it")
    pytester.makepyfile(f"def test_it(implementation):\n    {body}\n")
    words = ["--impl", f"mine={program}", "--like", "wireguard-go", "--results", "results.json"]
    run = pytester.runpytest_subprocess(*words)
    (entry,) = json.loads((pytester.path / "results.json").read_text())["results"]
    assert entry["state"] == state
    assert message in entry["message"]
    assert entry["a"] == {"impl": "mine", "version": "9.9", "like": "wireguard-go"}
    page = (pytester.path / "index.html").read_text()
    assert "9.9, like wireguard-go" in page
    if state == "passed":
        run.stdout.fnmatch_lines(f"FIXED *::test_it[[]mine[]] - {message}*")
        assert "mine does not have a known failure of wireguard-go" in page


def run_with_manifest(pytester: pytest.Pytester, known: str, body: str) -> tuple[pytest.RunResult, dict[str, Any]]:
    """Run one test with a manifest whose expectations are `known`; returns the run and the result."""
    program = pytester.path / "program"
    program.write_text("#!/bin/sh\necho 1.2\n")
    program.chmod(0o755)
    (pytester.path / "their").mkdir()
    (pytester.path / "their" / "known.toml").write_text(known)
    (pytester.path / "their" / "mine.toml").write_text(
        'name = "mine"\nkind = "uapi"\nexpectations = "known.toml"\n[program]\npath = "../program"\n'
    )
    pytester.makepyfile(f"def test_it(implementation):\n    {body}\ndef test_good(): pass\n")
    run = pytester.runpytest_subprocess("--impl-manifest", "their/mine.toml", "--results", "results.json")
    path = pytester.path / "results.json"
    return run, json.loads(path.read_text())["results"][0] if path.exists() else {}


LATE = "raise AssertionError('it came too late')"


def test_expectations_beside_manifest_are_used(pytester: pytest.Pytester) -> None:
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    known = f'[[expect]]\ntest = "*test_it"\nmessage = "too late"\nuntil = {tomorrow}\n'
    run, result = run_with_manifest(pytester, known, LATE)
    run.assert_outcomes(passed=1, xfailed=1)
    assert result["state"] == "xfailed"
    assert "a failure with a message like &#39;too late&#39;" in (pytester.path / "index.html").read_text()


def test_expired_expectation_counts_again_and_is_named(pytester: pytest.Pytester) -> None:
    known = '[[expect]]\ntest = "*test_it"\nmessage = "too late"\nuntil = 2026-01-31\n'
    run, result = run_with_manifest(pytester, known, LATE)
    run.assert_outcomes(passed=1, failed=1)
    again = "this failure was expected until 2026-01-31, so it counts again: a failure with a message like 'too late'"
    assert (result["state"], result["message"]) == ("failed", f"it came too late\n{again}")
    run.stdout.fnmatch_lines(["*expired expectation*", again])


def test_expired_expectation_leaves_special_state(pytester: pytest.Pytester) -> None:
    known = '[[expect]]\ntest = "*test_it"\nmessage = "no load"\nuntil = 2026-01-31\n'
    _, result = run_with_manifest(pytester, known, "import harness; harness.not_reached('no load')")
    assert (result["state"], result["message"].partition("\n")[0]) == ("not_reached", "no load")


def test_mistake_in_expectations_of_manifest_is_usage_error(pytester: pytest.Pytester) -> None:
    run, _ = run_with_manifest(pytester, '[[expect]]\ntest = "*test_it"\n', LATE)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines("ERROR: *their/known.toml: expectation 1: no message")
