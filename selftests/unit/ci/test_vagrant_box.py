"""Check the gate that runs provisioners: order, commands as steps, exit statuses."""

from __future__ import annotations

import io
import os
import re
from typing import TYPE_CHECKING

import pytest

from ci.vagrant_box import follow, in_order, traced
from ci.vagrantfile import Provisioner
from harness.errors import ProgramFailed, Unavailable

if TYPE_CHECKING:
    from pathlib import Path


def run(script: str, place: Path) -> tuple[list[str], str]:
    """Run a script under `follow`; return its output and the log."""
    output: list[str] = []
    file, log = place / "script", io.StringIO()
    file.write_text(traced(script))
    follow(["bash", str(file)], dict(os.environ), output, log)
    return output, log.getvalue()


def steps_of(printed: str) -> list[str]:
    """State and name of each step, without the signs of life."""
    rows = (re.fullmatch(r"(ok|FAILED) +(\S.*?) +\d+\.\d s.*", line) for line in printed.splitlines())
    return [f"{row[1]} {row[2]}" for row in rows if row]


def test_provisioners_on_request_come_last() -> None:
    first, second, third = (
        Provisioner(name=name, script="", on_request=name == "asked") for name in ("a", "asked", "b")
    )
    assert in_order([first, second, third]) == [first, third, second]


def test_each_command_of_script_is_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, _ = run("set -e\nvalue=$(echo one)\necho $value two >&2\n", tmp_path)
    assert output == ["one two"]
    steps = ["ok set -e", "ok echo one", "ok value=one", "ok echo one two"]
    assert steps_of(capsys.readouterr().out) == steps


@pytest.mark.parametrize(("status", "error"), [(1, ProgramFailed), (127, ProgramFailed), (125, Unavailable)])
def test_last_command_fails_when_script_does(
    status: int, error: type[Exception], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error, match=str(status)):
        run(f"echo before\nexit {status}\n", tmp_path)
    assert steps_of(capsys.readouterr().out) == ["ok echo before", f"FAILED exit {status}"]


def test_output_is_logged_with_commands(tmp_path: Path) -> None:
    _, log = run("echo a\n: $(echo b)", tmp_path)
    assert log == "+ echo a\na\n++ echo b\n+ : b\n"
