"""Open the site in Chromium: at a phone's width, light and dark, by keyboard alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import pytest

from harness.report.site import write_site
from selftests.support.browser import CHROMIUM, CONTRAST, NO_CHROMIUM, chromium

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from selftests.support.browser import Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

NAMES: Final = ("kernel", "refwg", "wireguard-go", "wireguard-go-debian", "boringtun", "a-program-with-a-long-name")
LONG: Final = "x" * 300
STATES: Final = ("passed", "failed", "xfailed", "differs", "unsupported")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of six implementations with results in each colour, one of them with a message without spaces."""
    folder = tmp_path_factory.mktemp("site")
    results = [
        {
            "id": f"t.py::test_{state}[{a}~{b}]", "a": {"impl": a, "version": "0.7.1"},
            "b": {"impl": b, "version": "0.7.1"}, "lane": "vm", "kernel": "6.1.0-57-cloud-amd64",
            "state": state if b == "boringtun" else "passed", "seconds": 1.0,
            "message": "" if state == "passed" else LONG, "requirements": ["HS-08"],
        }
        for a in NAMES for b in NAMES for state in STATES
    ]  # fmt: skip
    path = folder / "results.json"
    path.write_text(json.dumps({"schema": 1, "seed": 7, "host": {"kernel": "6.1.0"}, "results": results}))
    write_site([path], folder)
    return folder


@pytest.mark.parametrize("name", ["index", "boringtun"])
def test_page_fits_width_of_phone(browser: Browser, site: Path, name: str) -> None:
    browser("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    try:
        browser.open((site / f"{name}.html").as_uri())
        browser.value("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        assert browser.value("document.documentElement.scrollWidth") == 360
        assert browser.value("document.documentElement.clientWidth") == 360
    finally:
        browser("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_light_and_dark(browser: Browser, site: Path, scheme: str) -> None:
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open((site / "index.html").as_uri())
    for selector in ("h1", ".cell.good .big", ".cell.bad .small", ".dim", "th a"):
        assert browser.value(CONTRAST % selector) >= 4.5, selector
    browser.open((site / "boringtun.html").as_uri())
    for selector in (".yes", ".no", ".facts dt", ".card.bad b", ".s-security"):
        assert browser.value(CONTRAST % selector) >= 4.5, selector
    dark = browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
    assert dark == (scheme == "dark")


def test_keyboard_reaches_content_and_opens_cell(browser: Browser, site: Path) -> None:
    browser.open((site / "index.html").as_uri())
    browser.press("Tab")
    browser.await_sight("a:focus", "To the content")
    browser.value("document.querySelector('.cell.bad').focus()")
    browser.press("Enter")
    browser.await_sight("h3:target", "With boringtun")
    assert browser.value("document.title").startswith("kernel 6.1 ")


def test_site_fetches_nothing(browser: Browser, site: Path) -> None:
    browser.requests.clear()
    browser.open((site / "index.html").as_uri())
    browser.open((site / "boringtun.html").as_uri())
    assert [address for address in browser.requests if not address.startswith(("file:", "about:", "data:"))] == []
    assert sum(address.startswith("file:") for address in browser.requests) == 2
