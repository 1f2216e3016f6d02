"""Drive Chromium by the DevTools protocol: open a page, click, press keys, read it."""

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

from harness import poll_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_CHROMIUM: Final = "no chromium on PATH; as root: apt-get install -y --no-install-recommends chromium"
FLAGS: Final = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--window-size=1280,900",
)  # fmt: skip
DEADLINE: Final = 60.0
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
