"""Check what no test runs: workflows by actionlint, Vagrantfile by ruby and vagrant."""

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
    """Check all; 1 if something is wrong, 125 if actionlint could not be installed."""
    exit_on_sigterm()
    try:
        with Step("actionlint") as step:
            program = ACTIONLINT.installed("actionlint") or ACTIONLINT.install("actionlint", step.on_line)
    except (HarnessError, ToolFailed, OSError) as error:
        print(f"ci/workflows: actionlint could not be installed: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    workflows = sorted(map(str, WORKFLOWS.glob("*.yml")))
    # Without shellcheck and pyflakes it would find more on one machine than on another.
    good = _passes([str(program), "-shellcheck=", "-pyflakes=", *workflows])
    return 0 if _vagrantfile_is_good() and good else 1


def _vagrantfile_is_good() -> bool:
    """What ruby says of its syntax and vagrant of its sense; true where neither is installed, and that is told."""
    checks = {"ruby": ["ruby", "-c", str(VAGRANTFILE)], "vagrant": ["vagrant", "validate", "--ignore-provider"]}
    good = True
    for program, command in checks.items():
        if shutil.which(program):
            good &= _passes(command)
        else:
            print(f"Vagrantfile: not checked by {program}, which is not installed")
    return good


def _passes(command: list[str]) -> bool:
    status = subprocess.run(command, cwd=ROOT, env=os.environ, check=False).returncode
    print(f"{'ok' if status == 0 else 'FAILED'}: {' '.join(command)}", flush=True)
    return status == 0


if __name__ == "__main__":
    sys.exit(main())
