"""Check options from environment and wg-interop.toml, and manifests of packages: found, checked, preferred."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.cli.settled import settle
from harness.errors import UsageError
from harness.implementations.registry import Registry
from harness.lanes import LANE
from harness.sandbox.launcher import REFUSED
from harness.settings import FILE, find_file, lines, read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

pytest_plugins = ["pytester"]

MINE = 'name = "mine"\nkind = "uapi"\n'
TESTS = "def test(lab, implementation): pass\ndef test_core(): pass\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, without any setting."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str = "", **environment: str) -> dict[str, str]:
    """The settings of a file in the current directory and of variables, as a header shows them."""
    Path(FILE).write_text(text)
    return dict(line.split(" ", 1) for line in lines(read_settings(environment).options))


def options(text: str) -> str:
    return f"[options]\n{text}\n"


@pytest.mark.usefixtures("home")
def test_variable_precedes_file_and_replaces_its_list() -> None:
    found = read(
        options("impl = ['refwg', 'kernel']\ntimeout-scale = 2"), WG_IMPL="gotatun, boringtun@0.6.0", WG_LIKE=""
    )
    assert found["impl"] == "gotatun boringtun@0.6.0 (WG_IMPL)"
    assert found["timeout-scale"] == f"2 ({Path.cwd() / FILE})"


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WG_PAIR": "a~b\nb~a"}, {"pair": "a~b b~a (WG_PAIR)"}),
        ({"WG_NIGHTLY": "1", "WG_SEED": "0"}, {"nightly": "true (WG_NIGHTLY)", "seed": "0 (WG_SEED)"}),
        (
            {"WG_MUST_INCLUDE": "a,b", "WG_BASELINE": "b.toml"},
            {"must-include": "a b (WG_MUST_INCLUDE)", "baseline": "b.toml (WG_BASELINE)"},
        ),
        ({"WG_KTAP": "-"}, {"ktap": "- (WG_KTAP)"}),
        ({"WG_NIGHTLY": "off"}, {"nightly": "false (WG_NIGHTLY)"}),
        ({"WG_TIMEOUT_SCALE": "1.5"}, {"timeout-scale": "1.5 (WG_TIMEOUT_SCALE)"}),
        ({"WG_KERNEL_MODULE": "a.ko"}, {"kernel-module": "a.ko (WG_KERNEL_MODULE)"}),
        ({"WG_THREADS": "4", "WG_IMPL": " "}, {}),
    ],
)
def test_each_option_has_variable(variables: Mapping[str, str], expected: Mapping[str, str]) -> None:
    assert read(**variables) == expected


def test_file_is_found_above_current_directory(home: Path) -> None:
    below = home / "a" / "b"
    below.mkdir(parents=True)
    (home / FILE).write_text(options("keep = 'all'"))
    assert find_file(below) == home / FILE
    (home / "a" / FILE).touch()
    assert find_file(below) == home / "a" / FILE


def test_paths_in_file_are_relative_to_its_folder(home: Path) -> None:
    found = read(options("impl = ['mine=./wg', 'refwg']\nimpl-manifest = ['x.toml']\nkernel = ['6.12', './bzImage']"))
    assert found["impl"] == f"mine={home}/wg refwg ({home}/{FILE})"
    assert found["impl-manifest"] == f"{home}/x.toml ({home}/{FILE})"
    assert found["kernel"] == f"6.12 {home}/bzImage ({home}/{FILE})"


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("text", "variables", "complaint"),
    [
        ("option = 1", {}, f"*/{FILE}: unknown key option; there are: manifests, options"),
        (
            options("pairs = []"),
            {},
            f"*/{FILE}: unknown key options.pairs; there are: impl, impl-manifest, *, blame-seconds",
        ),
        (options("impl = 'refwg'"), {}, f"*/{FILE}: options.impl must be a list, not 'refwg'"),
        (options("lane = ['fast']"), {}, f"*/{FILE}: options.lane: 'fast' is not one of core, netns, vm, warp"),
        (options("seed = 1.5"), {}, f"*/{FILE}: options.seed must be an integer, not 1.5"),
        ("[options", {}, f"*/{FILE}: not TOML: *"),
        ("", {"WG_SUITE": "pairs,all"}, "WG_SUITE: 'all' is not one of pairs, alone, lab, conformance"),
        ("", {"WG_NIGHTLY": "please"}, "WG_NIGHTLY: want 1 or 0, not 'please'"),
        ("", {"WG_SEED": "x"}, "WG_SEED: 'x' is not a whole number"),
        ("", {"WG_TIMEOUT_SCALE": "x"}, "WG_TIMEOUT_SCALE: 'x' is not a number"),
    ],
)
def test_mistake_in_setting_is_named_with_its_source(text: str, variables: Mapping[str, str], complaint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        read(text, **variables)
    assert fnmatchcase(str(refusal.value), complaint)


@pytest.mark.usefixtures("home")
def test_guest_reads_no_settings() -> None:
    assert read(options("impl = ['refwg']"), WG_KEEP="all", **{LANE: "vm"}) == {}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"impl": ("mine=/wg", "refwg"), "like": ("kernel",), "pair": ("mine~refwg",)}),
        ({"impl": ("gotatun",)}, {}),
        ({"pair": ("mine+x~kernel",)}, {"impl": ("mine=/wg",), "like": ("kernel",)}),
        ({"pair": ("refwg~kernel",)}, {"like": ("kernel",)}),
    ],
)
def test_programs_of_higher_source_replace_what_belongs_to_lower(
    given: dict[str, Any], expected: dict[str, tuple[str, ...]]
) -> None:
    Path(FILE).write_text(options("impl = ['mine=/wg', 'refwg']\nlike = ['kernel']\npair = ['mine~refwg']"))
    found = read_settings({}).beside(given)
    assert {name: setting.value for name, setting in found.items()} == expected


def test_command_line_precedes_settings_in_pytest(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makepyfile(test_it=TESTS)
    (pytester.path / FILE).write_text(options("impl = ['gotatun', 'boringtun']\nsuite = ['alone']"))
    ids = pytester.runpytest_inprocess("--collect-only", "-q").outlines
    assert [line for line in ids if "::" in line] == [f"test_it.py::test[{name}]" for name in ("gotatun", "boringtun")]
    monkeypatch.setenv("WG_IMPL", "refwg")
    for arguments, name in (((), "refwg"), (("--impl", "wireguard-go"), "wireguard-go")):
        ids = pytester.runpytest_inprocess("--collect-only", "-q", *arguments).outlines
        assert [line for line in ids if "::" in line] == [f"test_it.py::test[{name}]"]


def test_file_above_ordinary_tests_leaves_them_alone(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run in this process may have been refused a sandbox, and its child would say so.
    monkeypatch.setenv(REFUSED, "")
    monkeypatch.delenv(REFUSED)
    pytester.makepyfile("def test_core(): pass")
    (pytester.path / FILE).write_text(options("impl = ['refwg']\nresults = 'r/results.json'"))
    run = pytester.runpytest_subprocess()
    run.assert_outcomes(passed=1)
    run.stdout.no_fnmatch_line("*wg-interop: *")
    assert not (pytester.path / "r").exists()


def test_mistake_in_file_is_usage_error_of_pytest(pytester: pytest.Pytester) -> None:
    (pytester.path / FILE).write_text(options("nope = 1"))
    run = pytester.runpytest_inprocess()
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines(f"ERROR: */{FILE}: unknown key options.nope; there are: impl, *")


@pytest.mark.usefixtures("home")
def test_command_run_uses_settings_beside_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(FILE).write_text(options("results = 'r.json'\nnightly = true\ntimeout-scale = 2\nsuite = ['lab']"))
    monkeypatch.setenv("WG_IMPL", "refwg")
    done = settle({"impl": (), "keep": None, "timeout_scale": "3", "nightly": False}, None, ())
    assert done.options == {"impl": ("refwg",), "keep": None, "timeout_scale": "3", "nightly": True}
    assert (done.results, done.suites) == (Path.cwd() / "r.json", ("lab",))
    assert "impl refwg (WG_IMPL)" in done.lines
    assert settle({}, Path("s.json"), ("pairs",))[1:3] == (Path("s.json"), ("pairs",))


def test_manifests_of_file_are_known_and_not_asked_for(home: Path) -> None:
    (home / "own").mkdir()
    (home / "own" / "a.toml").write_text(MINE)
    (home / "refwg.toml").write_text(MINE.replace("mine", "refwg"))
    (home / FILE).write_text("manifests = ['own', 'refwg.toml']")
    registry = Registry()
    assert registry.get("mine").source == home / "own" / "a.toml"
    assert registry.get("refwg").source == home / "refwg.toml"
    assert registry.asked == []
    (home / FILE).write_text("manifests = ['empty']")
    (home / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no manifest \*\.toml in .*/empty"):
        Registry()


@pytest.fixture
def package(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package `theirs`, with a manifest; `register` adds its entry point."""
    folder = home / "site" / "theirs"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "from pathlib import Path\nFILE = Path(__file__).parent / 'a.toml'\nNUMBER = 1\n"
    )
    (folder / "a.toml").write_text(MINE)
    monkeypatch.syspath_prepend(folder.parent)
    # That of another test.
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    return folder


def register(package: Path, value: str) -> None:
    metadata = package.parent / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[wg_interop.implementations]\nany = {value}\n")


@pytest.mark.parametrize("value", ["theirs", "theirs:FILE"])
def test_package_registers_manifests_by_entry_point(package: Path, value: str) -> None:
    register(package, value)
    assert Registry().get("mine").source == package / "a.toml"


@pytest.mark.parametrize(
    ("value", "manifest", "complaint"),
    [
        ("theirs:NUMBER", MINE, "theirs:NUMBER of package theirs: want a module or a path, not 1"),
        ("theirs:NONE", MINE, "theirs:NONE of package theirs: AttributeError: module 'theirs' has no attribute 'NONE'"),
        ("theirs", MINE.replace("mine", "refwg"), "theirs of package theirs: the name refwg is taken by /"),
    ],
)
def test_bad_entry_point_is_named_with_its_package(package: Path, value: str, manifest: str, complaint: str) -> None:
    (package / "a.toml").write_text(manifest)
    register(package, value)
    with pytest.raises(UsageError) as refusal:
        Registry()
    assert f"entry point wg_interop.implementations: any = {complaint}" in str(refusal.value)
