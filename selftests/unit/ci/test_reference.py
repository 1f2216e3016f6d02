"""Check that docs/reference.md has the current tables, and that these have what the program has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import pytest

import harness
from ci import reference
from harness.cli.commands import cli

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytest_plugins = ["pytester"]

TEXT: Final = reference.DOCUMENT.read_text()


@pytest.mark.parametrize("name", reference.TABLES)
def test_table_is_up_to_date(name: str) -> None:
    assert reference.WRITTEN.found(TEXT)[name] == f"{reference.TABLES[name]()}\n", "run python -m ci.reference"


def test_options_are_those_of_pytest(pytestconfig: pytest.Config) -> None:
    names = {names[0] for names, _ in reference.registrations().options}
    # Each is an option of the pytest that runs this test.
    assert all(hasattr(pytestconfig.option, attributes["dest"]) for _, attributes in reference.registrations().options)
    assert {"--impl", "--like", "--lane", "--seed", "--gdb"} <= names


def test_markers_and_settings_are_those_of_pytest(pytestconfig: pytest.Config) -> None:
    registered = "\n".join(pytestconfig.getini("markers"))
    rows = reference.markers().splitlines()[2:]
    assert len(rows) > 5
    assert all(row.split("`")[1].removeprefix("@pytest.mark.") in registered for row in rows)
    assert all(pytestconfig.getini(name) is not None for name, _ in reference.registrations().settings)


def test_fixtures_are_those_of_pytest(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile("def test(): pass")
    listed = pytester.runpytest_subprocess("-p", "harness.plugin", "--fixtures", "--color=no").stdout.str()
    ours = set(re.findall(r"^(\w+) -- \S*harness/plugin/\w+\.py:", listed, re.MULTILINE))
    assert "target" in ours
    assert ours == {row.split("`")[1] for row in reference.fixtures().splitlines()[2:]}


def test_every_command_and_name_has_row() -> None:
    assert all(f"| `wg-interop {name}" in TEXT for name in cli.commands)
    assert all(f"| `{name}` |" in TEXT for name in harness.NAMES)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a | b", r"a \| b"),
        ("a < b_c*", r"a \< b\_c\*"),
        ("`a_b|c` d_e", r"`a_b\|c` d\_e"),
    ],
)
def test_markup_in_text_is_escaped_outside_of_code(text: str, shown: str) -> None:
    assert reference.escaped(text) == shown


@pytest.mark.parametrize(("options", "status"), [(["--check"], 1), ([], 0)])
def test_outdated_table_is_reported(
    options: Sequence[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "reference.md"
    document.write_text(TEXT.replace("| `--seed N` |", "| `--sed N` |"))
    assert reference.WRITTEN.main(options, document) == status
    assert capsys.readouterr().out.startswith("reference.md: options: ")
    assert (document.read_text() == TEXT) is (options == [])


def test_table_without_place_is_refused() -> None:
    with pytest.raises(ValueError, match="disagree about: fixtures"):
        reference.WRITTEN.found(TEXT.replace("<!-- reference: fixtures -->", ""))
