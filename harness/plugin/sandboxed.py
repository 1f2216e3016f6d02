"""Restart pytest, and each xdist worker, as a child of harness/sandbox/launcher.py.

The controller replaces itself by the launcher, which starts the same command line again inside. It does so as early as
pytest allows, and only if a test of the run uses the lab: a forked copy of the process collects the tests to find out.
"""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING, Final, NoReturn

from harness.sandbox.launch import inside, launcher_command
from harness.sandbox.launcher import REFUSED

if TYPE_CHECKING:
    import pytest

    from harness.plugin.options import RunPlan

# The exit statuses of the copy that only collects; pytest uses neither.
PEEK_NO, PEEK_YES = 78, 77
PEEKING: Final = "_wg_interop_peeking"
_ONLY_LOOKING: Final = (
    "collectonly",
    "help",
    "version",
    "markers",
    "showfixtures",
    "show_fixtures_per_test",
    "setupplan",
    "cacheshow",
)


def only_looks(config: pytest.Config) -> bool:
    """Return whether pytest was asked only to show something, and executes no test."""
    return any(getattr(config.option, name, False) for name in _ONLY_LOOKING)


def worker_spec(spec: str) -> str:
    """Return the execnet spec of a worker under a launcher that dies with this process."""
    if spec != "popen" and not spec.startswith("popen//"):
        return spec
    command = launcher_command("--die-with", str(os.getpid()), "--or-without")
    return "popen//python=" + shlex.join(command) + spec.removeprefix("popen")


def enter_if_needed(config: pytest.Config, plan: RunPlan) -> None:
    """Start this pytest again in a sandbox if the run needs one and is not in one.

    Returns if it is not needed; otherwise the process is replaced.
    """
    if inside() or REFUSED in os.environ or only_looks(config):
        return
    if not (plan.concerns_lab or config.getini("wg_sandbox") == "always" or _peek(config)):
        return
    if list(config.invocation_params.args) != sys.argv[1:]:
        os.environ[REFUSED] = (
            "pytest was started by another program; start pytest as a command, or use `wg-interop run`"
        )
        return
    _stop_capturing(config)
    _replace_process()


def _stop_capturing(config: pytest.Config) -> None:
    """Restore the three standard descriptors, which pytest's capture has replaced, and end the capture."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()
        # Stopped, it would fail at its next use, such as the import of a test file in the copy that only collects.
        config.pluginmanager.unregister(capture)


def _replace_process() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if not any(name in os.environ for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        # Inside, an ordinary user counts as root, and pytest would look for root's temporary directory.
        os.environ["USER"] = f"uid{os.getuid()}"
    os.execv(sys.executable, [*launcher_command("--or-without"), *sys.orig_argv[1:]])  # noqa: S606 - ourselves again


def _silence(config: pytest.Config) -> None:
    """Redirect the standard descriptors to /dev/null until the process ends."""
    _stop_capturing(config)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)


def _peek(config: pytest.Config) -> bool:
    """Collect in a silent copy of this process, and return whether a test uses the lab."""
    child = os.fork()
    if child == 0:
        _silence(config)
        setattr(config, PEEKING, True)
        config.option.collectonly = True
        undistributed: dict[str, object] = {"numprocesses": None, "tx": [], "dist": "no", "usepdb": False}
        for name, value in undistributed.items():
            setattr(config.option, name, value)
        return False
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == PEEK_YES
