"""Check the plugin: silent where it is not used, one line and status 4 for wrong usage."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
from typing import TYPE_CHECKING, Final

import pytest
from _pytest.outcomes import Failed

from harness import poll_until, suite
from harness.install.packages import install_command
from harness.lanes import EVENTS, LANE
from harness.plugin.alone import held
from harness.plugin.selection import runs_here
from harness.plugin.session import state_of_run
from harness.plugin.verdicts import Differs, differs
from harness.sandbox.launcher import INSIDE, REFUSED
from harness.wait import scaled

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

OK, FAILED, USAGE = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.USAGE_ERROR
GO: Final = "wireguard-go"
DEBIAN: Final = "wireguard-go-debian"

LAB: Final = """
import pytest

def test_core(): pass

@pytest.mark.parametrize("family", ["v4", "v6"])
def test_pair(lab, pair, family): pass
"""
IMPLEMENTATION: Final = "def test(implementation): pass"
# Another project, which defines fixtures with the names of the plugin's fixtures.
FOREIGN: Final = """
import pytest

@pytest.fixture
def lab(): return "laboratory"

@pytest.fixture
def pair(): return (1, 2)

@pytest.mark.parametrize("implementation", ["fast", "slow"])
def test(lab, pair, implementation): assert (lab, pair) == ("laboratory", (1, 2))
"""
LISTENING: Final = """
import os, sys

def pytest_sessionfinish():
    heavy = {"pyroute2", "cryptography", "harness.lab", "harness.report", "harness.implementations"}
    print(f"sandbox: {os.environ.get('WG_INTEROP_SANDBOX')}; imported: {sorted(heavy & sys.modules.keys())}")
"""


# Every test uses it: an inner pytest gets no settings of the run around it.
@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (INSIDE, REFUSED):
        monkeypatch.delenv(name, raising=False)
    # Loading no other plugin saves a second per run; `test_unused_plugin_prints_and_imports_nothing` loads all.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse the sandbox, so that the inner pytest does not enter one."""
    monkeypatch.setenv(REFUSED, "unit tests need no sandbox")


@pytest.mark.parametrize("module", ["def test(): pass", FOREIGN], ids=["plain", "own fixtures of our names"])
def test_unused_plugin_prints_and_imports_nothing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for name in ("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTEST_PLUGINS"):
        monkeypatch.delenv(name)
    pytester.makepyfile(module)
    pytester.makeconftest(LISTENING)
    run = pytester.runpytest_subprocess("-s")
    assert run.ret == OK
    run.stdout.fnmatch_lines("*sandbox: None; imported: []")
    run.stdout.no_fnmatch_line("*wg-interop: *")
    run.stdout.no_fnmatch_line("results: *")
    assert not (pytester.path / "report").exists()


