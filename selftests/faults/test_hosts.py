"""Run tests on other machines by a stand-in for ssh, and cut the machines off: no result is lost or given twice."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree as ET

import pytest

from harness import poll_until
from harness.cli import on
from selftests.support import host, ssh
from selftests.support.dependencies import link_dependencies

if TYPE_CHECKING:
    from pathlib import Path

TESTS: Final = "selftests/netns/test_ping_and_counters.py"
# A is right, or counts 28 bytes more for each datagram: two of the seven tests fail, and leave evidence.
PAIRS: Final = ("refwg~refwg", "refwg+counts-udp-headers~refwg")
DEADLINE: Final = 120.0


class Lab:
    """A directory for runs, and the stand-in's environment."""

    def __init__(self, folder: Path) -> None:
        probe = ["unshare", "--user", "--map-root-user", "--net", "--mount", "true"]
        if subprocess.run(probe, check=False).returncode:
            pytest.skip("no user namespace here: allow kernel.unprivileged_userns_clone")
        self.folder = folder
        # Hidden from the hosts: what they need of it must be copied.
        self.mine = folder / "mine"
        for path in (self.mine, folder / "homes"):
            path.mkdir()
        link_dependencies(importlib.metadata.requires("wg-interop") or [], folder / "links")
        self.environment = {
            on.COMMAND: shlex.join([sys.executable, str(ssh.__file__)]),
            "STANDIN_HOME": str(folder / "homes"),
            "STANDIN_LINKS": str(folder / "links"),
            "STANDIN_HIDDEN": str(self.mine),
        }
        self._count = 0

    @cached_property
    def here(self) -> tuple[int, str, Path]:
        """The same tests on this machine."""
        return self.run(*pairs(*PAIRS))

    def start(self, *words: str, limits: str = "") -> tuple[host.Run, Path]:
        """Start `wg-interop run`; returns it, and the directory of its report."""
        self._count += 1
        place = self.folder / f"run-{self._count}"
        place.mkdir()
        command = [sys.executable, "-P", "-m", "harness", "run", TESTS, "--no-blame", f"--results={place}/results.json"]
        environment = self.environment | {"STANDIN_LIMITS": limits, "PYTHONPATH": str(host.ROOT)}
        run = host.Run([*command, *words], env=environment, output=self.folder / f"output-{self._count}")
        return run, place

    def run(self, *words: str, limits: str = "") -> tuple[int, str, Path]:
        """Run it to its end; returns the exit status, the output and the directory of the report."""
        run, place = self.start(*words, limits=limits)
        try:
            status = run.process.wait(DEADLINE)
            return status, run.output.read_text(), place
        finally:
            run.close()


@pytest.fixture(scope="module")
def lab_of_hosts(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("hosts"))


def pairs(*names: str) -> list[str]:
    return [f"--pair={name}" for name in names]


def states(place: Path) -> dict[str, tuple[str, str, str]]:
    """Lane, state and the path of the evidence of each test."""
    found: list[dict[str, Any]] = json.loads((place / "results.json").read_text())["results"]
    return {each["id"]: (each["lane"], each["state"], each["artifacts"]) for each in found}


def evidence(place: Path) -> set[str]:
    """The files of all evidence, without captures: their names have the names of links."""
    files = (path.relative_to(place) for path in (place / "evidence").rglob("*") if path.suffix == ".txt")
    return {str(path) for path in files}


def test_two_hosts_give_results_of_local_run(lab_of_hosts: Lab) -> None:
    here = lab_of_hosts.here
    there = lab_of_hosts.run(*pairs(*PAIRS), "--on=ssh:a", "--on=ssh:b")
    assert there[0] == here[0] == 1, there[1]
    assert states(there[2]) == states(here[2])
    assert {state for _, state, _ in states(here[2]).values()} == {"passed", "failed"}
    assert evidence(there[2]) == evidence(here[2]) != set()
    log = (there[2] / "pytest.log").read_text()
    assert {"ssh:a", "ssh:b"} >= set(re.findall(r"^ssh:\w$", log, re.MULTILINE)) != set(), log


