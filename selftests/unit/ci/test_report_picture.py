"""The README's pictures of a report: who shows them, and that Chromium takes them from a real page."""

from __future__ import annotations

import re
import shutil
import struct
from typing import TYPE_CHECKING

import pytest

from ci import report_picture
from ci.setup_checkout import ROOT
from harness.errors import Unavailable, UsageError
from harness.report.gather import render
from harness.report.results import Results

if TYPE_CHECKING:
    from pathlib import Path


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height from the header chunk (PNG specification, 11.2.2 IHDR)."""
    assert png.startswith(report_picture.PNG)
    width, height = struct.unpack_from("!II", png, 16)
    return width, height


def test_readme_shows_light_and_dark_picture() -> None:
    shown = set(re.findall(r"docs/images/[\w.-]+", (ROOT / "README.md").read_text()))
    assert shown == {f"docs/images/report-{name}.png" for name in report_picture.SCHEMES}
    for name in shown:
        assert size_of((ROOT / name).read_bytes())[0] == report_picture.WIDTH


def test_missing_report_is_refused_with_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.html: no such file; run \./ci/interop"):
        report_picture.take_pictures(tmp_path / "none.html", tmp_path)


def test_missing_chromium_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (tmp_path / "index.html").touch()
    with pytest.raises(Unavailable, match=r"apt-get install .* chromium"):
        report_picture.take_pictures(tmp_path / "index.html", tmp_path)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")
def test_pictures_of_page_differ_by_colour_scheme(tmp_path: Path) -> None:
    Results(seed=1).write(tmp_path / "results.json")
    page = render([tmp_path / "results.json"], tmp_path)
    light, dark = (path.read_bytes() for path in report_picture.take_pictures(page, tmp_path / "out", height=400))
    assert size_of(light) == size_of(dark) == (report_picture.WIDTH, 400)
    assert light != dark
