"""Check the report's page: what it shows of results, and that hostile text stays text."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any, Final

import pytest

from harness.errors import UsageError
from harness.report.conformance import read_conformance
from harness.report.evidence import _BUDGET, clean
from harness.report.gather import gather, render, sort_names
from harness.report.gather import read_run as read
from harness.report.page import seconds, tone
from harness.report.results import GATING, STATES

if TYPE_CHECKING:
    from pathlib import Path

    from harness.report.page import Page, Shown

EVIL = '</pre></details><script>alert(1)</script><img src=x onerror="alert(1)"> \' &amp; {{ 7 * 7 }}'


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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps({"schema": 1, "seed": seed, "host": {"kernel": EVIL}, "results": entries}))
    return path


def page_of(folder: Path, *entries: Any, complaint: str = "") -> Page:
    return gather([read(write(folder, *entries))], folder, None, complaint)


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
    return Tags(path.read_text())


# The verdict and the colours


@pytest.mark.parametrize(
    ("states", "complaint", "headline"),
    [
        (["passed", "passed"], "", ("good", "2 passed")),
        (["passed", "xfailed", "skipped", "unsupported", "differs"], "", ("good", "1 passed")),
        (["passed", "failed", "error", "failed"], "", ("bad", "2 failed, 1 error")),
        (["passed", "xpassed"], "", ("bad", "1 xpassed")),
        (["passed", "flaky"], "", ("bad", "1 flaky")),
        (["passed", "blocked"], "", ("bad", "1 blocked")),
        (["passed", "not_reached"], "", ("bad", "1 not reached")),
        (["skipped", "xfailed"], "", ("bad", "no test passed")),
        ([], "", ("bad", "no test passed")),
        (["passed"], "lane vm was asked for and did not run", ("bad", "lane vm was asked for and did not run")),
    ],
)
def test_verdict_is_good_when_tests_passed_and_none_failed(
    tmp_path: Path, states: list[str], complaint: str, headline: tuple[str, str]
) -> None:
    entries = [entry(f"test_it.py::test_{number}", state=state) for number, state in enumerate(states)]
    assert page_of(tmp_path, *entries, complaint=complaint).headline == headline


@pytest.mark.parametrize(
    ("states", "colour"),
    [
        ({"passed"}, "good"),
        ({"passed", "skipped", "unsupported"}, "good"),
        ({"passed", "xfailed"}, "mixed"),
        ({"passed", "differs"}, "mixed"),
        ({"xfailed", "skipped"}, "known"),
        ({"skipped", "unsupported"}, "none"),
        (set(), "none"),
        ({"passed", "of a later version"}, "bad"),
    ],
)
def test_cell_colour_follows_its_worst_state(states: set[str], colour: str) -> None:
    assert tone(states) == colour


@pytest.mark.parametrize("state", STATES)
def test_cell_is_red_exactly_when_it_holds_failing_state(state: str) -> None:
    assert (tone({state, "passed", "xfailed"}) == "bad") == (state in GATING | {"flaky", "blocked"})


def test_failures_come_first(tmp_path: Path) -> None:
    page = page_of(tmp_path, *(entry(f"test_it.py::test_{state}", state=state) for state in reversed(STATES)))
    assert [test.state for test in page.tests][:3] == ["failed", "error", "xpassed"]
    assert [state for state, _ in page.counts][-2:] == ["unsupported", "skipped"]


@pytest.mark.parametrize("message", ["x" * 900 + " the clue", "first\n" + "line\n" * 5000 + "the clue"])
@pytest.mark.parametrize("state", ["failed", "blocked", "xfailed", "differs"])
def test_message_stands_in_page_whole(tmp_path: Path, message: str, state: str) -> None:
    text = tags(render([write(tmp_path, entry(state=state, message=message))], tmp_path)).text
    assert message in text


def test_failures_are_grouped_by_cause(tmp_path: Path) -> None:
    lost: dict[str, Any] = {"state": "failed", "requirements": ["RT-03"]}
    page = page_of(
        tmp_path,
        *(entry(f"t.py::test_{n}", b=peer, message=f"{n} lost\nlog", **lost) for n in range(4) for peer in "yz"),
        entry("t.py::test_0", a="z", state="error", message="no handshake"),
        entry("t.py::test_0", b="z", a="z", message="5 lost", state="xfailed"),
    )
    assert [(cause.blame, cause.counts) for cause in page.causes] == [
        ("x", [("failed", 8)]),
        ("y or z", [("error", 1)]),
    ]
    assert page.causes[0].requirements == ["RT-03"]
    assert page.tally == ["9 failures of 2 causes", "x: 8 failures of 1 cause", "y or z: 1 failure of 1 cause"]


def test_each_cause_leads_to_all_its_tests(tmp_path: Path) -> None:
    entries = [entry(f"t.py::test_{n}", state="failed", message=f"{n} lost") for n in range(30)]
    found = tags(render([write(tmp_path, *entries)], tmp_path))
    assert "30 failures of 1 cause" in found.text
    # Ten of them are linked as the slowest, too.
    assert len({link for link in found.links if link.startswith("#t-")}) == 30


def test_cause_names_five_requirements_and_unfolds_others(tmp_path: Path) -> None:
    ids = [f"X-{n}" for n in range(7)]
    text = render([write(tmp_path, entry(state="failed", message="lost", requirements=ids))], tmp_path).read_text()
    (summary,) = [found for found in re.findall("<summary>(.*?)</summary>", text) if "and 2 more" in found]
    assert re.findall(r"X-\d", summary) == ids[:5]
    assert "X-6" in text


# Cells


def test_every_pair_has_cell_in_matrix_of_its_lane_and_kernel(tmp_path: Path) -> None:
    page = page_of(
        tmp_path, entry(), entry(a="y", b="x", state="failed"), entry(lane="vm"), entry(lane="vm", kernel="6.12")
    )
    assert {(group.lane, group.kernel): [*group.matrix] for group in page.groups} == {
        ("netns", "6.1"): [("x", "y"), ("y", "x")], ("vm", "6.1"): [("x", "y")], ("vm", "6.12"): [("x", "y")],
    }  # fmt: skip
    assert [cell.tone for cell in page.groups[0].matrix.values()] == ["good", "bad"]


def test_page_names_test_on_which_lanes_disagree(tmp_path: Path) -> None:
    here, there = entry(lane="netns", kernel="6.18"), entry(lane="vm", kernel="6.1", state="failed")
    out = render([write(tmp_path, here, there)], tmp_path)
    assert "passes in netns, Linux 6.18, and fails in vm, Linux 6.1" in tags(out).text
    out = render([write(tmp_path, here)], tmp_path)
    assert "Where lanes and kernels disagree" not in tags(out).text


def test_cell_counts_its_tests_by_state(tmp_path: Path) -> None:
    states = ["passed", "failed", "passed", "skipped"]
    page = page_of(tmp_path, *(entry(f"test_it.py::test_{n}", state=state) for n, state in enumerate(states)))
    assert page.groups[0].matrix["x", "y"].counts == [("failed", 1), ("passed", 2), ("skipped", 1)]


def test_tests_of_one_implementation_are_table_rows(tmp_path: Path) -> None:
    page = page_of(tmp_path, entry(b=""), entry(a="kernel", b="", state="failed"), entry("test_it.py::test_key", b=""))
    (group,) = page.groups
    rows = [(row.title, row.id, [tone for tone, _, _ in row.marks]) for row in group.configuration]
    assert rows == [("key", "v4", ["none", "good"]), ("ping", "v4", ["bad", "good"])]


def test_tests_without_implementation_are_listed_by_file(tmp_path: Path) -> None:
    page = page_of(tmp_path, entry("a.py::test_x", a="", b=""), entry("b.py::test_y", a="", b=""))
    assert [panel.title for panel in page.groups[0].others] == ["a.py", "b.py"]


def test_two_versions_of_program_have_separate_cells(tmp_path: Path) -> None:
    page = page_of(tmp_path, entry(b="z"), entry(b="z", a="x") | {"a": {"impl": "x", "version": "2"}})
    assert [*page.groups[0].matrix] == [("x 1", "z"), ("x 2", "z")]


def test_implementations_are_sorted_in_fixed_order() -> None:
    names = ["mine", "gotatun", "refwg+no-clamp", "wireguard-go", "refwg", "kernel"]
    assert sort_names(names) == ["kernel", "refwg", "refwg+no-clamp", "wireguard-go", "gotatun", "mine"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a/test_it.py::test_ping_is_answered[x~y]", ("a/test_it.py", "ping is answered", "")),
        ("test_it.py::test_ping[x~y-A-to-B-v4]", ("test_it.py", "ping", "A-to-B-v4")),
        ("test_it.py::TestIt::test_ping[x~y-fd00::1]", ("test_it.py::TestIt", "ping", "fd00::1")),
        ("test_it.py::test_ping", ("test_it.py", "ping", "")),
    ],
)
def test_name_of_test_is_shown_as_sentence(tmp_path: Path, name: str, shown: tuple[str, str, str]) -> None:
    (test,) = page_of(tmp_path, entry() | {"id": name}).tests
    assert (test.file, test.sentence, test.rest) == shown


@pytest.mark.parametrize(
    ("more", "command"),
    [
        ({}, "pytest 'test_it.py::test_ping[x~y-v4]' --pair 'x~y' --seed 7"),
        ({"lane": "vm", "b": None}, "pytest 'test_it.py::test_ping[x~y-v4]' --lane vm --impl x --seed 7"),
        ({"id": "vm::guest[6.1]", "lane": "vm"}, ""),
    ],
)
def test_command_to_run_test_again_is_shown(tmp_path: Path, more: dict[str, Any], command: str) -> None:
    (test,) = page_of(tmp_path, entry() | more).tests
    assert test.again == command


def test_result_of_oracle_blames_sender_and_is_no_test(tmp_path: Path) -> None:
    (test,) = page_of(tmp_path, entry(state="failed") | {"id": "oracle::DT-01[x~y-b]"}).tests
    assert (test.sentence, test.names, test.again) == ("DT-01", ["y"], "")
    (cause,) = page_of(tmp_path, entry(state="failed", message="y sent it") | {"id": "oracle::DT-01[x~y-b]"}).causes
    assert cause.blame == "y"


CHECKOUT: Final = {"root": "/my lab", "config_file": "/my lab/pyproject.toml", "results": "/my lab/report/results.json"}


@pytest.mark.parametrize(
    ("run", "more", "options"),
    [
        ({"programs": {"x": "/x", "z": "/z"}}, {}, "--impl x=/x --pair 'x~y' --seed 7"),
        ({"programs": {"x": "/x"}}, {"b": None}, "--impl x=/x --seed 7"),
        ({"manifests": {"y": "/y.toml", "z": "/z.toml"}}, {}, "--impl-manifest /y.toml --pair 'x~y' --seed 7"),
        (
            {"manifests": {"y": "/y.toml"}, "programs": {"y": "/y"}},
            {"a": None, "b": {"impl": "y+fast", "version": "1"}},
            "--impl-manifest /y.toml --impl y=/y --pair y+fast --seed 7",
        ),
        (
            {"programs": {"x": "/x"}},
            {"a": {"impl": "x", "version": "1", "like": "refwg"}},
            "--impl x=/x --like x=refwg --pair 'x~y' --seed 7",
        ),
        ({"kernels": {"6.1": "/src/linux"}}, {"lane": "vm"}, "--lane vm --kernel /src/linux --pair 'x~y' --seed 7"),
        ({"kernels": {"6.12": "6.12"}}, {"lane": "vm"}, "--lane vm --pair 'x~y' --seed 7"),
        ({"timeout_scale": 2.5, "keep": "all"}, {}, "--pair 'x~y' --seed 7 --timeout-scale 2.5 --keep all"),
        ({"nightly": True}, {}, "--pair 'x~y' --seed 7 --nightly"),
        ({"config_file": ""}, {}, "--rootdir=. --pair 'x~y' --seed 7"),
        ({"config_file": "/etc/x.ini"}, {}, "-c /etc/x.ini --rootdir=. --pair 'x~y' --seed 7"),
    ],
)
def test_command_to_run_test_again_names_its_options(
    tmp_path: Path, run: dict[str, Any], more: dict[str, Any], options: str
) -> None:
    path = write(tmp_path, entry() | more)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": CHECKOUT | run}))
    (test,) = gather([read(path)], tmp_path, None).tests
    start, end = "cd '/my lab' && pytest 'test_it.py::test_ping[x~y-v4]' ", " --results report/again/results.json"
    assert test.again == f"{start}{options}{end}"


def test_command_to_run_test_of_installed_suite_again(tmp_path: Path) -> None:
    path = write(tmp_path, entry())
    run = {"root": "/site", "config_file": "/site/selftests/pytest.toml", "results": "/home/me/report/results.json"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": run}))
    (test,) = gather([read(path)], tmp_path, None).tests
    options = "--pair 'x~y' --seed 7 --results /home/me/report/again/results.json"
    assert test.again == f"wg-interop run 'test_it.py::test_ping[x~y-v4]' {options}"


@pytest.mark.parametrize(
    ("results", "again"),
    [
        ("/my lab/report/again/results.json", "report/again/results.json"),
        ("/tmp/mine.json", "/tmp/again/mine.json"),  # noqa: S108 - a name, no file
    ],
)
def test_report_of_test_run_again_goes_beside_its_page(tmp_path: Path, results: str, again: str) -> None:
    path = write(tmp_path, entry())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": CHECKOUT | {"results": results}}))
    (test,) = gather([read(path)], tmp_path, None).tests
    assert test.again.endswith(f" --results {again}")


# Several files


def test_several_result_files_are_merged_into_one_page(tmp_path: Path) -> None:
    first = write(tmp_path / "1", entry(), entry(lane="vm", state="failed"), seed=1)
    second = write(tmp_path / "2", entry(lane="vm"), seed=2)
    page = gather([read(first), read(second)], tmp_path, None)
    assert sorted((test.result.lane, test.state) for test in page.tests) == [("netns", "passed"), ("vm", "passed")]
    assert [run.seed for run in page.runs] == [1, 2]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "seed": 1, "host": {}, "results": [{"id": 5}]}', "\udcff"],
)
def test_file_without_results_is_named_in_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"results\.json: "):
        render([path], tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        render([tmp_path / "absent.json"], tmp_path)


def test_invisible_characters_of_result_are_made_visible(tmp_path: Path) -> None:
    bell, seen = "x\a", "x<07>"
    texts = dict.fromkeys(("id", "lane", "kernel", "state", "message", "artifacts"), bell)
    side = {"impl": bell, "version": bell}
    (result,) = read(write(tmp_path, entry(**texts, b="") | {"a": side, "b": side})).results
    assert {name: getattr(result, name) for name in texts} == dict.fromkeys(texts, seen)
    assert result.a == result.b == {"impl": seen, "version": seen}


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


# Coverage, expectations, skips


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with two scenarios, two requirements and a bug."""
    root = tmp_path / "checkout"
    for name in ("conformance", "expectations"):
        (root / "selftests" / name).mkdir(parents=True)
    conformance = root / "selftests" / "conformance"
    (conformance / "netns-scenarios.toml").write_text('[[scenario]]\nid="N01"\ntitle="one"\n[[scenario]]\nid="N02"\n')
    (conformance / "requirements.toml").write_text(
        '[[requirement]]\nid="HS-01"\nlevel="must"\n[[requirement]]\nid="HS-02"\nlevel="should"\n'
    )
    (conformance / "real-bugs.toml").write_text(
        '[[bug]]\nid="IB-05"\ntopic="handshake/spoofed-response"\nsymptom="One wins."\nviolated="None does."\n'
        'implementation="mine 1.0"\nreference="issue 7"\n'
    )
    return root


