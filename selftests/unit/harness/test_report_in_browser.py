"""Open the report in Chromium, click through it, and check what a reader sees."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from harness import poll_until
from harness.report.gather import render

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium on PATH; as root: apt-get install -y --no-install-recommends chromium",
)

FLAGS: Final = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--window-size=1280,900",
)  # fmt: skip
DEADLINE: Final = 60.0
DIFFERENCE: Final = "x pads by the MTU of the link only: 1360 bytes, not 1359"
DRAWING: Final = "+-----+  +-----+\n| ns1 |--| ns2 |\n+-----+  +-----+"
EVIL: Final = "</pre><script>document.title = 'owned'</script><img src=https://example.invalid/x onerror=alert(1)>"


class Browser:
    """Chromium with one page open, driven by the DevTools protocol over pipes."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._session = ""
        self._number = 0
        self._rest = b""
        self._loaded = False
        self.requests: list[str] = []
        (page,) = [each for each in self("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        self._session = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": parameters} | session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._take(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _take(self, event: dict[str, Any]) -> None:
        self._loaded = self._loaded or event.get("method") == "Page.loadEventFired"
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + DEADLINE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            data = os.read(self._answers, 1 << 16) if ready else b""
            assert data, "chromium closed its pipe, or sent nothing for a minute"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def open(self, address: str) -> None:
        """Open a page and wait until it has loaded."""
        for each in ("about:blank", address):
            self._loaded = False
            self("Page.navigate", url=each)
            while not self._loaded:
                self._take(self._next())

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def seen(self, selector: str = "body") -> str:
        """The visible text of these elements, without what is hidden or folded."""
        shown = f"[...document.querySelectorAll({json.dumps(selector)})].filter(each => each.checkVisibility())"
        return str(self.value(f"{shown}.map(each => each.innerText).join('\\n')"))

    def await_sight(self, selector: str, text: str) -> None:
        """Wait until these elements show this text: the effect of a click or key takes a moment."""
        assert poll_until(lambda: self.seen(selector), lambda seen: seen == text, 10) == text

    def click(self, selector: str) -> None:
        """Click on the first of these elements."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.value(f"JSON.parse(JSON.stringify({element}.getBoundingClientRect()))")
        place = {"x": box["x"] + min(box["width"] / 2, 200), "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Run a browser with its own profile until the block ends."""
    pipes = [*os.pipe(), *os.pipe()]
    theirs_in, commands, answers, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in pipes)
    for end in pipes:
        os.close(end)
    # Chromium reads commands from descriptor 3 and writes answers to 4.
    script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    command = ["bash", "-c", script, "bash", str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    child = subprocess.Popen(
        command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        browser = Browser(commands, answers)
        yield browser
        browser._session = ""  # noqa: SLF001 - a command to the browser, not to the page
        browser("Browser.close")
        child.wait(DEADLINE)
    finally:
        child.kill()
        child.wait()
        os.close(commands)
        os.close(answers)


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


# The contrast ratio of WCAG 2 between an element's text and the first opaque background behind it.
CONTRAST: Final = """(() => {
  const light = (colour) => {
    const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.match(/[\\d.]+/g).map(c => linear(c / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const text = document.querySelector('%s');
  let behind = text;
  while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
  const colours = [getComputedStyle(text).color, getComputedStyle(behind).backgroundColor];
  const [a, b] = colours.map(light).sort((x, y) => y - x);
  return (a + .05) / (b + .05);
})()"""
