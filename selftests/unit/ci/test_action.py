"""Check the action, the reusable workflow and the container recipe as files, and the command they lead to."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ci import action
from ci.setup_checkout import ROOT
from selftests.support.github_action import Action

WORKFLOW = ROOT / ".github" / "workflows" / "interop.yml"
CONTAINERFILE = ROOT / "ci" / "Containerfile"


def test_inputs_become_options_of_run(tmp_path: Path) -> None:
    inputs = {
        "IMPL": "mine=./wg\n  refwg \n\n", "LIKE": "wireguard-go", "LANE": "netns", "SUITE": "pairs lab",
        "BASELINE": "known.toml", "MUST_INCLUDE": "mine", "ARGS": "-k 'a and b' --nightly", "WORKERS": "2",
    }  # fmt: skip
    environ = {f"INPUT_{name}": text for name, text in inputs.items()}
    assert action.command_of(environ, tmp_path) == [
        str(ROOT / ".venv/bin/wg-interop"), "run", f"--results={tmp_path}/wg-interop-report/results.json",
        "--impl=mine=./wg", "--impl=refwg", "--like=wireguard-go", "--lane=netns", "--suite=pairs", "--suite=lab",
        "--must-include=mine", "--baseline", "known.toml", "-n", "2", "-k", "a and b", "--nightly",
        str(ROOT / "selftests/lab"), str(ROOT / "selftests/netns"),
    ]  # fmt: skip


@pytest.mark.parametrize(("suite", "folder"), [("", "selftests/netns"), ("all\npairs", "selftests")])
def test_suites_choose_directories_of_lab(tmp_path: Path, suite: str, folder: str) -> None:
    assert action.command_of({"INPUT_SUITE": suite}, tmp_path)[-1] == str(ROOT / folder)


def test_open_quote_in_input_is_wrong_usage(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(action, "PROGRAM", Path("/nonexistent"))
    monkeypatch.setenv("INPUT_IMPL", "mine='./wg")
    for step in ("install", "run"):
        monkeypatch.setattr(sys, "argv", ["action", step])
        assert action.main() == 2
        assert capfd.readouterr().out.endswith("::error title=wg-interop::input impl: No closing quotation\n")


def test_user_runs_tests_by_sudo_with_own_variables() -> None:
    environ = {"PATH": "/bin", "XDG_CACHE_HOME": "/cache", "GITHUB_TOKEN": "secret", "GITHUB_ACTIONS": "true"}
    words = ["sudo", "-n", "env", "PATH=/bin", "XDG_CACHE_HOME=/cache", "GITHUB_ACTIONS=true"]
    assert action.become_root(environ, 1000) == words
    assert action.become_root(environ, 0) == []


def test_step_of_action_has_variable_for_each_input() -> None:
    found = Action(ROOT)
    install, run = found.scripts
    wanted = {f"INPUT_{name.upper().replace('-', '_')}": f"${{{{ inputs.{name} }}}}" for name in found.inputs}
    del wanted["INPUT_ARTIFACT"]
    assert {name: text for name, text in run["env"].items() if name.startswith("INPUT_")} == wanted
    assert install["env"].items() <= run["env"].items()


@pytest.mark.parametrize("path", [ROOT / "action.yml", WORKFLOW], ids=lambda path: path.name)
def test_no_script_has_expression_of_github(path: Path) -> None:
    # An input that is pasted into a script could run any command; a variable cannot.
    contents: dict[str, Any] = yaml.safe_load(path.read_text())
    steps = contents["runs"]["steps"] if "runs" in contents else contents["jobs"]["interop"]["steps"]
    scripts = [step["run"] for step in steps if "run" in step]
    assert scripts
    assert not [script for script in scripts if "${{" in script]


def test_workflow_passes_its_inputs_to_action() -> None:
    # YAML reads the key `on` as true.
    contents: dict[Any, Any] = yaml.safe_load(WORKFLOW.read_text())
    (call,) = [step for step in contents["jobs"]["interop"]["steps"] if step.get("uses", "").startswith("./")]
    own = contents[True]["workflow_call"]["inputs"].keys() - {"build", "lab", "lab-ref", "runs-on"}
    assert call["with"] == {name: f"${{{{ inputs.{name} }}}}" for name in own}
    assert own <= Action(ROOT).inputs.keys()


def test_report_and_cache_of_steps_are_those_of_script() -> None:
    cache, _, run, upload = Action(ROOT).steps
    assert cache["with"]["path"] == f"{run['env']['XDG_CACHE_HOME']}/wg-interop"
    assert upload["with"]["path"] == f"{run['env']['INPUT_REPORT']}/"


def test_container_recipe_has_known_instructions_and_sources() -> None:
    text = re.sub(r"\\\n", " ", CONTAINERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    words = [line.split(maxsplit=1) for line in lines]
    assert [word for word, _ in words] == ["FROM", "ENV", "RUN", "COPY", "RUN", "ENV", "WORKDIR", "ENTRYPOINT", "CMD"]
    assert words[0][1] == "debian:12"
    # ci/setup refuses a virtual environment that another checkout has made, and .venv is large.
    assert ".venv" in (ROOT / ".dockerignore").read_text().splitlines()
    packages = {line.split()[0] for line in (ROOT / "ci/packages.txt").read_text().splitlines() if line[0] != "#"}
    bootstrap = re.search(r"--no-install-recommends (.*?) &&", words[2][1])
    assert bootstrap is not None
    assert set(bootstrap[1].split()) <= packages