@pytest.mark.parametrize(
    ("limits", "lost"),
    [("b=2", ("b",)), ("a=1 b=2", ("a", "b"))],
    ids=["one host", "all hosts"],
)
def test_every_test_is_reported_once_when_hosts_die(lab_of_hosts: Lab, limits: str, lost: tuple[str, ...]) -> None:
    junit = lab_of_hosts.folder / f"junit-{len(lost)}.xml"
    status, text, place = lab_of_hosts.run(
        *pairs(*PAIRS), "--on=ssh:a", "--on=ssh:b", "--", f"--junitxml={junit}", limits=limits
    )
    assert status == 1, text
    assert states(place) == states(lab_of_hosts.here[2])
    cases = [(case.get("classname"), case.get("name")) for case in ET.parse(junit).iter("testcase")]  # noqa: S314 - ours
    assert len(cases) == len(set(cases)) == len(states(place))
    # pytest's own count: a second report of a call would be counted, too.
    [(failed, passed)] = re.findall(
        r"^=+ (\d+) failed, (\d+) passed in", (place / "pytest.log").read_text(), re.MULTILINE
    )
    assert int(failed) + int(passed) == len(cases)
    for name in lost:
        pattern = rf"ssh:{name} was lost, and gave back [1-9] tests: .*Connection to {name} closed by remote host"
        assert re.search(pattern, text), text
    assert ("tests ran on this machine" in text) == (len(lost) > 1), text


def test_host_receives_users_program_and_skips_what_it_lacks(lab_of_hosts: Lab) -> None:
    program = lab_of_hosts.mine / "wg"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m refwg "$@"\n')
    program.chmod(0o755)
    wanted = [f"--impl=mine={program}", "--like=wireguard-go", *pairs("mine~refwg", "boringtun@0.0.1~refwg")]
    status, text, place = lab_of_hosts.run(*wanted, "--on=ssh:a", "-kten_pings_are_all_answered")
    assert status == 0, text
    found = {
        name.rpartition("[")[2].split("~")[0]: state for name, (_, state, _) in states(place).items() if "[" in name
    }
    assert (found["mine"], found["boringtun@0.0.1"]) == ("passed", "skipped"), text
    assert "ssh:a: boringtun@0.0.1 is not installed" in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unreachable", "cannot connect: ssh: connect to host unreachable port 22: No route to host; this must"),
        ("old", "Python 3.11 or newer is needed, and python3 there is 3.9.2"),
        ("confined", "sandbox: no sandbox: cannot create namespaces (unshare(0x6c020000): No space left on device)"),
    ],
    ids=["unreachable", "old", "confined"],
)  # fmt: skip
def test_unusable_host_is_named_with_remedy(lab_of_hosts: Lab, name: str, reason: str) -> None:
    status, text, place = lab_of_hosts.run(*pairs(PAIRS[0]), f"--on=ssh:{name}")
    assert (status, list(place.iterdir())) == (125, []), text
    assert f"wg-interop: ssh:{name}: {reason}" in text
    assert name != "confined" or ("sysctl -w user.max_net_namespaces=" in text and "not tried" not in text)


def test_interrupted_run_stops_its_hosts(lab_of_hosts: Lab) -> None:
    reported = re.compile(r"^[1-9]\d* of \d+ tests", re.MULTILINE)
    # These tests take minutes: a host that does not stop is still there when this test looks.
    run, place = lab_of_hosts.start("selftests/netns", *pairs(PAIRS[0]), "--on=ssh:a", "--on=ssh:b")
    try:
        begun = poll_until(
            lambda: run.process.poll() is not None or reported.search(run.output.read_text()) is not None,
            bool,
            DEADLINE,
        )
        assert begun, run.output.read_text()
        namespaces = host.namespaces_of(run.pids())
        os.kill(run.process.pid, signal.SIGINT)
        assert run.process.wait(DEADLINE) == 130, run.output.read_text()
        assert not run.wait_until_gone(namespaces)
        assert states(place)
    finally:
        run.close()
