"""Run the tests that docs/write-a-test.md shows, and see that they can fail."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

import pytest

import harness

pytest_plugins = ["pytester"]

PAGE: Final = Path(__file__).parents[2] / "docs" / "write-a-test.md"
TESTS: Final = re.findall(r"^<!-- test -->\n```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def facade() -> None:
    """Load every name: an inner pytest forgets the modules that it was the first to import, and loads them again."""
    for name in harness.NAMES:
        getattr(harness, name)


@pytest.fixture
def tests(facade: None, inner_pytest: None, pytester: pytest.Pytester) -> None:  # noqa: ARG001 - both before pytester
    """The tests of the page, as files of an inner pytest."""
    pytester.makepyfile(**{f"test_{number}": text for number, text in enumerate(TESTS)})


def states(pytester: pytest.Pytester, implementation: str, *files: str) -> list[tuple[str, str]]:
    """The state and the message of each test of the page; what the oracle judges besides is left out."""
    pytester.runpytest_inprocess(*files, "--impl", implementation, "--results", "results.json")
    results = json.loads((pytester.path / "results.json").read_text())["results"]
    return [(each["state"], each["message"]) for each in results if "::test_" in each["id"]]


@pytest.mark.usefixtures("tests")
def test_tests_of_page_pass_with_refwg(pytester: pytest.Pytester) -> None:
    assert states(pytester, "refwg") == [("passed", "")] * 3


@pytest.mark.usefixtures("tests")
@pytest.mark.parametrize(
    ("number", "mutant", "message"),
    [
        (0, "no-roaming", "B's endpoint for A is"),
        (2, "accepts-older-initiation", "answered an initiation that is older"),
    ],
)
def test_test_of_page_fails_with_mutant(pytester: pytest.Pytester, number: int, mutant: str, message: str) -> None:
    ((state, why),) = states(pytester, f"refwg+{mutant}", f"test_{number}.py")
    assert state == "failed"
    assert message in why