def blamed(verdict: str, *programs: str, **more: Any) -> dict[str, Any]:
    """The blame of a result, as results.json has it."""
    rerun = {"pair": "x~refwg", "state": "failed", "seconds": 1.0, "message": "no handshake", "artifacts": ""}
    text = {"text": "the reason", "wire": "message 2: in refwg~refwg B sends a response"}
    return {"blame": {"verdict": verdict, "programs": programs, "first": "failed", **text, "reruns": [rerun]} | more}


@pytest.mark.parametrize(
    ("blame", "bad", "shared"),
    [
        ({}, [], ["x", "y"]),
        (blamed("undecided"), [], ["x", "y"]),
        (blamed("flaky"), [], ["x", "y"]),
        (blamed("only_together", "x", "y"), [], ["x", "y"]),
        (blamed("a_deviates", "x"), ["x"], []),
        (blamed("b_does_not_tolerate", "y"), ["y"], []),
        (blamed("test_or_machine"), [""], []),
    ],
)
def test_failure_counts_against_program_to_blame(
    tmp_path: Path, checkout: Path, blame: dict[str, Any], bad: list[str], shared: list[str]
) -> None:
    path = write(tmp_path, entry(state="failed", scenarios=["N01"], **blame), entry(state="failed", a="w", b=""))
    coverage = gather([read(path)], tmp_path, checkout).coverage
    shares = {name: parts["scenarios"] for name, parts in coverage.shares.items()}
    assert [name for name, share in shares.items() if share.bad] == bad
    assert [name for name, share in shares.items() if share.shared] == shared
    row = next(row for row in coverage.scenarios if row.id == "N01")
    tones = {name: mark[0] for name, mark in zip(coverage.names, row.marks, strict=True) if mark[0] != "none"}
    assert tones == dict.fromkeys(bad, "bad") | dict.fromkeys(shared, "shared")


