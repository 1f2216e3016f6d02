"""Write flame graphs of refwg under load, by py-spy, which samples a process from outside."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.latency import stream
from bench.tunnels import tunnel
from harness import HarnessError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness import Manifest

SECONDS: Final = 5
RATE: Final = 400  # samples per second
_PATIENCE: Final = 30  # seconds to write the file


def find_py_spy() -> str:
    """Return the path of py-spy; raises Unavailable with the remedy if it is not installed."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        raise Unavailable("--flame needs py-spy, which is not installed: .venv/bin/pip install py-spy")
    return program


def flame_graphs(manifest: Manifest, folder: Path) -> list[Path]:
    """Sample both ends of a tunnel under one TCP stream; returns the files, NAME-sender.svg and NAME-receiver.svg."""
    py_spy = find_py_spy()
    folder.mkdir(parents=True, exist_ok=True)
    with tunnel(manifest) as pair, stream(pair, seconds=SECONDS + _PATIENCE):
        targets = {"sender": pair.a.pid, "receiver": pair.b.pid}
        files = {end: folder / f"{manifest.name}-{end}.svg" for end in targets}
        # Both at the same time: then one CPU is not faster because nobody watches it.
        running = [
            subprocess.Popen(
                command(py_spy, pid, files[end]),
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0,
            )
            for end, pid in targets.items() if pid is not None
        ]  # fmt: skip
        try:
            errors = [process.communicate(timeout=SECONDS + _PATIENCE)[1] for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
    missing = [file for file in files.values() if not file.exists()]
    if missing:
        raise HarnessError(f"py-spy wrote no {missing[0]}: {' '.join(errors).strip()[-400:]}")
    return list(files.values())


def command(py_spy: str, pid: int, file: Path) -> Sequence[str]:
    """Return the command that samples one process."""
    # --nonblocking: otherwise the process would be stopped for each sample.
    return [
        py_spy, "record", "--pid", str(pid), "--output", str(file), "--duration", str(SECONDS), "--rate", str(RATE),
        "--nonblocking",
    ]  # fmt: skip
