"""Check what the page shows of coverage, blame, expectations, skips and catalogues."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import UsageError
from harness.report.conformance import read_conformance
from harness.report.gather import gather, render
from harness.report.gather import read_run as read
from selftests.support.report_page import EVIL, entry, page_of, tags, write

if TYPE_CHECKING:
    from pathlib import Path


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
