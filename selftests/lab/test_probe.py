"""Check that `wg-interop probe` finds in programs the capabilities of their manifests."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import Registry
from harness.implementations.manifest import CAPABILITIES, load_manifest
from harness.lab.probes import PROBES, NothingShownError, probe
from selftests.support import host

if TYPE_CHECKING:
    from harness import Lab

SABOTAGE = Path(__file__).parents[1] / "faults" / "sabotage"
HONEST = "wireguard-go-debian"


def call(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WG_INTEROP", "PYTEST"))}
    command = [sys.executable, "-m", "harness", "probe", *arguments]
    # The saboteur needs the packages of this interpreter.
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = clean | {"PATH": search} | env
    return subprocess.run(command, cwd=host.ROOT, env=env, capture_output=True, text=True, timeout=100, check=False)


def installed(name: str) -> Path:
    manifest = Registry().get(name)
    if reason := manifest.why_unavailable():
        pytest.skip(reason)
    return manifest.find_program()


def test_capabilities_have_probe_each() -> None:
    assert PROBES.keys() == CAPABILITIES.keys()


def test_probed_manifest_of_refwg_declares_all_capabilities(tmp_path: Path) -> None:
    out = tmp_path / "out.toml"
    done = call("--impl", "refwg", "-o", str(out))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert load_manifest(out).capabilities == Registry().get("refwg").capabilities == CAPABILITIES.keys()
    assert load_manifest(out).argv("wg0") == Registry().get("refwg").argv("wg0")
    lines = [line.split()[:2] for line in done.stderr.splitlines()]
    assert [name for word, name in lines if word == "has"] == list(PROBES)
    assert "It lacks" not in out.read_text()


# The newest wireguard-go declares sticky-source, but has lost it: see its known failures (RT-11).
@pytest.mark.parametrize(("name", "broken"), [("wireguard-go", {"sticky-source"}), (HONEST, set())])
def test_probed_manifest_is_that_of_known_program(tmp_path: Path, name: str, broken: set[str]) -> None:
    program = installed(name)
    done = call("--impl", f"theirs={program}")
    assert done.returncode == 0, done.stderr
    (tmp_path / "theirs.toml").write_text(done.stdout)
    theirs = load_manifest(tmp_path / "theirs.toml")
    assert theirs.capabilities == Registry().get(name).capabilities - broken
    assert (theirs.name, theirs.find_program()) == ("theirs", program)
    lines = done.stdout.splitlines()
    after = lines[lines.index(f"# icmp-unreachable ({CAPABILITIES['icmp-unreachable']})") + 1]
    assert after == "#     a datagram that no peer owns was dropped, and no error came within 1 s"


def test_capability_that_is_sabotaged_is_lacking(tmp_path: Path) -> None:
    out = tmp_path / "out.toml"
    out.write_text("keep me")
    given = ["--impl-manifest", str(SABOTAGE / "stuck-port.toml"), "-o", str(out)]
    refused = call(*given)
    assert (refused.returncode, out.read_text()) == (2, "keep me")
    assert f"{out} exists; to overwrite it: --force" in refused.stderr
    done = call(*given, "--force", SABOTAGED_PROGRAM=str(installed(HONEST)))
    assert done.returncode == 0, done.stderr
    lacking = CAPABILITIES.keys() - load_manifest(out).capabilities
    assert lacking == CAPABILITIES.keys() - Registry().get(HONEST).capabilities | {"listen-port-change"}
    seen = "given the listen port 9998 it reports 1; pings to that port: 192.168.241.1: 0 of 1 answered"
    assert seen in out.read_text()


DROPPING = """
table inet sabotage {{
    chain output {{
        type filter hook output priority -10
        {rule}
    }}
}}
"""


@pytest.mark.parametrize(
    ("capability", "rule", "seen"),
    [
        ("ipv6-underlay", "meta nfproto ipv6 udp dport {1, 2} drop", "0 of 1 answered"),
        ("fwmark", "udp sport 1 meta mark set 0", "0 of 1 datagrams were marked"),
        ("persistent-keepalive", "udp sport 1 udp length 40 drop", "with an interval of 1 s it sent 0 keepalives"),
        ("icmp-unreachable", "icmp type destination-unreachable drop", "no error came within 1 s"),
    ],
)
def test_capability_that_firewall_takes_is_seen_as_lacking(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capability: str, rule: str, seen: str
) -> None:
    refwg = Registry().get("refwg")
    start = ("/bin/sh", str(SABOTAGE / "firewalled.sh"), "-m", "refwg", "-f", "{interface}")
    env = refwg.env | {"SABOTAGE": DROPPING.format(rule=rule), "SABOTAGED_PROGRAM": sys.executable}
    monkeypatch.chdir(host.ROOT)
    broken = replace(refwg, command=start, env=env, key_log=())
    observed = probe(lab.directory / "broken", 0, broken, refwg, capability)
    assert (observed.works, observed.complaints) == (False, ())
    assert seen in observed.seen


def test_mutant_that_does_not_roam_is_seen_as_lacking_it(lab: Lab) -> None:
    registry = Registry()
    observed = probe(lab.directory / "mutant", 0, registry.get("refwg+no-roaming"), registry.get("refwg"), "roaming")
    assert not observed.works
    assert "127.0.0.1:9998; it reports the endpoint 127.0.0.1:2" in observed.seen


def test_nothing_is_shown_when_tunnel_of_probe_is_dead(lab: Lab) -> None:
    registry = Registry()
    dead, refwg = registry.get("refwg+wrong-mac1"), registry.get("refwg")
    with pytest.raises(NothingShownError, match="precondition failed: the program makes a tunnel over IPv4: "):
        probe(lab.directory / "dead", 0, dead, refwg, "fwmark")


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo no tun; exit 1", "dead failed its smoke test, so no capability can be tried: dead: "),
        ("[ $1 = --version ] || exec tail -f /dev/null", "waited 3 s for dead to make /run/wireguard/wg0.sock"),
    ],
)
def test_dead_program_ends_probe_with_reason(tmp_path: Path, script: str, complaint: str) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    done = call("--impl", f"dead={program}", "-o", str(tmp_path / "out.toml"), "--timeout-scale", "0.2")
    assert (done.returncode, done.stdout) == (1, "")
    assert complaint in done.stderr
    assert not (tmp_path / "out.toml").exists()


def test_unhandshaking_program_ends_probe_with_reason() -> None:
    done = call("--impl", "refwg+wrong-mac1")
    assert (done.returncode, done.stdout) == (1, "")
    complaint = "refwg+wrong-mac1 made no tunnel as initiator, with refwg as responder, so no capability can be tried"
    assert complaint in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        ([], 2, "name one program: --impl NAME=PATH, or --impl-manifest FILE"),
        (["--impl", "refwg", "--impl-manifest", "x.toml"], 2, "name one program: --impl NAME=PATH, or"),
        (["--impl", "kernel"], 2, "kernel is not a program"),
        (["--impl", "nope"], 2, "unknown implementation 'nope'"),
        (["--impl", "refwg", "-o", "/nowhere/out.toml"], 2, "-o /nowhere/out.toml: cannot write to /nowhere"),
        (["--impl-manifest", str(SABOTAGE / "nowhere.toml")], 2, "nowhere.toml: No such file or directory"),
    ],
)
def test_wrong_probe_command_is_refused(arguments: list[str], status: int, complaint: str) -> None:
    done = call(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
