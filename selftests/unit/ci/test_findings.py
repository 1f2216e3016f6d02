"""Check that docs/findings.md has the current tables, and that their commands name tests and roles."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ci import findings
from harness.report.expectations import SEVERITIES, Expectation, load_expectations

if TYPE_CHECKING:
    from pathlib import Path

TEXT = findings.DOCUMENT.read_text()
ENTRY = Expectation(
    test="selftests/conformance/test_sessions.py::test_at_most_*",
    versions="1.*",
    requirement="DT-33",
    observed="eight are kept",
    message="sessions",
    link="https://example.org/pull/7",
)


@pytest.mark.parametrize("name", findings.programs())
def test_table_of_program_is_up_to_date(name: str) -> None:
    assert name not in findings.WRITTEN.outdated(TEXT), "run python -m ci.findings"


@pytest.mark.parametrize("name", findings.programs())
def test_worst_finding_comes_first_and_none_is_lost(name: str) -> None:
    groups = findings.findings(name)
    order = [SEVERITIES.index(group[0].severity) for group in groups]
    assert order == sorted(order)
    assert sum(map(len, groups)) == len(load_expectations(findings.EXPECTATIONS / f"{name}.toml"))


@pytest.mark.parametrize(
    ("side", "test", "options"),
    [
        ("", "selftests/conformance/test_sessions.py::test_at_most_three_sessions_accept_data", "--impl mine"),
        ("a", "selftests/netns/test_padding.py::test_default_mtu_is_1420", "--pair mine~refwg"),
        ("b", "selftests/netns/test_padding.py::test_default_mtu_is_1420", "--pair refwg~mine"),
        (
            "",
            "selftests/netns/test_timers.py::test_keepalive_answers_data_after_ten_seconds",
            "--impl mine --lane warp",
        ),
    ],
)
def test_command_runs_test_in_role_and_lane(side: str, test: str, options: str) -> None:
    entry = Expectation(
        test=f"{test}[[]*-v4]", versions="", requirement="", observed="", message="", link="", side=side
    )
    assert findings.command("mine", entry) == f"pytest {test} {options}"


@pytest.mark.parametrize(("side", "options"), [("", "--impl mine"), ("b", "--pair refwg~mine")])
def test_command_of_oracle_runs_all_tests_of_pairs(side: str, options: str) -> None:
    entry = replace(ENTRY, test="oracle::DT-01", side=side)
    assert findings.command("mine", entry) == f"pytest selftests/netns {options}"


def test_command_names_first_test_of_pattern() -> None:
    assert findings.command("mine", ENTRY).endswith("::test_at_most_three_sessions_accept_data --impl mine")


def test_pattern_without_test_ends_with_its_name() -> None:
    with pytest.raises(SystemExit, match=r"no test matches selftests/netns/test_gone\.py::test_it"):
        findings.first_test("selftests/netns/test_gone.py::test_it[[]*]")


@pytest.mark.parametrize(
    ("link", "name"),
    [
        ("https://github.com/o/r/pull/7", "#7"),
        ("https://example.org/tree/a/b.go?id=1", "b.go"),
        ("https://example.org/b.rs#L1", "b.rs"),
    ],
)
def test_link_is_named_by_file_or_number(link: str, name: str) -> None:
    assert findings.source_name(link) == name


def test_cell_has_no_markup_of_its_own() -> None:
    assert findings.escaped("a|b <c> *_`[]") == r"a\|b \<c\> \*\_\`\[\]"


@pytest.mark.parametrize(("options", "status"), [(["--check"], 1), ([], 0)])
def test_outdated_table_is_reported_or_written(
    options: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "findings.md"
    old = re.sub(r"\| security \| DT-33 .*\n", "", TEXT)
    assert old != TEXT
    document.write_text(old)
    assert findings.WRITTEN.main(options, document) == status
    assert "findings.md: boringtun: " in capsys.readouterr().out
    assert document.read_text() == (old if options else TEXT)


def test_document_without_table_of_program_is_refused() -> None:
    with pytest.raises(ValueError, match="disagree about: boringtun"):
        findings.WRITTEN.found(TEXT.replace("<!-- findings: boringtun -->", ""))