def test_run_that_uses_lab_asks_for_sandbox(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test(lab): pass")
    run = pytester.runpytest_subprocess("-rs")
    run.stdout.fnmatch_lines("wg-interop: *sandbox*, seed *")
    run.stdout.no_fnmatch_line("*start pytest with this plugin*")


@pytest.mark.usefixtures("refused")
def test_foreign_fixtures_of_same_name_are_not_implementations(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=FOREIGN)
    assert pytester.runpytest_inprocess("--results", "results.json").ret == OK
    results = json.loads((pytester.path / "results.json").read_text())["results"]
    assert [(entry["id"], entry["a"], entry["lane"]) for entry in results] == [
        (f"test_it.py::test[{name}]", None, "core") for name in ("fast", "slow")
    ]


@pytest.mark.parametrize("options", [[], ["--impl", GO], ["--lane", "netns"]])
def test_collect_only_run_enters_no_sandbox(pytester: pytest.Pytester, options: list[str]) -> None:
    pytester.makepyfile(LAB)
    pytester.makeconftest(LISTENING)
    run = pytester.runpytest_subprocess("-s", "--collect-only", *options)
    assert run.ret == OK
    run.stdout.fnmatch_lines("*sandbox: None; *")
    assert not (pytester.path / "report").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--impl", "nope"], "unknown implementation 'nope'; there are: boringtun, *; yours: --impl nope=/path"),
        (["--impl", "mine=/nowhere"], "--impl mine=/nowhere: no program /nowhere"),
        (["--impl-manifest", "/nowhere"], "manifest /nowhere: No such file or directory"),
        (["--pair", "nope~kernel"], "unknown implementation 'nope'; there are: boringtun, *"),
        (["--pair", GO], f"--pair {GO}: want A~B, two implementations with a tilde between"),
        (["--pair", f"{GO}~{DEBIAN}~kernel"], "--pair *: want A~B, two implementations with a tilde between"),
        (["--lane", "fast"], "argument --lane: invalid choice: 'fast' (choose from *"),
        (["--results", "."], "--results /*: is a directory; name a file: --results /*/results.json"),
        (["--results", "/proc/stat/x/y"], "results /proc/stat/x/y: cannot write to /proc/stat; choose a place: *"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--timeout-scale", "slow"], "argument --timeout-scale: invalid float value: 'slow'"),
    ],
)
def test_wrong_usage_exits_with_status_4_and_complaint(
    pytester: pytest.Pytester, options: list[str], complaint: str
) -> None:
    pytester.makepyfile(LAB)
    run = pytester.runpytest_inprocess(*options)
    assert run.ret == USAGE
    run.stderr.fnmatch_lines(f"*{'' if complaint.startswith('argument') else 'ERROR'}: {complaint}")
    assert "Traceback" not in run.stderr.str()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--pause-on-error -n 2", "--pause-on-error stops one test at a time, not several: leave out -n 2"),
        ("--shell ns1 -n auto", "--shell stops one test at a time, not several: leave out -n *"),
        ("--gdb ns1 -n 0", "--gdb needs a terminal, and standard input is not one: run it in one"),
        ("--pause-on-error", "--pause-on-error needs a terminal, and standard input is not one: run it in one"),
        ("--strace ns1 --lane vm", "--strace is for tests on this kernel, not in a guest: leave out --lane vm"),
        ("--shell /run/netns/ns1", "--shell /run/netns/ns1: want the name of a node, such as ns1, or A or B"),
        ("--gdb A --strace ns1", "--gdb A --strace ns1: a program has one tracer; leave one out"),
        ("--strace B", "--strace: strace is not installed; to install it: {}"),
        ("--gdb B", "--gdb: gdb is not installed; to install it: {}"),
        ("--valgrind A --strace ns1", "--strace ns1 --valgrind A: a program has one tracer; leave one out"),
        ("--valgrind B", "--valgrind: valgrind is not installed; to install it: {}"),
        ("--valgrind A --lane vm", "--valgrind is for tests on this kernel, not in a guest: leave out --lane vm"),
    ],
)
def test_option_to_look_at_tests_is_refused_with_remedy(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: str, complaint: str
) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin")
    # A PATH with gdb, or with nothing where it must be missing.
    programs = tmp_path / "programs"
    programs.mkdir()
    if "gdb is not" not in complaint:
        programs.joinpath("gdb").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(programs))
    pytester.makepyfile(LAB)
    run = pytester.runpytest_subprocess(*options.split())
    assert run.ret == USAGE
    remedy = install_command([options.split(maxsplit=1)[0].removeprefix("--")])
    run.stderr.fnmatch_lines(f"ERROR: {complaint.format(remedy)}")


CATALOGUE: Final = """
[[requirement]]
id = "HS-07"
title = "replayed initiation is dropped"
[[requirement]]
id = "HS-08"
[[requirement]]
id = "R-0"
[[requirement]]
id = "R-1"
"""
BUGS: Final = """
[[bug]]
id = "IB-05"
topic = "handshake/spoofed-response"
"""


