"""Run the examples of the documents, and check that each page has a place and that its links lead somewhere."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from ci import docs_pages, docs_site
from ci.setup_checkout import ROOT
from harness.install.cache import Area, directory

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES: Final = sorted((ROOT / "docs").glob("*.md"))
# A console example that is run: the comment stands on the line above it.
_EXAMPLE: Final = re.compile(r"^<!-- run -->\n```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


class Example(NamedTuple):
    """A console example of a page: commands, each with the output that follows it."""

    page: str
    text: str

    def commands(self) -> Iterator[tuple[str, str]]:
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


EXAMPLES: Final = [Example(path.name, text) for path in PAGES for text in _EXAMPLE.findall(path.read_text())]


def pattern(output: str) -> str:
    """A regular expression of an output in which `...` stands for any text, and as a line for any lines."""
    lines = [
        r"(?:.*\n)*?" if line == "..." else f"{'.*'.join(map(re.escape, line.split('...')))}\n"
        for line in output.splitlines()
    ]
    return "".join(lines)


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which `wg-interop` and `python` are those of this checkout."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in (("python", ""), ("wg-interop", "-m harness")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (programs / name).chmod(0o755)
    clean = {key: text for key, text in os.environ.items() if not key.startswith(("PYTEST", "WG_INTEROP"))}
    return clean | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def test_documents_have_examples_to_run() -> None:
    assert len(EXAMPLES) >= 3
    # A marker without a console example below it would run nothing.
    assert len(EXAMPLES) == sum(len(re.findall("^<!-- run -->$", path.read_text(), re.MULTILINE)) for path in PAGES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.page)
def test_example_prints_what_page_shows(example: Example, shell: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    for command, output in example.commands():
        done = subprocess.run(
            ["bash", "-c", f"{command}\npwd > {tmp_path}/place"], cwd=folder, env=shell, text=True, timeout=60,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert re.fullmatch(pattern(output), done.stdout), f"$ {command}\n{done.stdout}"
        # A later command begins where this one has gone.
        folder = Path((tmp_path / "place").read_text().strip())


@pytest.mark.parametrize(
    ("output", "printed", "fits"),
    [
        ("a...c\n", "abbc\n", True),
        ("a\n...\nz\n", "a\nb\nc\nz\n", True),
        ("a\n...\nz\n", "a\nz\n", True),
        ("a.c\n", "abc\n", False),
        ("a\n", "a\nb\n", False),
        ("", "a\n", False),
    ],
)
def test_dots_stand_for_any_output(output: str, printed: str, *, fits: bool) -> None:
    assert bool(re.fullmatch(pattern(output), printed)) is fits


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page_has_place_in_navigation(path: Path) -> None:
    places = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert places.count(path.name) == 1, f"add {path.name} to nav in mkdocs.yml, in one of the four kinds"


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_relative_links_lead_to_files(path: Path) -> None:
    targets = [target for target in _LINK.findall(path.read_text()) if ":" not in target]
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("[a](../README.md)", "[a](index.md)"),
        ("[a](../CONTRIBUTING.md#house-rules)", "[a](CONTRIBUTING.md#house-rules)"),
        ("[a](lanes.md#kernels)", "[a](lanes.md#kernels)"),
        ("[a](../harness/errors.py)", "a (`harness/errors.py`)"),
        ("[`harness/errors.py`](../harness/errors.py)", "`harness/errors.py`"),
        ("[a](https://example.invalid/x.md)", "[a](https://example.invalid/x.md)"),
    ],
)
def test_link_is_changed_to_fit_site(link: str, shown: str) -> None:
    assert docs_pages.fitting(link, "results.md", PurePosixPath("docs")) == shown


def test_link_of_page_outside_leads_into_site() -> None:
    assert docs_pages.fitting("[a](../docs/site.md)", "bench/README.md", PurePosixPath("bench")) == "[a](../site.md)"


def test_link_to_missing_file_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        docs_pages.fitting("[a](../harness/gone.py)", "results.md", PurePosixPath("docs"))
    assert caplog.messages == ["results.md: link to harness/gone.py, which does not exist"]


def test_site_is_built_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    ready = next(directory(Area.TOOLCHAINS).glob("docs-*/ready"), None)
    if ready is None:
        pytest.skip("the packages of ci/docs are not installed; to install them: ./ci/docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    built = docs_site.command(ready.parent / "bin" / "python", serve=False)
    done = subprocess.run(
        [*built, "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) > len(PAGES)
    fetched = r"""<(?:script|img|iframe)[^>]+src=["']?https?:|<link[^>]+rel=["']?stylesheet[^>]+href=["']?https?:"""
    assert [path.name for path in pages if re.search(fetched, path.read_text())] == []
