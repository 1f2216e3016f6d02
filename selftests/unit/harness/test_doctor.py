"""Check the doctor: how a probe becomes a finding, and when lane netns can run."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.cli import doctor
from harness.cli.doctor import Bench, Finding, Missing, Probe, is_able
from harness.errors import HarnessError, ProgramFailed, Unavailable
from harness.install.packages import install_command
from harness.sandbox.launcher import INSIDE

ROOT = Path(__file__).parents[3]

WORKS = Finding(name="x", kind="ability", works=True, detail="fine")
LACKS = Finding(name="y", kind="program", works=False, detail="gone", disables="all", remedy="get y", package="y")
PEER = Finding(name="wg-x", kind="implementation", works=True, detail="1.0", needed=False)


def probe(error: Exception | None, *, kind: str = "ability", name: str = "x", tmp_path: Path) -> Finding:
    def attempt(_: Bench) -> str:
        if error is not None:
            raise error
        return "fine"

    tested = Probe(name=name, kind=kind, attempt=attempt, disables="all", remedy="turn it on", package="pack")
    return tested.run(Bench(tmp_path))


def test_successful_probe_disables_nothing(tmp_path: Path) -> None:
    finding = probe(None, tmp_path=tmp_path)
    assert (finding.works, finding.detail, finding.disables, finding.remedy) == (True, "fine", "", "")


def test_failed_probe_reports_disabled_feature_and_remedy(tmp_path: Path) -> None:
    finding = probe(OSError(errno.EPERM, "not yours"), tmp_path=tmp_path)
    assert (finding.works, finding.disables, finding.remedy) == (False, "all", "turn it on")
    assert "not yours" in finding.detail


def test_probe_without_sandbox_is_reported_as_not_tried(tmp_path: Path) -> None:
    finding = probe(Unavailable("no sandbox: reason: remedy"), tmp_path=tmp_path)
    assert (finding.detail, finding.remedy) == ("not tried: no sandbox", "")


ASK_THE_KERNEL = """
import pathlib, sys
from harness.cli import doctor
(probe,) = [probe for probe in doctor._probes() if probe.name == "kernel"]
print(probe.run(doctor.Bench(pathlib.Path(sys.argv[1]))).detail)
"""


def test_kernel_probe_is_not_tried_in_bare_user_namespace(tmp_path: Path) -> None:
    # A bare user namespace has no capability over the network, like an ordinary user.
    command = ["unshare", "--user", sys.executable, "-c", ASK_THE_KERNEL, str(tmp_path)]
    env = {name: value for name, value in os.environ.items() if name != INSIDE}
    if subprocess.run(["unshare", "--user", "true"], check=False).returncode:
        pytest.skip("no user namespace here: allow kernel.unprivileged_userns_clone")
    completed = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (completed.stdout, completed.stderr) == ("not tried: no sandbox\n", "")


def test_output_of_program_is_cut_to_its_first_and_last_line(tmp_path: Path) -> None:
    finding = probe(HarnessError("wg-go ended:\nbanner\nbanner\nERROR: no TUN"), tmp_path=tmp_path)
    assert finding.detail == "wg-go ended: ERROR: no TUN"


def test_remedy_of_missing_error_replaces_remedy_of_probe(tmp_path: Path) -> None:
    assert probe(Missing("mode 0600", "chmod it"), tmp_path=tmp_path).remedy == "chmod it"


def test_missing_program_is_reported_with_its_package(tmp_path: Path) -> None:
    finding = probe(HarnessError("?"), kind="program", name="no-such-program", tmp_path=tmp_path)
    assert (finding.detail, finding.package) == ("not installed", "pack")
    assert finding.remedy == install_command(["pack"])


def test_program_outside_path_has_path_export_as_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_SBIN", ["/bin"])
    finding = probe(HarnessError("?"), kind="program", name="sh", tmp_path=tmp_path)
    assert (finding.detail, finding.remedy) == ("/bin/sh is not on PATH", "export PATH=$PATH:/bin")


def test_failing_program_is_not_reported_as_missing(tmp_path: Path) -> None:
    finding = probe(ProgramFailed("sh: status 1: broken"), kind="program", name="sh", tmp_path=tmp_path)
    assert (finding.detail, finding.package) == ("sh: status 1: broken", "")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOENT, "mknod -m 0666 /dev/net/tun c 10 200"), (errno.ENODEV, "modprobe tun")],
)
def test_missing_tun_device_has_remedy(number: int, remedy: str) -> None:
    assert remedy in doctor._tun_missing(OSError(number, os.strerror(number))).remedy  # noqa: SLF001


def test_forbidden_tun_device_is_reported_with_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tun = tmp_path / "tun"
    tun.touch(mode=0o600)
    monkeypatch.setattr(doctor, "TUN", tun)
    missing = doctor._tun_missing(PermissionError(errno.EACCES, "Permission denied"))  # noqa: SLF001
    assert (str(missing), missing.remedy) == ("Permission denied, its mode is 0600", f"as root: chmod 0666 {tun}")


@pytest.mark.parametrize(
    ("findings", "able"), [([WORKS, PEER], True), ([WORKS], False), ([LACKS, PEER], False), ([], False)], ids=str
)
def test_lane_needs_its_abilities_and_one_implementation(findings: list[Finding], able: bool) -> None:
    assert is_able(findings) is able


def examine(findings: list[Finding], monkeypatch: pytest.MonkeyPatch, *, as_json: bool) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "findings", lambda: iter(findings))
    stream = io.StringIO()
    return doctor.examine(stream, as_json=as_json), stream.getvalue()


def test_findings_are_printed_with_disabled_feature_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = examine([WORKS, LACKS, PEER], monkeypatch, as_json=False)
    assert status == 125
    assert [line.split() for line in output.splitlines()[2:5]] == [
        ["MISSING", "y", "gone"], ["disables:", "all"], ["to", "fix:", "get", "y"],
    ]  # fmt: skip
    assert output.splitlines()[-1] == "The netns lane cannot run without y."


def test_untried_finding_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    untried = Finding(name="z", kind="program", works=False, detail=doctor.UNTRIED, disables="all")
    _, output = examine([LACKS, untried, PEER], monkeypatch, as_json=False)
    lines = output.splitlines()
    assert "untried  z                    not tried: no sandbox" in lines
    assert sum("disables: all" in line for line in lines) == 1
    assert lines[-2:] == ["not tried: no sandbox: z", "The netns lane cannot run without y."]


def test_findings_are_printed_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = examine([WORKS, PEER], monkeypatch, as_json=True)
    assert status == 0
    document = json.loads(output)
    assert (document["schema"], document["netns"], document["findings"][1]["name"]) == (1, True, "wg-x")


def test_real_probes_report_success_or_disabled_feature() -> None:
    findings = {finding.name: finding for finding in doctor.findings()}
    assert {"sandbox", "/dev/net/tun", "nft", "wg", "kernel", "wireguard-go"} <= findings.keys()
    assert all(finding.works or finding.disables for finding in findings.values())


def test_interrupted_doctor_leaves_no_running_timer() -> None:
    findings = doctor.findings()
    next(findings)
    (timer,) = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    findings.close()
    timer.join(5)
    assert not timer.is_alive()


def test_probes_that_exceed_deadline_raise_harness_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEADLINE", 0.02)
    with pytest.raises(HarnessError, match=r"^doctor: it took longer than 0\.02 s$"):
        list(doctor.findings())