def test_own_failure_outweighs_shared_one(tmp_path: Path, checkout: Path) -> None:
    entries = (
        entry("test_it.py::test_ping", state="failed", scenarios=["N01"]),
        entry("test_it.py::test_pong", state="failed", scenarios=["N01"], **blamed("a_deviates", "x")),
    )
    coverage = gather([read(write(tmp_path, *entries))], tmp_path, checkout).coverage
    share = coverage.shares["x"]["scenarios"]
    assert (share.bad, share.shared, share.percents) == (1, 0, (0.0, 50.0, 0.0))
    assert coverage.shares["y"]["scenarios"].percents == (0.0, 0.0, 50.0)


def test_page_names_program_to_blame_and_links_reruns(tmp_path: Path) -> None:
    (tmp_path / "evidence" / "again").mkdir(parents=True)
    rerun = {"pair": f"x~{EVIL}", "state": "failed", "message": EVIL, "artifacts": "evidence/again"}
    blame = blamed("a_deviates", "x", text=EVIL, wire=EVIL, reruns=[rerun, rerun | {"artifacts": "../.."}])
    path = write(tmp_path, entry(state="failed", message="no answer", artifacts="evidence/one", **blame))
    page = gather([read(path)], tmp_path, None)
    assert [(cause.blame, cause.proof) for cause in page.causes] == [("x", page.tests[0])]
    assert [href for _, href in page.tests[0].reruns] == ["evidence/again", ""]
    drawn = tags(render([path], tmp_path))
    assert "evidence/again/" in drawn.links
    assert "On the wire: " + EVIL in drawn.text
    assert (drawn.tags.count("script"), drawn.events) == (1, [])


