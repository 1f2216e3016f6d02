"""Known failures: read strictly, applied to the right test, program, version and role."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness import expectations
from harness.errors import UsageError
from harness.implementation import Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest_plugins = ["pytester"]

SHIPPED = Path(__file__).parents[1] / "expectations"
ENTRY = {
    "test": "test_x.py::test_it",
    "versions": "1.*",
    "requirement": "RT-11",
    "observed": "it answers from elsewhere",
    "message": "from elsewhere",
    "link": "https://example.org/1",
}


class Fixed(Manifest):
    """A manifest whose program need not exist."""

    def version(self) -> str:
        return "1.2"


PROGRAM = Fixed(name="mine", kind="uapi")
OTHER = Fixed(name="other", kind="uapi")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    expectations.load.cache_clear()
    yield
    expectations.load.cache_clear()


def write(directory: Path, name: str = "mine", **changes: Any) -> Path:
    entry = {key: value for key, value in (ENTRY | changes).items() if value is not None}
    path = directory / f"{name}.toml"
    path.write_text("[[expect]]\n" + "".join(f"{key} = {value!r}\n" for key, value in entry.items()))
    return path


@pytest.mark.parametrize(
    ("changes", "nodeid", "sides", "found"),
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
def test_expectation_is_found_for_its_test_program_version_and_role(
    tmp_path: Path, changes: dict[str, Any], nodeid: str, sides: tuple[Manifest | None, ...], found: bool
) -> None:
    write(tmp_path, **changes)
    assert (expectations.find(tmp_path, nodeid, sides) is not None) is found


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"link": None}, "no link"),
        ({"observed": ""}, "no observed"),
        ({"reason": "it is slow"}, "unknown key reason"),
        ({"side": "c"}, "side is a or b"),
        ({"message": "("}, "message: missing"),
    ],
)
def test_expectation_without_evidence_is_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        expectations.load(write(tmp_path, **changes))


@pytest.mark.parametrize("name", ["refwg", "refwg+batch"])
def test_refwg_has_no_expectations(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="refwg has no expectations"):
        expectations.load(write(tmp_path, name))


def test_failure_matches_by_its_message(tmp_path: Path) -> None:
    (expected,) = expectations.load(write(tmp_path))
    assert expectations.matches(expected, "AssertionError: the answer came from elsewhere")
    assert not expectations.matches(replace(expected, message="nothing"), "the answer came from elsewhere")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_expectations_can_be_read(path: Path) -> None:
    assert expectations.load(path)


@pytest.mark.parametrize(
    ("body", "outcomes"),
    [
        ("raise AssertionError('it came from elsewhere')", {"xfailed": 1}),
        ("raise AssertionError('something else')", {"failed": 1}),
        ("pass", {"failed": 1}),
    ],
    ids=["as expected", "otherwise", "not at all"],
)
def test_verdict_follows_the_expectation(pytester: pytest.Pytester, body: str, outcomes: dict[str, int]) -> None:
    program = pytester.path / "program"
    program.write_text("#!/bin/sh\necho 1.2\n")
    program.chmod(0o755)
    (pytester.path / "selftests" / "expectations").mkdir(parents=True)
    write(pytester.path / "selftests" / "expectations", "mine", test="*test_it")
    pytester.makepyfile(f"def test_it(implementation):\n    {body}\n")
    result = pytester.runpytest_subprocess("--impl", f"mine={program}", "--results", "results.json")
    result.assert_outcomes(**outcomes)