def add_catalogue(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a suite with a catalogue of requirements and of bugs; return its folder."""
    monkeypatch.setenv(suite.SUITE, str(pytester.path))
    pytester.mkdir("selftests").joinpath("conformance").mkdir()
    folder = pytester.path / "selftests" / "conformance"
    (folder / "requirements.toml").write_text(CATALOGUE)
    (folder / "real-bugs.toml").write_text(BUGS)
    return folder


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("names", ["'HS-07', 'HS-08', 'R-0'", "'HS-07', 'HS-08', 'R-0', 'R-1'"])
def test_more_than_three_requirements_are_refused(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    add_catalogue(pytester, monkeypatch)
    pytester.makepyfile(f"import pytest\n@pytest.mark.requirement({names})\ndef test_it(): pass")
    run = pytester.runpytest_inprocess("--strict-markers")
    assert run.ret == (OK if names.count(",") == 2 else USAGE)
    if run.ret == USAGE:
        run.stderr.fnmatch_lines(
            "ERROR: *.py::test_it: a test cites at most 3 requirements, not HS-07, HS-08, R-0, R-1"
        )


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("mark", "why"),
    [
        (
            "requirement('HS-77')",
            "requirement HS-77 is not in selftests/conformance/requirements.toml; did you mean HS-07?",
        ),
        ("bug('IB-50')", "bug IB-50 is not in selftests/conformance/real-bugs.toml; did you mean IB-05?"),
        ("requirement('IB-05')", "IB-05 is not a requirement; use @pytest.mark.bug('IB-05')"),
        ("scenario('HS-07')", None),
        ("bug('IB-05')", None),
    ],
)
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_unknown_id_is_refused_with_nearest_known_one(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, mark: str, why: str | None, workers: list[str]
) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin")
    add_catalogue(pytester, monkeypatch)
    pytester.makepyfile(
        f"import pytest\n@pytest.mark.{mark}\n@pytest.mark.parametrize('n', range(2))\ndef test_it(n): pass"
    )
    run = pytester.runpytest_subprocess(*workers)
    # There is no catalogue of scenarios here, so that a test may cite any.
    assert run.ret == (OK if why is None else USAGE)
    found = [line.partition("::")[2] for line in run.stderr.lines if line.startswith("ERROR: ")]
    assert found == ([] if why is None else [f"test_it: {why}"])


@pytest.mark.usefixtures("refused")
def test_project_without_catalogue_may_cite_any_id(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest
        @pytest.mark.requirement("A", "B", "C")
        @pytest.mark.bug("OURS-1")
        def test_it(): pass
    """)
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


@pytest.mark.usefixtures("refused")
def test_test_outside_root_of_catalogue_may_cite_any_id(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_catalogue(pytester, monkeypatch)
    tests = pytester.mkdir("elsewhere")
    tests.joinpath("test_it.py").write_text("import pytest\n@pytest.mark.bug('OURS-1')\ndef test_it(): pass\n")
    moved = tests.rename(tmp_path / "elsewhere")
    pytester.runpytest_inprocess(f"--rootdir={pytester.path}", str(moved)).assert_outcomes(passed=1)


@pytest.mark.usefixtures("refused")
def test_mistake_in_catalogue_is_named_at_collection(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    (add_catalogue(pytester, monkeypatch) / "real-bugs.toml").write_text("[[bug]]\nid = 5\n")
    pytester.makepyfile("import pytest\n@pytest.mark.bug('IB-05')\ndef test_it(): pass")
    run = pytester.runpytest_inprocess()
    assert run.ret == USAGE
    run.stderr.fnmatch_lines("ERROR: *real-bugs.toml: bug 1: id must be a string, not 5")


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        (["--impl", GO], [f"{GO}~{GO}"]),
        (["--impl", GO, "--impl", DEBIAN], [f"{GO}~{GO}", f"{GO}~{DEBIAN}", f"{DEBIAN}~{GO}", f"{DEBIAN}~{DEBIAN}"]),
        (["--impl", GO, "--impl", DEBIAN, "--pair", f"{DEBIAN}~{GO}"], [f"{DEBIAN}~{GO}"]),
        (["--pair", f"{GO}~{DEBIAN}", "--pair", "kernel~kernel"], [f"{GO}~{DEBIAN}", "kernel~kernel"]),
    ],
)
def test_pair_comes_first_in_test_id(pytester: pytest.Pytester, options: list[str], pairs: list[str]) -> None:
    pytester.makepyfile(test_it=LAB)
    items, _ = pytester.inline_genitems("-q", *options)
    ids = [item.name for item in items if item.name != "test_core"]
    assert sorted(ids) == sorted(f"test_pair[{pair}-{family}]" for pair in pairs for family in ("v4", "v6"))


