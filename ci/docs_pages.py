"""Give MkDocs the pages outside docs/, and check links to other files: its hook."""

from __future__ import annotations

import logging
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
# Pages of the site that lie elsewhere in the checkout, by their path from its root.
OUTSIDE: Final = ("ARCHITECTURE.md", "CONTRIBUTING.md", "bench/README.md")
# The page in whose place the site has another one: README is what the index of the site is.
INSTEAD: Final = {"README.md": "index.md"}
_LINK: Final = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_LOG: Final = logging.getLogger("mkdocs.hooks.docs_pages")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of OUTSIDE (hook)."""
    from mkdocs.structure.files import File  # noqa: PLC0415 - only the environment of ci/docs has it

    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Change the links of a page so that they fit the site (hook)."""
    source = page.file.src_uri
    home = PurePosixPath(source if source in OUTSIDE else f"docs/{source}").parent
    return fitting(markdown, source, home)


def fitting(markdown: str, source: str, home: PurePosixPath) -> str:
    """Return the page with links to pages of the site relative to it, and links to other files as their paths.

    source: the page's path in the site. home: its directory in the checkout. Logs a warning, which fails a strict
    build, for a link to a file that does not exist.
    """

    def change(link: re.Match[str]) -> str:
        target, anchor = link["target"], link["anchor"] or ""
        if ":" in target.partition("/")[0]:
            return link[0]
        path = normpath(home / target)
        if not (ROOT / path).exists():
            _LOG.warning("%s: link to %s, which does not exist", source, path)
        place = INSTEAD.get(path) or (path if path in OUTSIDE else None)
        if place is None and path.startswith("docs/") and path.endswith((".md", ".png", ".svg")):
            place = path.removeprefix("docs/")
        if place is None:
            text = link["text"]
            return text if text.strip("`") == path else f"{text} (`{path}`)"
        up = "../" * (len(PurePosixPath(source).parts) - 1)
        return f"[{link['text']}]({up}{place}{anchor})"

    return _LINK.sub(change, markdown)
