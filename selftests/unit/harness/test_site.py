"""Check the site: whose result counts for whom, that hostile text stays text, and that its pages hold together."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any, Final

import pytest
from click.testing import CliRunner

from harness import suite
from harness.cli.commands import cli
from harness.cli.site import last_results
from harness.errors import UsageError
from harness.report.site import build, write_site

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from harness.report.site import Program, Site

EVIL: Final = (
    '</p></table></style><script>alert(1)</script><img src=//example.invalid/x onerror="alert(1)"> \' &amp; {{ 7 * 7 }}'
)
VOID: Final = {"meta", "link", "br", "img", "input", "hr"}
GO: Final = "0.0.20250522"
# A known failure of wireguard-go, in selftests/expectations/wireguard-go.toml.
KNOWN: Final = "selftests/netns/test_mtu.py::test_known"


def entry(name: str, a: str, b: str = "", state: str = "passed", **more: Any) -> dict[str, Any]:
    """A result of A with B, or of A alone. A side is NAME or NAME@VERSION."""
    sides: dict[str, Any] = {"a": None, "b": None}
    for key, text in (("a", a), ("b", b)):
        if text:
            impl, _, version = text.partition("@")
            sides[key] = {"impl": impl, "version": version or "1"}
    pair = "~".join(side["impl"] for side in sides.values() if side)
    rest = {"lane": "netns", "kernel": "6.18.1", "seconds": 0.5, "message": "", "artifacts": ""}
    cited: dict[str, list[str]] = {"scenarios": [], "requirements": [], "bugs": []}
    return {"id": f"{name}[{pair}]", **sides, "state": state, **rest, **cited, **more}


def write(folder: Path, *entries: Any, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    document = {"schema": 1, "seed": 7, "date": "2026-11-30T21:04:05+00:00", "host": {"kernel": "6.18.1"}}
    path.write_text(json.dumps(document | {"results": entries} | more))
    return path


def site_of(folder: Path, *entries: Any) -> Site:
    return build([write(folder, *entries)])


def program(site: Site, name: str) -> Program:
    return next(each for each in site.programs if each.name == name)


class Page(HTMLParser):
    """A page whose elements are all closed in order; its ids, links, addresses that it fetches, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        values = {name: value or "" for name, value in attrs}
        self.handlers += [name for name in names if name.startswith("on")]
        self.ids += [values["id"]] if "id" in values else []
        if "href" in values:
            (self.links if tag == "a" else self.fetched).append(values["href"])
        self.fetched += [values[name] for name in ("src", "srcset", "action", "data", "poster") if name in values]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text += data