def test_every_implementation_meets_every_other_by_default(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=LAB)
    items, _ = pytester.inline_genitems("-q")
    names = {item.name for item in items}
    assert {f"test_pair[{a}~{b}-v4]" for a in (GO, DEBIAN, "kernel") for b in (GO, DEBIAN, "kernel")} <= names


@pytest.mark.parametrize(("options", "ids"), [(["--impl", GO], [GO]), (["--impl", DEBIAN, "--impl", GO], [DEBIAN, GO])])
def test_single_implementation_is_parameter_in_test_id(
    pytester: pytest.Pytester, options: list[str], ids: list[str]
) -> None:
    pytester.makepyfile(test_it=IMPLEMENTATION)
    items, _ = pytester.inline_genitems("-q", *options)
    assert [item.name for item in items] == [f"test[{name}]" for name in ids]


@pytest.mark.parametrize(
    ("lanes", "names"),
    [
        (["core"], ["test_core"]),
        (["netns"], [f"test_pair[{GO}~{GO}-v4]", f"test_pair[{GO}~{GO}-v6]"]),
        (["core", "netns"], ["test_core", f"test_pair[{GO}~{GO}-v4]", f"test_pair[{GO}~{GO}-v6]"]),
        (["core", "vm"], ["test_core", f"test_pair[{GO}~{GO}-v4]", f"test_pair[{GO}~{GO}-v6]"]),
        (["core", "warp"], ["test_core"]),
    ],
)
def test_lane_option_selects_tests_by_use_of_lab(pytester: pytest.Pytester, lanes: list[str], names: list[str]) -> None:
    pytester.makepyfile(test_it=LAB)
    run = pytester.runpytest_inprocess("--collect-only", "-q", "--impl", GO, *(f"--lane={lane}" for lane in lanes))
    assert [line for line in run.outlines if "::" in line] == [f"test_it.py::{name}" for name in names]


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("module", "options", "complaint"),
    [
        (LAB, ["--impl", GO, "-k", "pair"], "no test passed"),
        (LAB, ["--lane", "netns", "--impl", GO], "no test passed"),
        (LAB, ["--impl", GO], f"{GO} was asked for and all its tests were skipped"),
        (LAB, ["--lane", "netns", "--lane", "core", "--impl", GO], "lane netns was asked for and did not run"),
        (IMPLEMENTATION, ["--impl", GO], "no test passed"),
    ],
)
def test_run_fails_when_requested_tests_did_not_run(
    pytester: pytest.Pytester, module: str, options: list[str], complaint: str
) -> None:
    pytester.makepyfile(test_it=module)
    run = pytester.runpytest_inprocess(*options)
    assert run.ret == FAILED
    run.stdout.fnmatch_lines([f"wg-interop: {complaint}", "results: */report/results.json"])


@pytest.mark.usefixtures("refused")
def test_lane_core_alone_passes_and_writes_results(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=LAB)
    run = pytester.runpytest_inprocess("--lane", "core", "--results", "here/mine.json", "--seed", "7")
    assert run.ret == OK
    document = json.loads((pytester.path / "here" / "mine.json").read_text())
    assert document["seed"] == 7
    assert [(entry["id"], entry["state"], entry["lane"]) for entry in document["results"]] == [
        ("test_it.py::test_core", "passed", "core")
    ]