def test_scenario_is_covered_for_both_sides_of_test_that_ran(tmp_path: Path, checkout: Path) -> None:
    path = write(
        tmp_path,
        entry(scenarios=["N01"], requirements=["HS-01", "XX-99"]),
        entry(b="z", state="failed", scenarios=["N01", "N02"], bugs=["IB-05"]),
        entry(a="w", b="", state="skipped", scenarios=["N02"]),
    )
    coverage = gather([read(path)], tmp_path, checkout).coverage
    shares = {
        name: [(share.covered, share.of, share.shared) for share in shares.values()]
        for name, shares in coverage.shares.items()
    }
    assert shares == {
        "w": [(0, 2, 0), (0, 1, 0), (0, 1, 0), (0, 1, 0)],
        "x": [(2, 2, 2), (1, 1, 0), (0, 1, 0), (1, 1, 1)],
        "y": [(1, 2, 0), (1, 1, 0), (0, 1, 0), (0, 1, 0)],
        "z": [(2, 2, 2), (0, 1, 0), (0, 1, 0), (1, 1, 1)],
    }
    assert not any(share.bad for shares in coverage.shares.values() for share in shares.values())
    assert coverage.unknown == ["XX-99"]


def test_scenarios_are_rows_and_pairs_are_columns(tmp_path: Path, checkout: Path) -> None:
    path = write(
        tmp_path,
        entry(scenarios=["N01"]),
        entry("test_it.py::test_mtu", scenarios=["N01"], state="differs", message="1360 bytes, not 1359"),
        entry(a="kernel", b="x", scenarios=["N02"], state="blocked"),
        entry(b="", scenarios=["N03"]),
        entry(a="", b="", scenarios=["N01"]),
        entry(a="z", b="z"),
    )
    (group,) = gather([read(path)], tmp_path, checkout).groups
    assert group.sides == [("kernel", "x"), ("x", "y"), ("x", ""), ("", "")]
    assert group.spans == [("kernel", 1), ("x", 1), ("", 2)]
    shown = {row.id: [worst.state if worst else "" for _, _, worst in row.marks] for row in group.scenarios}
    assert shown == {
        "N01": ["", "differs", "", "passed"], "N02": ["blocked", "", "", ""], "N03": ["", "", "passed", ""],
    }  # fmt: skip
    page = render([path], tmp_path, root=checkout).read_text()
    assert 'title="1 differs, 1 passed: 1360 bytes, not 1359"' in page