def pages_of(folder: Path) -> Mapping[str, Page]:
    return {path.name: Page(path.read_text()) for path in sorted(folder.glob("*.html"))}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A site of results in which every text that a run can choose is markup."""
    sides = {"a": {"impl": EVIL, "version": EVIL, "like": EVIL}, "b": {"impl": "index", "version": "../x"}}
    more = {"lane": EVIL, "kernel": EVIL, "message": EVIL, "requirements": [EVIL], "scenarios": [EVIL], "bugs": [EVIL]}
    entries = [
        {"id": f"{EVIL}::{EVIL}{number}[{EVIL}]", "state": state, "artifacts": EVIL} | sides | more
        for number, state in enumerate(("passed", "failed", "differs", "xfailed", "error", "blocked", EVIL))
    ]
    path = write(tmp_path / "run", *entries, date=EVIL, host={"kernel": EVIL})
    write_site([path], tmp_path / "site")
    return tmp_path / "site"


# The pages


def test_hostile_text_stays_text_in_each_page(hostile: Path) -> None:
    pages = pages_of(hostile)
    assert len(pages) == 3
    for page in pages.values():
        assert EVIL in page.text
        assert not {"script", "img", "iframe", "object", "form"} & {*page.tags}
        assert page.handlers == []


def test_pages_fetch_nothing_and_forbid_it(hostile: Path) -> None:
    for name, page in pages_of(hostile).items():
        text = (hostile / name).read_text()
        assert all(address.startswith("data:image/svg+xml,") for address in page.fetched)
        assert re.findall(r"url\(|@import", text) == []
        assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text


def test_page_names_and_anchors_are_safe(hostile: Path) -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+\.html", path.name) for path in hostile.iterdir())
    for page in pages_of(hostile).values():
        assert len(page.ids) == len(set(page.ids))
        assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in page.ids)


def test_links_lead_to_pages_and_anchors_of_site(hostile: Path, tmp_path: Path) -> None:
    pages = pages_of(hostile)
    write_site([write(tmp_path, entry("t::test_x", "refwg", f"wireguard-go@{GO}"))], tmp_path / "plain")
    for each in (pages, pages_of(tmp_path / "plain")):
        for name, page in each.items():
            for link in page.links:
                if not link.startswith("https://"):
                    target, _, anchor = link.partition("#")
                    assert (anchor or "main") in each[target or name].ids, link


def test_site_names_neither_paths_nor_evidence(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run",
        entry("t::test_x", "mine", "mine", "failed", artifacts="evidence/secret", message="lost"),
        run={"root": "/home/me/secret", "programs": {"mine": "/home/me/secret/wg"}, "results": "/home/me/secret/r"},
    )
    (path.parent / "evidence" / "secret").mkdir(parents=True)
    (path.parent / "evidence" / "secret" / "failure.txt").write_text("secret")
    for page in write_site([path], tmp_path / "site"):
        assert "secret" not in page.read_text()
        assert "lost" in page.read_text() or page.name == "index.html"


def test_later_site_replaces_pages_of_earlier_one(tmp_path: Path) -> None:
    write_site([write(tmp_path, entry("t::test_x", "old", "old"))], tmp_path / "site")
    write_site([write(tmp_path, entry("t::test_x", "new", "new"))], tmp_path / "site")
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["index.html", "new.html"]


def test_foreign_page_is_refused_and_kept(tmp_path: Path) -> None:
    path = write(tmp_path, entry("t::test_x", "x", "x"))
    foreign = tmp_path / "site" / "index.html"
    foreign.parent.mkdir()
    foreign.write_text("<!DOCTYPE html>mine")
    with pytest.raises(UsageError, match=r"index\.html is not a page of this site"):
        write_site([path], foreign.parent)
    assert foreign.read_text() == "<!DOCTYPE html>mine"
    assert list(foreign.parent.iterdir()) == [foreign]


# The matrix


def test_kernels_of_two_files_are_two_implementations(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / kernel, entry("t::test_x", f"kernel@{kernel}", "refwg", lane="vm", kernel=kernel))
        for kernel in ("6.1.0-57-cloud", "6.12.117-cloud")
    ]
    site = build(paths)
    assert [each.name for each in site.programs] == ["kernel 6.1", "kernel 6.12", "refwg"]
    assert {*site.matrix} == {("kernel 6.1", "refwg"), ("kernel 6.12", "refwg")}
    assert site.matrix["kernel 6.12", "refwg"].anchor == "kernel-6-12.html#with-refwg"
    assert program(site, "refwg").counts == [("passed", 2)]


def test_versions_of_one_program_are_two_implementations(tmp_path: Path) -> None:
    site = site_of(tmp_path, entry("t::test_x", "mine@1.0", "refwg"), entry("t::test_x", "mine@2.0", "refwg"))
    assert [each.slug for each in site.programs] == ["refwg", "mine-1-0", "mine-2-0"]


def test_result_of_later_file_counts(tmp_path: Path) -> None:
    first = write(tmp_path / "1", entry("t::test_x", "x", "y", "failed"), entry("t::test_y", "x", "y"))
    second = write(tmp_path / "2", entry("t::test_x", "x", "y"))
    assert build([first, second]).counts == [("passed", 2)]
    assert build([second, first]).counts == [("failed", 1), ("passed", 1)]


def test_implementation_with_skipped_tests_only_is_left_out(tmp_path: Path) -> None:
    site = site_of(tmp_path, entry("t::test_x", "x", "y"), entry("t::test_x", "kernel", "x", "skipped"))
    assert [each.name for each in site.programs] == ["x", "y"]
    assert site.left_out == ["kernel 6.18"]


def test_tests_without_implementation_are_not_shown(tmp_path: Path) -> None:
    site = site_of(tmp_path, entry("t::test_x", "x"), entry("t::test_lab", "", "", "failed"))
    assert site.counts == [("passed", 1)]
    assert program(site, "x").alone is not None


# Whose result it is


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of results that has a known failure of wireguard-go, and a catalogue."""
    monkeypatch.setenv(suite.SUITE, str(tmp_path))
    (tmp_path / "selftests" / "conformance").mkdir(parents=True)
    catalogue = [
        f'[[requirement]]\nid = "{id_}"\ntitle = "T"\nlevel = "{level}"\n'
        for id_, level in (("A-01", "must"), ("A-02", "should"))
    ]
    (tmp_path / "selftests" / "conformance" / "requirements.toml").write_text("".join(catalogue))
    (tmp_path / "selftests" / "expectations").mkdir()
    texts = {
        "versions": "0.0.2025*",
        "requirement": "A-01",
        "observed": "no padding",
        "message": "84",
        "test": "t::test_x",
    }
    lines = [
        f'{key} = "{text}"' for key, text in (texts | {"link": "javascript:alert(1)", "severity": "security"}).items()
    ]
    expected = "\n".join(["[[expect]]", *lines, "", "[[expect]]", *lines]).replace("0.0.2025*", "0.0.2022*", 1)
    (tmp_path / "selftests" / "expectations" / "wireguard-go.toml").write_text(expected)
    return tmp_path


def test_known_failure_counts_for_its_program_only(known: Path) -> None:
    site = site_of(
        known, entry("t::test_x", "refwg", f"wireguard-go@{GO}", "xfailed", message="84", requirements=["A-01"])
    )
    go, refwg = program(site, "wireguard-go"), program(site, "refwg")
    assert (go.counts, go.of_peers) == ([("xfailed", 1)], 0)
    assert (refwg.counts, refwg.of_peers) == ([], 1)
    assert [(each.severity, each.observed, each.seen, each.link) for each in go.findings] == [
        ("security", "no padding", 1, "")
    ]
    assert (go.shares["must"].covered, refwg.shares["must"].covered) == (1, 0)


