"""Check the marks for requirements, bugs, capabilities and nightly tests."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from selftests.support.inner_pytest import IMPLEMENTATION, OK, USAGE, add_catalogue, leave_outer_run, refuse_sandbox

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

outside = pytest.fixture(leave_outer_run, autouse=True)
refused = pytest.fixture(refuse_sandbox)


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