@pytest.mark.usefixtures("refused")
def test_run_in_guest_exits_with_0_when_all_tests_are_skipped(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LANE, "vm")
    pytester.makepyfile(test_it=LAB)
    assert pytester.runpytest_inprocess("--lane", "netns", "--impl", GO).ret == OK


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(("lane", "programs"), [("vm", ["kernel"]), ("warp", ["kernel", "refwg"])])
def test_only_guest_of_lane_vm_leaves_out_programs_beside_kernel(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, lane: str, programs: list[str]
) -> None:
    monkeypatch.setenv(LANE, lane)
    pytester.makepyfile(test_it="def test_it(lab, implementation): pass")
    run = pytester.runpytest_inprocess("--lane", "netns", "--impl", "kernel", "--impl", "refwg", "--collect-only", "-q")
    assert [line for line in run.outlines if "::" in line] == [f"test_it.py::test_it[{name}]" for name in programs]


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_seed_zero_is_used_as_given(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin")
    pytester.makepyfile(
        "from harness.plugin.session import state_of_run\n"
        "def test_it(request): assert state_of_run(request.config).seed == 0"
    )
    assert pytester.runpytest_subprocess("--seed", "0", *workers).ret == OK


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("earlier", [True, False])
def test_evidence_is_cleared_only_when_earlier_results_exist(pytester: pytest.Pytester, *, earlier: bool) -> None:
    pytester.makepyfile("def test_core(): pass\ndef test_lab(lab): pass")
    note = pytester.mkdir("evidence") / "note"
    note.touch()
    if earlier:
        # The first versions wrote it without a list of files.
        (pytester.path / "results.json").write_text('{"schema": 1, "results": []}')
    run = pytester.runpytest_inprocess("--results", "results.json")
    assert (run.ret, note.exists()) == ((OK, False) if earlier else (USAGE, True))
    if earlier:
        assert (pytester.path / "previous" / "evidence" / "note").exists()
    else:
        run.stderr.fnmatch_lines("ERROR: /*/evidence is not part of the report of *; choose another directory: *")


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("name", ["guest", "objects"])
def test_report_about_whole_guest_is_sent_as_event(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytester.makeconftest(
        f"""
        import pytest

        def pytest_runtest_logfinish(nodeid):
            for when in ("call", "teardown"):
                report = pytest.TestReport("vm::{name}[6.12]", ("vm", None, ""), {{}}, "passed", None, when)
                hook.pytest_runtest_logreport(report=report)

        def pytest_configure(config):
            global hook
            hook = config.hook
        """
    )
    pytester.makepyfile(test_it="def test_core(): pass")
    reading, writing = os.pipe()
    monkeypatch.setenv(EVENTS, str(writing))
    assert pytester.runpytest_inprocess("--results", "results.json").ret == OK
    os.close(writing)
    events = [json.loads(line) for line in os.read(reading, 1 << 16).splitlines()]
    os.close(reading)
    assert [event["id"] for event in events if event["event"] == "result"] == [
        "test_it.py::test_core",
        f"vm::{name}[6.12]",
    ]


@pytest.mark.usefixtures("refused")
def test_skip_reason_is_reason_of_missing_sandbox(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it="def test(lab): pass")
    run = pytester.runpytest_inprocess("-rs")
    run.stdout.fnmatch_lines(
        ["wg-interop: no sandbox: unit tests need no sandbox, seed *", "SKIPPED*: unit tests need no sandbox"]
    )


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(("declared", "state"), [('["roaming"]', "passed"), ("[]", "unsupported")])
def test_undeclared_capability_is_unsupported(pytester: pytest.Pytester, declared: str, state: str) -> None:
    program = pytester.makefile("", program="#!/bin/sh\n")
    program.chmod(0o755)
    pytester.makefile(".toml", f'name="mine"\nkind="uapi"\ncapabilities={declared}\n[program]\npath="{program}"')
    pytester.makepyfile(
        test_it=f"import pytest\ndef test_it(): pass\n@pytest.mark.capability('roaming')\n{IMPLEMENTATION}"
    )
    (manifest,) = pytester.path.glob("*.toml")
    pytester.runpytest_inprocess("--impl-manifest", str(manifest), "--results", "results.json")
    states = {
        entry["id"]: entry["state"] for entry in json.loads((pytester.path / "results.json").read_text())["results"]
    }
    assert states["test_it.py::test[mine]"] == state


@pytest.mark.parametrize("by", [["kernel"], ["wireguard-go", "refwg"]])
def test_difference_of_kernel_or_refwg_is_failure(by: list[str]) -> None:
    with pytest.raises(Failed, match=f"^{by[-1]}: 1360 bytes, not 1359"):
        differs("1360 bytes, not 1359", by=by)
    with pytest.raises(Differs, match=r"^1360 bytes, not 1359"):
        differs("1360 bytes, not 1359", by=["wireguard-go"])


LEVELS: Final = """
[[requirement]]
id = "ROB-04"
title = "loop"
level = "must"
[[requirement]]
id = "MTU-04"
level = "should"
[[requirement]]
id = "MTU-03"
level = "should"
"""
N12: Final = '[[scenario]]\nid = "N12"\nexpect = "1359, or 1360: differs"\n[[scenario]]\nid = "N01"\n'
NO_NAME: Final = (
    'ROB-04 (loop) allows no difference; name the should or the scenario that does: differs(..., requirement="ID") or '
    'scenario="ID"'
)


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("", NO_NAME),
        ("requirement='MTU-04'", None),
        ("scenario='N12'", None),
        ("requirement='ROB-04'", "ROB-04 (loop) is not a should"),
        ("requirement='MTU-03'", "the test does not cite requirement MTU-03"),
        ("scenario='N01'", "the text of scenario N01 has no word `differs`"),
    ],
)
@pytest.mark.parametrize("place", ["body", "parameter"])
def test_difference_needs_should_or_scenario_that_allows_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, named: str, why: str | None, place: str
) -> None:
    folder = add_catalogue(pytester, monkeypatch)
    (folder / "requirements.toml").write_text(LEVELS)
    (folder / "netns-scenarios.toml").write_text(N12)
    marks = ["requirement('ROB-04', 'MTU-04')", "scenario('N12', 'N01')"]
    texts = ", ".join(f"pytest.mark.{mark}" for mark in marks)
    above = "".join(f"@pytest.mark.{mark}\n" for mark in marks) if place == "body" else ""
    inside = "" if place == "body" else f", marks=[{texts}]"
    pytester.makepyfile(
        "import pytest\nfrom harness import differs\n"
        f"{above}@pytest.mark.parametrize('n', [pytest.param(1{inside})])\n"
        f"def test_it(n): differs('1360 bytes, not 1359', {named})\n"
    )
    pytester.runpytest_inprocess("--lane", "core", "--results", "results.json")
    (result,) = json.loads((pytester.path / "results.json").read_text())["results"]
    name = named.partition("=")[2].strip("'")
    message = f"1360 bytes, not 1359 (allowed by {name})" if name else "1360 bytes, not 1359"
    if why is None:
        assert (result["state"], result["message"]) == ("differs", message)
    else:
        assert (result["state"], result["message"].partition("\n")[0]) == ("failed", f"{message}; {why}")