def test_run_without_scenarios_has_no_scenario_table(tmp_path: Path, checkout: Path) -> None:
    path = write(tmp_path, entry(a="", b="", lane="core"))
    assert [group.scenarios for group in gather([read(path)], tmp_path, checkout).groups] == [[]]


def test_coverage_of_test_without_implementation_has_no_name(tmp_path: Path, checkout: Path) -> None:
    path = write(tmp_path, entry(a="", b="", requirements=["HS-02"]))
    coverage = gather([read(path)], tmp_path, checkout).coverage
    assert coverage.names == [""]
    assert coverage.shares[""]["should"].covered == 1


def expect(checkout: Path, *expectations: dict[str, Any]) -> None:
    """Write the expectations of the program y."""
    rest = {"versions": "1", "requirement": "HS-01", "observed": "no answer", "link": "https://example.org/1"}
    text = "".join(
        "[[expect]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in (rest | each).items())
        for each in expectations
    )
    (checkout / "selftests" / "expectations" / "y.toml").write_text(text)


def test_xfail_is_shown_with_its_expectation(tmp_path: Path, checkout: Path) -> None:
    expect(checkout, {"test": "test_it.py::test_ping", "message": "lost", "side": "b"})
    path = write(
        tmp_path,
        entry(state="xfailed", message="1 of 2 was lost"),
        entry(a="y", b="x", state="xfailed", message="another"),
    )
    known = gather([read(path)], tmp_path, checkout).known
    assert [(same[0].link, len(same)) for same in known] == [("https://example.org/1", 1), ("", 1)]


