"""Open the report in Chromium, click through it, and check what a reader sees."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from harness.report.gather import render
from selftests.support.browser import CHROMIUM, CONTRAST, NO_CHROMIUM, chromium

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from selftests.support.browser import Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

DIFFERENCE: Final = "x pads by the MTU of the link only: 1360 bytes, not 1359"
DRAWING: Final = "+-----+  +-----+\n| ns1 |--| ns2 |\n+-----+  +-----+"
EVIL: Final = "</pre><script>document.title = 'owned'</script><img src=https://example.invalid/x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def entry(name: str, a: str, b: str | None, state: str = "passed", **more: Any) -> dict[str, Any]:
    inside = f"{a}~{b}-v4" if b else a
    sides = {"a": {"impl": a, "version": "1"}, "b": {"impl": b, "version": "1"} if b else None}
    rest = {"lane": "netns", "kernel": "6.1", "seconds": 0.5, "scenarios": ["N03"], "requirements": [], "message": ""}
    return {"id": f"test_it.py::{name}[{inside}]", **sides, "state": state, **rest, "artifacts": "", **more}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which y with x fails, with evidence that contains markup."""
    folder = tmp_path_factory.mktemp("report")
    evidence = folder / "evidence" / "one"
    evidence.mkdir(parents=True)
    (evidence / "topology.txt").write_text(DRAWING)
    (evidence / "ns1-wg0-y.log").write_text(f"peer says {EVIL}")
    results = [
        entry("test_ping", "x", "x"),
        entry("test_ping", "x", "y"),
        entry("test_mtu", "x", "x", "differs", message=DIFFERENCE),
        entry("test_ping", "y", "x", "failed", message=f"no answer {EVIL}", artifacts="evidence/one"),
        entry("test_key", "x", None),
    ]
    path = folder / "results.json"
    path.write_text(json.dumps({"schema": 1, "seed": 7, "host": {}, "results": results}))
    return render([path], folder)


@pytest.fixture
def opened(browser: Browser, page: Path) -> Browser:
    """A browser that has opened the report."""
    browser.open(page.as_uri())
    return browser


def test_verdict_and_matrix_are_seen_without_scrolling(opened: Browser) -> None:
    assert opened.seen("h1") == "✗ 1 failed"
    assert opened.seen("table.matrix").count("✗") == 1
    lowest = opened.value(
        "Math.max(...[...document.querySelectorAll('.cell.bad')].map(e => e.getBoundingClientRect().bottom))"
    )
    assert 0 < lowest < 900


def test_click_on_cell_shows_only_its_tests(opened: Browser) -> None:
    assert opened.seen(".panel") == ""
    opened.click(".cell.bad")
    opened.await_sight(".panel h2", "y ~ x")
    assert opened.seen(".panel .sentence") == "ping"


def test_click_on_test_shows_its_evidence(opened: Browser) -> None:
    opened.click(".cell.bad")
    opened.await_sight(".panel h2", "y ~ x")
    assert opened.seen(".panel pre") == ""
    opened.click(".panel:target .test > summary")
    opened.await_sight(".panel pre", DRAWING)
    opened.click(".panel:target details.file:last-of-type > summary")
    opened.await_sight(".panel pre", f"{DRAWING}\npeer says {EVIL}")


def test_click_on_scenario_shows_why_its_test_differs(opened: Browser) -> None:
    assert opened.seen(".scenarios tbody tr:nth-child(3) td.n").split() == ["≠1+1", "✓", "✗", "✓"]
    opened.click(".scenarios .dot.mixed")
    opened.await_sight(".panel:target .why, .panel:has(:target) .why", DIFFERENCE)


def test_address_of_test_opens_its_evidence(opened: Browser) -> None:
    opened.click(".card.bad .witnesses a")
    opened.await_sight(".panel pre", DRAWING)
    assert opened.value("location.hash").startswith("#t-")


def test_address_of_test_opens_its_evidence_without_scripts(browser: Browser, page: Path) -> None:
    browser("Emulation.setScriptExecutionDisabled", value=True)
    try:
        fragment = page.read_text().split('href="#t-')[1].split('"')[0]
        browser.open(f"{page.as_uri()}#t-{fragment}")
        browser.await_sight(".panel pre", DRAWING)
    finally:
        browser("Emulation.setScriptExecutionDisabled", value=False)


def test_keyboard_opens_cell_and_returns_focus(opened: Browser) -> None:
    opened.value("document.querySelector('table.matrix a').focus()")
    opened.press("ArrowRight")
    opened.press("Enter")
    opened.await_sight(".panel h2:focus", "x ~ y")
    opened.press("Escape")
    opened.await_sight("a:focus", "1 ✓")
    assert opened.value("document.activeElement.getAttribute('aria-label')") == "x to y: 1 passed"
    assert opened.seen(".panel") == ""


def test_hostile_text_stays_text_and_nothing_is_fetched(opened: Browser) -> None:
    assert opened.value("document.title") == "✗ 1 failed · WireGuard interop"
    assert opened.value("document.querySelectorAll('img, iframe, script[src]').length") == 0
    assert [address for address in opened.requests if not address.startswith(("file:", "about:", "data:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_light_and_dark(opened: Browser, scheme: str) -> None:
    opened("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    for selector in ("body", ".banner h1", ".cell.good .big", ".cell.bad .big", ".dim"):
        assert opened.value(CONTRAST % selector) >= 4.5, selector