@pytest.mark.usefixtures("refused")
def test_difference_in_test_of_shoulds_needs_no_name(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    (add_catalogue(pytester, monkeypatch) / "requirements.toml").write_text(LEVELS)
    pytester.makepyfile("""
        import pytest
        from harness import differs
        @pytest.mark.requirement("MTU-03", "MTU-04")
        def test_it(): differs("1360 bytes, not 1359")
    """)
    pytester.runpytest_inprocess("--lane", "core", "--results", "results.json")
    (result,) = json.loads((pytester.path / "results.json").read_text())["results"]
    assert result["state"] == "differs"


@pytest.mark.usefixtures("refused")
def test_state_not_reached_fails_run_and_may_be_expected(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (
        'test="*test_expected*"\nversions="*"\nrequirement="DOS-04"\nobserved="no cookie"\nmessage="no load"\nlink="x"'
    )
    pytester.mkdir("selftests").joinpath("expectations").mkdir()
    monkeypatch.setenv(suite.SUITE, str(pytester.path))
    (pytester.path / "selftests/expectations/mine.toml").write_text(f"[[expect]]\n{expected}\n")
    program = pytester.makefile("", program="#!/bin/sh\necho v1.5\n")
    program.chmod(0o755)
    pytester.makepyfile("""
        from harness import not_reached
        def test_it(implementation): not_reached("no load in 9 s")
        def test_expected(implementation): not_reached("no load in 9 s")
        def test_pass(): pass
    """)
    run = pytester.runpytest_inprocess(f"--impl=mine={program}", "--results", "results.json")
    assert run.ret == FAILED
    results = json.loads((pytester.path / "results.json").read_text())["results"]
    assert [result["state"] for result in results] == ["not_reached", "xfailed", "passed"]


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_difference_is_printed_and_does_not_fail_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin")
    pytester.makepyfile(
        f"from harness.plugin.verdicts import differs\n{LAB}\ndef test_it(): differs('1360 bytes, not 1359')"
    )
    run = pytester.runpytest_subprocess("--lane", "core", "--results", "results.json", *workers)
    assert run.ret == OK
    assert {"passed": 1, "differs": 1}.items() <= run.parseoutcomes().items()
    run.stdout.fnmatch_lines("DIFFERS *.py::test_it - 1360 bytes, not 1359")
    results = json.loads((pytester.path / "results.json").read_text())["results"]
    assert {entry["state"]: entry["message"] for entry in results} == {"passed": "", "differs": "1360 bytes, not 1359"}


def collected(pytester: pytest.Pytester, *options: str) -> list[pytest.Item]:
    """The tests that a run with these options selects, in order."""
    session = pytester.inline_run("--collect-only", *options).getcall("pytest_collection_finish").session
    items: list[pytest.Item] = session.items
    return items


SUITES_HERE: Final = """
def test_unit(): pass
def test_pair(lab, pair): pass
def test_one(lab, implementation): pass
"""


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ("--suite=pairs", {"test_it.py::test_pair"}),
        ("--suite=alone", {"test_it.py::test_one"}),
        ("--suite=lab", {"lab/test_node.py::test_node"}),
        ("--suite=lab --suite=alone", {"test_it.py::test_one", "lab/test_node.py::test_node"}),
        ("--suite=conformance", {"conformance/test_rule.py::test_pair", "conformance/test_rule.py::test_one"}),
    ],
)
def test_suite_option_selects_tests_by_what_they_are_about(
    pytester: pytest.Pytester, options: str, chosen: set[str]
) -> None:
    pytester.makepyfile(test_it=SUITES_HERE)
    pytester.mkdir("lab").joinpath("test_node.py").write_text("def test_node(lab): pass")
    pytester.mkdir("conformance").joinpath("test_rule.py").write_text(SUITES_HERE)
    items = collected(pytester, "--pair", f"{GO}~{DEBIAN}", *options.split())
    assert {item.nodeid.partition("[")[0] for item in items} == chosen