@pytest.mark.parametrize(
    ("state", "message", "observed"),
    [
        ("xfailed", "it panicked", "panic"),
        ("xfailed", "1 of 2 was lost", "loss"),
        ("xfailed", "another failure", None),
        ("xpassed", "it passes", "loss"),
    ],
)
def test_expectation_that_decided_result_is_shown(
    tmp_path: Path, checkout: Path, state: str, message: str, observed: str | None
) -> None:
    anywhere = {"test": "test_*", "message": "panicked", "observed": "panic", "always": False}
    expect(checkout, anywhere, {"test": "test_it.py::test_ping", "message": "lost", "observed": "loss"})
    (shown,) = gather([read(write(tmp_path, entry(state=state, message=message)))], tmp_path, checkout).tests
    assert (shown.expectation.observed if shown.expectation else None) == observed


def test_reasons_of_skips_are_grouped_with_their_remedy(tmp_path: Path) -> None:
    missing = "y is not installed; to install it: wg-interop install y"
    declared = "y does not declare the capability roaming"
    page = page_of(
        tmp_path,
        entry(state="unsupported", message=declared),
        entry("test_it.py::test_other", state="skipped", message=missing),
        entry(a="z", state="skipped", message=missing),
    )
    assert [(skip.count, skip.reason, skip.remedy, skip.names) for skip in page.skips] == [
        (2, "y is not installed", "wg-interop install y", ["x", "y", "z"]),
        (1, "y does not declare the capability roaming", "", ["x", "y"]),
    ]


