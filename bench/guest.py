"""Measure in a guest: the kernel's driver beside refwg, and how long a boot takes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from harness import HarnessError, Unavailable, suite
from harness.plugin.guests import FIRST_PID_NAMESPACE
from harness.vm import boot, kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESULTS: Final = "guest.json"
# A guest has the packages and the suite; this folder is copied to the same path.
BENCH: Final = (Path(__file__).parent, str(Path(__file__).parent))
BOOT: Final = 120.0  # seconds for a boot under emulation, on a busy machine
SECONDS_EACH: Final = 120.0  # seconds for a measurement of one implementation in one round


def first_verdict() -> float:
    """Boot a guest that runs `wg --version`; return the seconds until its exit status is here.

    Raises HarnessError if the guest or the command failed.
    """
    started = time.perf_counter()
    result = boot.boot(kernels.CATALOGUE.default, ["wg", "--version"])
    if result.exit_status() != 0:
        raise HarnessError(boot.explain(result))
    return time.perf_counter() - started


def measured_inside(
    arguments: Sequence[str], *, kernel: str, steps: int, on_line: Callable[[str], None]
) -> dict[str, Any]:
    """Run bench/run in a guest, and return the content of its JSON file.

    arguments: of bench/run, without --json. kernel: as for --kernel of pytest. steps: measurements of one
    implementation, all rounds together. on_line: gets each line of output. Raises HarnessError if the guest fails, or
    if it measured nothing.
    """
    iperf3 = shutil.which("iperf3")
    if iperf3 is None:
        raise Unavailable("--guest needs iperf3: apt-get install iperf3")

    def show(data: bytes) -> None:
        for line in data.decode(errors="replace").splitlines():
            on_line(line)

    result = boot.boot(
        kernel,
        ["python", "-m", "bench.runner", *arguments, "--json", f"{boot.RESULTS_IN_GUEST}/{RESULTS}"],
        deadline=BOOT + steps * SECONDS_EACH,
        files=[(Path(iperf3), "/usr/bin/iperf3"), BENCH],
        environment={
            "WG_INTEROP_SANDBOX": FIRST_PID_NAMESPACE,
            "PYTHONDONTWRITEBYTECODE": "1",
            # refwg is started in another directory.
            "PYTHONPATH": str(suite.PACKAGES),
        },
        show=show,
    )
    file = result.results / RESULTS
    if not file.exists():
        raise HarnessError(boot.explain(result))
    content: dict[str, Any] = json.loads(file.read_text())
    content["accelerator"] = result.accelerator
    return content
