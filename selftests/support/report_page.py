"""Write files of results for the report, and read the page that is made of them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any, Final

from harness.report.gather import gather, read_run

if TYPE_CHECKING:
    from pathlib import Path

    from harness.report.page import Page

EVIL: Final = '</pre></details><script>alert(1)</script><img src=x onerror="alert(1)"> \' &amp; {{ 7 * 7 }}'


def entry(name: str = "test_it.py::test_ping", a: str = "x", b: str = "y", state: str = "passed", **more: Any) -> Any:
    """A result of A with B, of A alone if B is empty, or of neither."""
    pair = "~".join(filter(None, (a, b)))
    sides = {key: {"impl": impl, "version": "1"} if impl else None for key, impl in (("a", a), ("b", b))}
    rest = {"lane": "netns", "kernel": "6.1", "seconds": 0.5, "message": "", "artifacts": ""}
    return (
        {"id": f"{name}[{pair}-v4]", **sides, "state": state, "scenarios": [], "requirements": [], "bugs": []}
        | rest
        | more
    )


def write(folder: Path, *entries: Any, seed: int = 7) -> Path:
    """Write results into the folder's results.json, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps({"schema": 1, "seed": seed, "host": {"kernel": EVIL}, "results": entries}))
    return path


def page_of(folder: Path, *entries: Any, complaint: str = "") -> Page:
    """The page of these results, before it is drawn."""
    return gather([read_run(write(folder, *entries))], folder, None, complaint)


class Tags(HTMLParser):
    """The elements, text, ids and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.events: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.events += [name for name, _ in attrs if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in {"href", "src"}]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


def tags(path: Path) -> Tags:
    """Read a page that was drawn."""
    return Tags(path.read_text())