def test_missing_catalogue_lists_nothing(checkout: Path) -> None:
    assert [*read_conformance(checkout).scenarios] == ["N01", "N02"]
    (checkout / "selftests" / "conformance" / "requirements.toml").unlink()
    assert read_conformance(checkout).requirements == {}
    assert read_conformance(None).scenarios == {}


def test_catalogue_entry_without_id_is_named_in_error(tmp_path: Path) -> None:
    (tmp_path / "selftests" / "conformance").mkdir(parents=True)
    (tmp_path / "selftests" / "conformance" / "netns-scenarios.toml").write_text("[[scenario]]\ntitle = 't'\n")
    with pytest.raises(UsageError, match=r"conformance/netns-scenarios\.toml: scenario 1: id is missing$"):
        read_conformance(tmp_path)


def test_scenario_states_its_steps_and_what_is_expected(checkout: Path) -> None:
    (checkout / "selftests" / "conformance" / "netns-scenarios.toml").write_text(
        '[[scenario]]\nid="N13"\ntitle="roaming"\ntopology="nat"\nsteps="A moves\\nand pings"\nexpect="B follows"\n'
    )
    entry = read_conformance(checkout).entry("N13")
    assert (str(entry), entry.statement) == ("N13 (roaming)", "A moves and pings. Expected: B follows")
    assert entry.source.endswith("netns.sh, topology nat")
    assert str(read_conformance(None).entry("N99")) == "N99"


def test_statement_and_source_stand_beside_each_verdict(tmp_path: Path, checkout: Path) -> None:
    (checkout / "selftests" / "conformance" / "requirements.toml").write_text(
        '[[requirement]]\nid="HS-07"\ntitle="replay"\nlevel="must"\nstatement="It is dropped."\nsource="paper 5.1"\n'
    )
    text = tags(render([write(tmp_path, entry(requirements=["HS-07"]))], tmp_path, root=checkout)).text
    assert "It is dropped." in text
    assert "Source: paper 5.1" in text


def test_bug_is_shown_with_its_symptom_and_programs(tmp_path: Path, checkout: Path) -> None:
    text = tags(render([write(tmp_path, entry(state="failed", bugs=["IB-05"]))], tmp_path, root=checkout)).text
    assert "One wins. Violated: None does." in text
    assert "Source: mine 1.0, issue 7" in text
    assert "Defects of real programs, one by one" in text
    assert str(read_conformance(checkout).entry("IB-05")) == "IB-05 (handshake/spoofed-response)"


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        ("bug", "IB-05", ""),
        ("bug", "IB-5", "bug IB-5 is not in selftests/conformance/real-bugs.toml; did you mean IB-05?"),
        ("scenario", "HS-01", "HS-01 is not a scenario; use @pytest.mark.requirement('HS-01')"),
    ],
)
def test_unknown_id_is_explained(checkout: Path, kind: str, name: str, why: str) -> None:
    assert read_conformance(checkout).why_unknown(kind, name) == why


def test_unknown_id_has_no_neighbour_in_empty_catalogue() -> None:
    why = read_conformance(None).why_unknown("bug", "IB-05")
    assert why == "bug IB-05 is not in selftests/conformance/real-bugs.toml"


@pytest.mark.parametrize(("value", "text"), [(0.004, "0.00 s"), (1.25, "1.2 s"), (59.9, "59.9 s"), (61, "1 min 1 s")])
def test_duration_is_printed_in_short_form(value: float, text: str) -> None:
    assert seconds(value) == text
