"""Check workflows, action and examples by actionlint, and the Vagrantfile by its tools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from ci.setup_checkout import EXIT_COULD_NOT, ROOT
from harness.errors import HarnessError
from harness.install.progress import Step
from harness.install.recipes import GoProgram
from harness.install.tools import ToolFailed, exit_on_sigterm

ACTIONLINT: Final = GoProgram(
    module="github.com/rhysd/actionlint/cmd/actionlint", version="v1.7.12", binary="actionlint", go="1.24.0"
)
WORKFLOWS: Final = ROOT / ".github" / "workflows"
VAGRANTFILE: Final = ROOT / "Vagrantfile"
_BLOCK: Final = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main() -> int:
    """Run all checks; return 0 if all passed, 1 if one failed, 125 if actionlint could not be installed."""
    exit_on_sigterm()
    try:
        with Step("actionlint") as step:
            program = ACTIONLINT.installed("actionlint") or ACTIONLINT.install("actionlint", step.on_line)
    except (HarnessError, ToolFailed, OSError) as error:
        print(f"ci/workflows: actionlint could not be installed: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    workflows = sorted(map(str, WORKFLOWS.glob("*.yml")))
    # Without shellcheck and pyflakes: they are installed on some machines only, and results should not differ.
    options = ["-shellcheck=", "-pyflakes="]
    passed = [_passes([str(program), *options, *workflows]), _calls_pass(str(program), options), _vagrantfile_passes()]
    return 0 if all(passed) else 1


def _calls_pass(program: str, options: list[str]) -> bool:
    """Check the calls in docs/ci.md against the action and the workflow that they call, which this checks too.

    actionlint knows the inputs of an action or workflow only if it is in the same repository.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        place = root / ".github" / "workflows"
        place.mkdir(parents=True)
        shutil.copy(ROOT / "action.yml", root)
        shutil.copy(WORKFLOWS / "interop.yml", place)
        for number, call in enumerate(calls((ROOT / "docs" / "ci.md").read_text())):
            (place / f"call{number}.yml").write_text(call)
        subprocess.run(["git", "init", "-q", root], check=True)
        return _passes([program, *options], root)


def calls(text: str) -> list[str]:
    """Return the workflows in this text that call the lab, as calls inside the lab's own repository."""
    found = [block for block in _BLOCK.findall(text) if "OWNER/wg-interop" in block]
    return [re.sub(r"uses: OWNER/wg-interop(.*)@main", r"uses: .\1", block).replace("uses: .\n", "uses: ./\n")
            for block in found]  # fmt: skip


def _vagrantfile_passes() -> bool:
    """Check the syntax by ruby and the settings by vagrant; a missing program is reported, and is not a failure."""
    checks = {"ruby": ["ruby", "-c", str(VAGRANTFILE)], "vagrant": ["vagrant", "validate", "--ignore-provider"]}
    passed = True
    for program, command in checks.items():
        if shutil.which(program):
            passed &= _passes(command)
        else:
            print(f"Vagrantfile: not checked by {program}, which is not installed")
    return passed


def _passes(command: list[str], place: Path = ROOT) -> bool:
    status = subprocess.run(command, cwd=place, env=os.environ, check=False).returncode
    print(f"{'ok' if status == 0 else 'FAILED'}: {' '.join(command)}", flush=True)
    return status == 0


if __name__ == "__main__":
    sys.exit(main())
