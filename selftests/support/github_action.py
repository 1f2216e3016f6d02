"""Run the shell steps of action.yml as GitHub's runner does, and expand its expressions."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING, Any, Final

import yaml

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_EXPRESSION: Final = re.compile(r"\$\{\{ (.*?) \}\}")
# What the runner executes for `shell: bash`, in GitHub's documentation of workflow syntax.
_BASH: Final = ("bash", "--noprofile", "--norc", "-eo", "pipefail")


class Action:
    """A composite action in a directory. steps: all steps, as in the file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        contents: dict[str, Any] = yaml.safe_load((root / "action.yml").read_text())
        self.inputs: dict[str, dict[str, str]] = contents["inputs"]
        self.steps: list[dict[str, Any]] = contents["runs"]["steps"]

    @property
    def scripts(self) -> list[dict[str, Any]]:
        """The steps that run a shell."""
        return [step for step in self.steps if "run" in step]

    def run(
        self, step: Mapping[str, Any], workspace: Path, inputs: Mapping[str, str], environ: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run one shell step in a workspace, in a network namespace without any network.

        inputs: the `with` of the caller. environ: the variables of the runner, besides those that it always sets.
        """
        unknown = inputs.keys() - self.inputs.keys()
        assert not unknown, f"action.yml has no input {', '.join(unknown)}"
        values = {f"inputs.{name}": inputs.get(name, entry["default"]) for name, entry in self.inputs.items()}
        values |= {"runner.temp": str(workspace.parent / "temp")}
        script = workspace.parent / "step.sh"
        script.write_text(step["run"])
        own = {name: _EXPRESSION.sub(lambda found: values[found[1]], text) for name, text in step["env"].items()}
        ours = {"GITHUB_ACTION_PATH": str(self.root), "GITHUB_WORKSPACE": str(workspace), "GITHUB_ACTIONS": "true"}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return subprocess.run(
            ["unshare", "--net", *_BASH, str(script)],
            cwd=workspace, env={**kept, **ours, **own, **environ},
            capture_output=True, text=True, timeout=110, check=False,
        )  # fmt: skip