def test_build_like_program_has_its_findings_of_any_version(known: Path) -> None:
    mine = entry("t::test_x", "mine@9", "refwg")
    mine["a"]["like"] = "wireguard-go"
    (finding,) = program(site_of(known, mine), "mine").findings
    assert finding.entry.id == "A-01"
    assert program(site_of(known, mine), "mine").title == "a build of wireguard-go"


def test_finding_of_other_version_is_not_shown(known: Path) -> None:
    assert program(site_of(known, entry("t::test_x", "wireguard-go@0.0.2023", "refwg")), "wireguard-go").findings == []


def test_new_failure_counts_for_program_to_blame_only(tmp_path: Path) -> None:
    entries = [
        entry("t::test_x", a, b, "failed" if "bad" in (a, b) else "passed", message="lost")
        for a in ("good", "bad")
        for b in ("good", "bad")
    ]
    site = site_of(tmp_path, *entries)
    assert program(site, "bad").counts == [("failed", 3)]
    assert [cause.blame for cause in program(site, "bad").failures] == ["bad"]
    assert (program(site, "good").counts, program(site, "good").failures) == ([("passed", 1)], [])


def test_new_failure_names_five_requirements_and_five_bugs(tmp_path: Path) -> None:
    ids = [f"X-{n}" for n in range(7)]
    failed = entry("t::test_x", "x", "", "failed", message="lost", requirements=ids, bugs=ids[:6])
    pages = write_site([write(tmp_path, failed)], tmp_path / "site")
    text = "".join(page.read_text() for page in pages)
    assert "<b>X-4</b>" in text
    assert "; and 3 more</p>" in text


def test_difference_counts_for_program_that_message_names(tmp_path: Path) -> None:
    site = site_of(tmp_path, entry("t::test_x", "x", "y", "differs", message="y pads by 16 bytes"))
    assert [each.message for each in program(site, "y").differences] == ["y pads by 16 bytes"]
    assert program(site, "x").differences == []


def test_difference_does_not_count_for_program_that_passes_alone(tmp_path: Path) -> None:
    site = site_of(tmp_path, entry("t::test_x", "x", "y", "differs", message="sent 2"), entry("t::test_x", "x", "x"))
    assert [len(program(site, name).differences) for name in "xy"] == [0, 1]


def test_difference_names_shoulds_that_allow_it(known: Path) -> None:
    site = site_of(known, entry("t::test_x", "x", "", "differs", message="sent 2", requirements=["A-01", "A-02"]))
    (difference,) = program(site, "x").differences
    assert [each.id for each in difference.entries] == ["A-02"]


# Capabilities


def has(site: Site, name: str) -> dict[str, bool | None]:
    return {each.name: each.has for each in program(site, name).capabilities}


def test_capabilities_come_from_manifest_of_lab(tmp_path: Path) -> None:
    found = has(site_of(tmp_path, entry("t::test_x", f"wireguard-go@{GO}", "refwg")), "wireguard-go")
    assert (found["roaming"], found["bounded-loop"]) == (True, False)


@pytest.mark.parametrize(("kernel", "removes"), [("6.1.0-57-cloud", False), ("6.16.1", True), ("10.0", True)])
def test_capabilities_of_kernel_follow_its_version(tmp_path: Path, kernel: str, *, removes: bool) -> None:
    site = site_of(tmp_path, entry("t::test_x", f"kernel@{kernel}", "refwg", lane="vm", kernel=kernel))
    name = f"kernel {re.match('[0-9]+.[0-9]+', kernel)[0]}"  # type: ignore[index]
    assert has(site, name)["remove-allowed-ip"] is removes
    assert has(site, name)["roaming"]


def test_capabilities_of_unknown_program_come_from_its_tests(tmp_path: Path) -> None:
    message = "theirs does not declare the capability fwmark"
    found = has(site_of(tmp_path, entry("t::test_x", "theirs", "", "unsupported", message=message)), "theirs")
    assert (found["fwmark"], found["roaming"]) == (False, None)


# The command


def test_command_takes_last_results_below_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    last = [write(tmp_path / "report" / folder, entry("t::test_x", "x", "x")) for folder in ("vm", "warp", "")]
    for folder in ("previous", "again", "vm/previous"):
        write(tmp_path / "report" / folder, entry("t::test_x", "gone", "gone"))
    assert last_results(tmp_path) == last
    outcome = CliRunner().invoke(cli, ["site", "out"], standalone_mode=False)
    assert outcome.output.splitlines()[-1] == "2 pages; index: out/index.html"
    assert not (tmp_path / "out" / "gone.html").exists()


def test_command_without_results_names_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(cli, ["site", "out"], standalone_mode=False)
    assert isinstance(outcome.exception, UsageError)
    assert "make one by wg-interop run" in str(outcome.exception)
    assert not (tmp_path / "out").exists()
