"""Check files that no test runs: workflows by actionlint, Vagrantfile by ruby and vagrant."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
    passed = _passes([str(program), "-shellcheck=", "-pyflakes=", *workflows])
    return 0 if _vagrantfile_passes() and passed else 1


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


def _passes(command: list[str]) -> bool:
    status = subprocess.run(command, cwd=ROOT, env=os.environ, check=False).returncode
    print(f"{'ok' if status == 0 else 'FAILED'}: {' '.join(command)}", flush=True)
    return status == 0


if __name__ == "__main__":
    sys.exit(main())
