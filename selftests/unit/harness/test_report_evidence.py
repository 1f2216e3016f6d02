"""Check what the report's page shows of evidence, and that hostile text stays text."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from harness.report.evidence import _BUDGET, clean
from harness.report.gather import read_run as read
from harness.report.gather import render
from selftests.support.report_page import EVIL, entry, page_of, tags, write

if TYPE_CHECKING:
    from pathlib import Path

    from harness.report.page import Shown


# Evidence


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    folder = tmp_path / "evidence" / "one"
    folder.mkdir(parents=True)
    return folder


def with_evidence(tmp_path: Path, artifacts: str = "evidence/one") -> Shown:
    (test,) = page_of(tmp_path, entry(state="failed", artifacts=artifacts)).tests
    return test


def test_evidence_is_shown_in_fixed_order(tmp_path: Path, evidence: Path) -> None:
    for name in ("ns1.txt", "ns1-wg0.wg.txt", "commands.txt", "a.log", "topology.txt", "failure.txt", "trace.jsonl"):
        (evidence / name).write_text("text")
    kinds = [text.kind for text in with_evidence(tmp_path).texts]
    assert kinds == [
        "failure", "topology", "commands", "wg state", "trace of refwg", "log of the program", "state of the node",
    ]  # fmt: skip


@pytest.mark.parametrize(("size", "left_out"), [(48_000, 0), (48_001, 1), (1_000_000, 952_000)])
def test_long_text_keeps_its_beginning_and_its_end(tmp_path: Path, evidence: Path, size: int, left_out: int) -> None:
    (evidence / "a.log").write_text("<" + "." * (size - 2) + ">")
    (text,) = with_evidence(tmp_path).texts
    shown = text.text or ""
    assert (shown[0], shown[-1], text.left_out, text.size) == ("<", ">", left_out, size)
    assert len(shown) < 48_100


def test_binary_file_is_linked_and_not_shown(tmp_path: Path, evidence: Path) -> None:
    (evidence / "veth #1.pcapng").write_bytes(b"\x0a\x0d\x0d\x0a\x00")
    (text,) = with_evidence(tmp_path).texts
    assert (text.text, text.href) == (None, "evidence/one/veth%20%231.pcapng")


def test_evidence_text_is_left_out_above_page_budget(
    tmp_path: Path, evidence: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _BUDGET > 1_000_000
    monkeypatch.setattr("harness.report.evidence._BUDGET", 10)
    for name in ("a.log", "b.log"):
        (evidence / name).write_text("8 bytes.")
    assert [text.text for text in with_evidence(tmp_path).texts] == ["8 bytes.", None]


@pytest.mark.parametrize("artifacts", ["..", "/etc", "evidence/../../..", "evidence/link", "absent", "a\0b"])
def test_evidence_outside_of_results_directory_is_not_read(tmp_path: Path, evidence: Path, artifacts: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (tmp_path / "report" / "evidence").mkdir(parents=True)
    (tmp_path / "report" / "evidence" / "link").symlink_to(outside)
    (test,) = page_of(tmp_path / "report", entry(artifacts=artifacts)).tests
    assert list(test.texts) == []
    (evidence / "link.txt").symlink_to(outside / "secret.txt")
    os.mkfifo(evidence / "pipe.txt")
    assert list(with_evidence(tmp_path).texts) == []


def test_page_links_lead_to_evidence(tmp_path: Path, evidence: Path) -> None:
    (evidence / "a.log").write_text("text")
    path = render([write(tmp_path, entry(artifacts="evidence/one"))], tmp_path / "elsewhere" / "page.html")
    assert "../evidence/one/a.log" in tags(path).links


# Escaping


@pytest.mark.parametrize(
    "where", ["id", "message", "state", "lane", "kernel", "scenarios", "requirements", "bugs", "a", "text"]
)
def test_hostile_text_stays_text(tmp_path: Path, evidence: Path, where: str) -> None:
    (evidence / "a.log").write_text(EVIL if where == "text" else "text")
    wrong = {"a": {"impl": EVIL, "version": EVIL}, "scenarios": [EVIL], "requirements": [EVIL], "bugs": [EVIL]}.get(
        where, EVIL
    )
    results = [entry(), entry(state="failed", artifacts="evidence/one") | ({} if where == "text" else {where: wrong})]
    page = tags(render([write(tmp_path, *results)], tmp_path))
    assert (page.tags.count("script"), page.tags.count("img"), page.events) == (1, 0, [])
    assert "{{ 7 * 7 }}" in page.text


def test_page_has_no_external_links(tmp_path: Path) -> None:
    page = tags(render([write(tmp_path, entry(), entry(a="y", state="failed"))], tmp_path))
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []


def test_every_link_within_page_has_its_target(tmp_path: Path) -> None:
    entries = [entry(), entry(b=""), entry(a="", b=""), entry(a="y", state="failed"), entry(lane="vm", state="xfailed")]
    page = tags(render([write(tmp_path, *entries)], tmp_path))
    assert {link[1:] for link in page.links if link.startswith("#")} - {""} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m\n", "red\n"),
        ("a\x00b\x1bc\x7f", "a<00>b<1b>c<7f>"),
        ("\u202egnp.exe", "<202e>gnp.exe"),
        ("\ud800", "<d800>"),
        ("line\r\nline\tend ü ≈", "line\nline\tend ü ≈"),
    ],
)
def test_invisible_characters_are_removed_or_made_visible(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_invisible_characters_of_result_are_made_visible(tmp_path: Path) -> None:
    bell, seen = "x\a", "x<07>"
    texts = dict.fromkeys(("id", "lane", "kernel", "state", "message", "artifacts"), bell)
    side = {"impl": bell, "version": bell}
    (result,) = read(write(tmp_path, entry(**texts, b="") | {"a": side, "b": side})).results
    assert {name: getattr(result, name) for name in texts} == dict.fromkeys(texts, seen)
    assert result.a == result.b == {"impl": seen, "version": seen}