@pytest.mark.usefixtures("refused")
def test_kernel_pairs_are_left_to_lane_vm_without_wireguard_here(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it="def test_pair(lab, pair): pass\ndef test_one(lab, implementation): pass")
    words = ("--impl=kernel", f"--impl={GO}", "--lane=netns")
    with_guest, without = (pytester.inline_genitems(*words, *more)[0] for more in (["--lane=vm"], []))
    plan = state_of_run(with_guest[0].config).plan
    here = [item.nodeid for item in with_guest if runs_here(item, plan)]
    assert here == [f"test_it.py::test_pair[{GO}~{GO}]", f"test_it.py::test_one[{GO}]"]
    assert all(runs_here(item, state_of_run(item.config).plan) for item in without)


ALONE: Final = """
import fcntl, os, pathlib, pytest

@pytest.mark.alone
@pytest.mark.parametrize("n", range(2))
def test_alone(n):
    assert sorted(pathlib.Path("running").iterdir()) == []

@pytest.mark.parametrize("n", range(20))
def test_beside(n):
    mark = pathlib.Path("running", str(n))
    mark.touch()
    for _ in range(100): os.sched_yield()
    mark.unlink()
"""


def test_marker_alone_keeps_other_workers_waiting(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin")
    monkeypatch.setenv(REFUSED, "unit tests need no sandbox")
    pytester.mkdir("running")
    pytester.makepyfile(ALONE)
    run = pytester.runpytest_subprocess("-n", "2", "--dist", "worksteal", "-v")
    run.assert_outcomes(passed=22)


def test_marker_alone_puts_test_last(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(ALONE)
    items = collected(pytester)
    assert [item.name.partition("[")[0] for item in items] == ["test_beside"] * 20 + ["test_alone"] * 2


def await_locked(lock: Path) -> None:
    """Return when the lock of this file is held."""
    with lock.open() as file:

        def is_taken() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
            return False

        assert poll_until(is_taken, bool, 5), f"{lock} was not locked within 5 s"


def test_exclusive_lock_waits_for_shared_and_precedes_later_ones(tmp_path: Path) -> None:
    order: list[str] = []
    waits = threading.Event()

    def take(name: str, *, exclusive: bool) -> None:
        waits.set()
        with held(tmp_path, exclusive=exclusive):
            order.append(name)

    with held(tmp_path, exclusive=False):
        threads = [threading.Thread(target=take, args=("alone",), kwargs={"exclusive": True})]
        threads[0].start()
        # The exclusive one is queued as soon as it holds the lock of the queue.
        assert waits.wait(5)
        await_locked(tmp_path / "alone.queue")
        threads.append(threading.Thread(target=take, args=("later",), kwargs={"exclusive": False}))
        threads[1].start()
        assert order == []
    for thread in threads:
        thread.join(5)
    assert order == ["alone", "later"]


@pytest.mark.usefixtures("refused")
def test_header_names_what_run_without_options_leaves_out(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pytester.makepyfile("def test(lab): pass")
    known = "wg-interop: left out: lanes vm and warp (*); *wireguard-go*, not installed (wg-interop install *)"
    pytester.runpytest_inprocess().stdout.fnmatch_lines([known])
    pytester.runpytest_inprocess("--lane", "netns").stdout.no_fnmatch_line("*left out*")


def test_nightly_test_runs_only_with_option(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os

        import pytest

        from harness.lab.trafficset import effort

        @pytest.mark.nightly
        def test_long(): assert effort(1, 9) == 9

        def test_short(): print(effort(1, 9))
        """
    )
    assert "WG_INTEROP_NIGHTLY" not in os.environ
    by_day = pytester.runpytest("-rP")
    by_day.assert_outcomes(passed=1, deselected=1)
    by_day.stdout.fnmatch_lines(["1"])
    by_night = pytester.runpytest("-rP", "--nightly")
    by_night.assert_outcomes(passed=2)
    by_night.stdout.fnmatch_lines(["9"])
    assert "WG_INTEROP_NIGHTLY" not in os.environ


def test_inner_run_leaves_timeout_scale_of_outer_run(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("from harness.wait import scaled\ndef test_scale(): assert scaled(1.0) == 3.0")
    before = scaled(1.0)
    pytester.runpytest_inprocess("--timeout-scale", "3").assert_outcomes(passed=1)
    assert scaled(1.0) == before


def test_failure_names_requirements_of_its_test(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    add_catalogue(pytester, monkeypatch)
    pytester.makepyfile("""
        import pytest
        @pytest.mark.requirement("HS-07", "R-0")
        @pytest.mark.bug("IB-05")
        def test_it(implementation): assert not "wrong"
    """)
    run = pytester.runpytest_inprocess("--impl", "refwg")
    run.stdout.fnmatch_lines(
        [
            "*- requirements -*",
            "HS-07 (replayed initiation is dropped)",
            "R-0",
            "*- bugs -*",
            "IB-05 (handshake/spoofed-response)",
        ]
    )
