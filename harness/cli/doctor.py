"""Try everything that the lab needs on this machine, in a sandbox: `wg-interop doctor`.

The probes run in a child process in the sandbox, `python -m harness.cli.doctor`. It prints each finding as a line of
JSON. If no sandbox can be made, the child runs without one, so that one call still lists everything that is missing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from harness.cli import terminal
from harness.cli.confined import run_confined
from harness.errors import HarnessError, ProgramFailed, Unavailable
from harness.implementations.registry import Registry
from harness.install import go, rust, tools
from harness.install.packages import install_command
from harness.install.recipes import CargoProgram, GoProgram
from harness.lab.lab import Lab
from harness.net.veth import add_veth
from harness.sandbox.launch import require_sandbox
from harness.traffic.ping import must_ping

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from rich.console import Console

    from harness.implementations.manifest import Manifest
    from harness.install.recipes import Recipe
    from harness.net.netns import NetNS

SCHEMA: Final = 1
# The detail of what cannot be tried without a sandbox.
UNTRIED: Final = "not tried: no sandbox"
DEADLINE: Final = 120.0  # seconds for all probes; each probe has a shorter deadline too
TUN: Final = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x1001
_SBIN: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_COUNTING_RULES: Final = """
table inet doctor {
    chain output {
        type filter hook output priority 0
        ct state new counter comment "echo"
    }
}
"""
_QUICK_CONFIGURATION: Final = "[Interface]\nAddress = 10.0.0.1/32\nListenPort = 1\n"
_EMPTY_CAPTURE: Final = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)


class Missing(HarnessError):
    """Something that the lab needs is missing. remedy: the command that installs or enables it; empty if unknown."""

    def __init__(self, detail: str, remedy: str = "") -> None:
        super().__init__(detail)
        self.remedy = remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one probe.

    detail: one line of what was seen. needed: lane netns cannot run without it. disables: what does not run while it is
    missing. remedy: the command that fixes it. package: Debian's name of the package that contains it.
    """

    name: str
    kind: str  # ability, program or implementation
    works: bool
    detail: str
    needed: bool = True
    disables: str = ""
    remedy: str = ""
    package: str = ""

    @property
    def mark(self) -> str:
        """The word in front: what was not tried may well be there."""
        return "works" if self.works else "untried" if self.detail == UNTRIED else "MISSING"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One thing to try. attempt: returns one line of detail, or raises; other fields as in Finding."""

    name: str
    attempt: Callable[[Bench], str]
    disables: str
    kind: str = "ability"
    package: str = ""
    remedy: str = ""
    needed: bool = True

    def run(self, bench: Bench) -> Finding:
        """Try it; every error of the attempt becomes a Finding that does not work."""
        try:
            return self._finding(self.attempt(bench), works=True)
        except Missing as missing:
            return self._finding(str(missing), remedy=missing.remedy)
        except (HarnessError, OSError, ValueError, LookupError) as error:
            if str(error).startswith("no sandbox"):
                return self._absent() or self._finding(UNTRIED)
            return self._absent() or self._finding(str(error) or repr(error), remedy=self.remedy)

    def _absent(self) -> Finding | None:
        """The finding for a program that is not installed or not on PATH; None for other failures."""
        if self.kind != "program" or shutil.which(self.name):
            return None
        hidden = shutil.which(self.name, path=":".join(_SBIN))
        if hidden:
            return self._finding(f"{hidden} is not on PATH", remedy=f"export PATH=$PATH:{Path(hidden).parent}")
        return self._finding("not installed", remedy=install_command([self.package]), lacks=self.package)

    def _finding(self, detail: str, *, works: bool = False, remedy: str = "", lacks: str = "") -> Finding:
        lines = detail.strip().splitlines()
        return Finding(
            name=self.name,
            kind=self.kind,
            works=works,
            detail=" ".join(lines[:1] + lines[1:][-1:]),  # the last line of a program's output is its error
            needed=self.needed,
            disables="" if works else self.disables,
            remedy=remedy,
            package=lacks,
        )


class Bench:
    """Two nodes and a directory for the probes; the nodes are made on first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lab = Lab(directory)

    @cached_property
    def node(self) -> NetNS:
        """The node in which most probes run."""
        return self.lab.node("doctor1")

    @cached_property
    def other(self) -> NetNS:
        """A second node, for the other end of a veth pair."""
        return self.lab.node("doctor2")

    def output(self, *argv: str, stdin: str = "") -> str:
        """Run a program and return its output. It runs in the node, or outside if no node can be made."""
        try:
            return self.node.run(argv, stdin=stdin).stdout
        except Unavailable:
            done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=10, check=False)
        if done.returncode != 0:
            raise ProgramFailed(f"{argv[0]}: status {done.returncode}: {done.stderr.strip()}")
        return done.stdout


# Abilities of the kernel


def _sandbox(_: Bench) -> str:
    try:
        require_sandbox()
    except Unavailable as error:
        reason, closed, remedy = str(error).rpartition("): ")
        raise (Missing(reason + ")", remedy) if closed else Missing(remedy)) from error
    mapped = Path("/proc/self/uid_map").read_text().split()[2] == "1"
    return "with a user namespace of its own" if mapped else "as root"


def _fresh_proc(_: Bench) -> str:
    require_sandbox()
    seen = os.readlink("/proc/self")  # noqa: PTH115 - Path would make a path of a number
    if seen != str(os.getpid()):
        raise Missing(f"/proc belongs to another PID namespace: /proc/self is {seen}, expected {os.getpid()}")
    return "shows only the processes of the sandbox"


def _nodes(bench: Bench) -> str:
    return f"made {bench.node.name} and {bench.other.name}"


def _veth(bench: Bench) -> str:
    add_veth(bench.node, "veth1", bench.other, "veth2").close()
    return "made a pair between two nodes"


def _tun(bench: Bench) -> str:
    require_sandbox()
    try:
        # tun_chr_open: the device belongs to the network namespace in which /dev/net/tun was opened.
        device = bench.node.thread.call(os.open, TUN, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _tun_missing(error) from error
    try:
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"doctor0", _IFF_TUN_NO_PI))
        bench.node.index("doctor0")
    finally:
        os.close(device)
    return "opened it and made a TUN device"


def _tun_missing(error: OSError) -> Missing:
    if error.errno in {errno.EACCES, errno.EPERM} and TUN.exists():
        mode = stat.S_IMODE(TUN.stat().st_mode)
        return Missing(f"{error.strerror}, its mode is {mode:04o}", f"as root: chmod 0666 {TUN}")
    if error.errno == errno.ENOENT:
        make = f"mkdir -p {TUN.parent} && mknod -m 0666 {TUN} c 10 200"
        return Missing("no such device file", f"as root: {make} (for a container: --device {TUN})")
    return Missing(str(error.strerror), "as root: modprobe tun")


def _icmp(bench: Bench) -> str:
    must_ping(bench.node, "127.0.0.1")
    return "an echo request from a raw socket got its reply"


def _conntrack(bench: Bench) -> str:
    # Loading a rule with `ct state` makes the kernel load nf_conntrack, where modules can be loaded.
    bench.node.nft(_COUNTING_RULES)
    bench.node.sysctl("net.netfilter.nf_conntrack_udp_timeout", 2)
    return "its timeouts can be set"


# Programs


def _ip(bench: Bench) -> str:
    (link,) = json.loads(bench.output("ip", "-j", "link", "show", "lo"))
    return f"{bench.output('ip', '-V').strip()}; sees {link['ifname']}"


def _nft(bench: Bench) -> str:
    bench.node.nft(_COUNTING_RULES)
    with bench.node.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"", ("127.0.0.1", 9))
    counted = bench.node.nft_counters()["echo"]
    if counted == 0:
        raise Missing("the counter of a rule is 0 after a packet that matches the rule")
    return "loaded a rule and read its counter"


def _wg(bench: Bench) -> str:
    bench.output("wg", "pubkey", stdin=bench.output("wg", "genkey"))
    bench.output("wg", "show", "interfaces")
    return bench.output("wg", "--version").partition(" - ")[0]


def _wg_quick(bench: Bench) -> str:
    # Without root's rights wg-quick starts itself again by sudo.
    require_sandbox()
    configuration = bench.directory / "doctor.conf"
    configuration.touch(mode=0o600)
    configuration.write_text(_QUICK_CONFIGURATION)
    bench.output("wg-quick", "strip", str(configuration))
    return "stripped a configuration"


def _ping(bench: Bench) -> str:
    bench.node.run(["ping", "-c1", "-W2", "127.0.0.1"])
    return "got its reply"


def _iperf3(bench: Bench) -> str:
    server = bench.node.spawn(["iperf3", "-s", "-1", "--forceflush"], log=bench.directory / "iperf3.log")
    try:
        server.says("Server listening")
        bench.node.run(["iperf3", "-c", "127.0.0.1", "-n", "64K"])
    finally:
        server.kill()
        server.close()
    return "sent 64 KiB over TCP"


def _qemu(bench: Bench) -> str:
    command = ("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-monitor", "stdio")
    return bench.output(*command, stdin="quit\n").partition(" monitor")[0]


def _tshark(bench: Bench) -> str:
    capture = bench.directory / "empty.pcap"
    capture.write_bytes(_EMPTY_CAPTURE)
    bench.output("tshark", "-r", str(capture))
    return "read a capture"


def _go(_: Bench) -> str:
    wanted = _newest(recipe.go for recipe in _recipes() if isinstance(recipe, GoProgram))
    found = go.find_go(wanted)
    if found is None:
        raise _no_compiler(wanted)
    return f"{found} {tools.version_text(go.go_version(found) or ())}"


def _rust(_: Bench) -> str:
    wanted = _newest(recipe.rust for recipe in _recipes() if isinstance(recipe, CargoProgram))
    found = rust.find_rust(wanted)
    if found is None:
        raise _no_compiler(wanted)
    return f"{found.rustc} {tools.version_text(found.version() or ())}"


def _recipes() -> Iterator[Recipe]:
    """The install recipes of all known implementations that have one."""
    return (manifest.install for manifest in Registry().known.values() if manifest.install is not None)


def _newest(versions: Iterable[str]) -> tools.Version:
    return max(map(tools.parse_version, versions), default=())


def _no_compiler(wanted: tools.Version) -> Missing:
    return Missing(f"version {tools.version_text(wanted)} or newer is neither on PATH nor in the cache")


# Implementations


def _implementation(manifest: Manifest, bench: Bench) -> str:
    if manifest.kind == "kernel":
        # Without a sandbox, the probe would make a link in this machine's own network namespace.
        require_sandbox()
    reason = manifest.why_unavailable()
    if reason is not None:
        detail, _, remedy = reason.rpartition("; ")
        raise Missing(detail, remedy.removeprefix("to install it: ").removeprefix("to try again: "))
    lab = Lab(bench.directory / manifest.name)
    try:
        node = lab.node("doctor3")
        start = time.monotonic()
        lab.interface("wg0", manifest, node).get()
        seconds = time.monotonic() - start
    finally:
        lab.close()
    where = f"{manifest.find_program()}, " if manifest.kind == "uapi" and manifest.needs_program else ""
    return f"{manifest.version()}, {where}up in {seconds * 1000:.0f} ms"


def _program(name: str, package: str, attempt: Callable[[Bench], str], disables: str, *, needed: bool = False) -> Probe:
    return Probe(name=name, kind="program", attempt=attempt, disables=disables, package=package, needed=needed)


_LANE: Final = "the netns lane"
_FIREWALL: Final = "topology nat and all tests with a firewall"
_PROBES: Final = (
    Probe(name="sandbox", attempt=_sandbox, disables=_LANE),
    Probe(name="fresh /proc", attempt=_fresh_proc, disables=_LANE),
    Probe(name="network namespaces", attempt=_nodes, disables=_LANE),
    Probe(name="veth", attempt=_veth, disables=_LANE, remedy="as root: modprobe veth"),
    Probe(name=str(TUN), attempt=_tun, disables="every userspace implementation", needed=False),
    Probe(name="raw ICMP socket", attempt=_icmp, disables=_LANE),
    _program("ip", "iproute2", _ip, _LANE, needed=True),
    _program("nft", "nftables", _nft, _FIREWALL, needed=True),
    Probe(name="conntrack", attempt=_conntrack, disables="topology nat", remedy="as root: modprobe nf_conntrack"),
    _program("wg", "wireguard-tools", _wg, _LANE, needed=True),
    _program("wg-quick", "wireguard-tools", _wg_quick, "tests of wg-quick"),
    _program("ping", "iputils-ping", _ping, "tests that start ping(8)"),
    _program("iperf3", "iperf3", _iperf3, "benchmarks and load tests"),
    _program("qemu-system-x86_64", "qemu-system-x86", _qemu, "the vm and warp lanes"),
    _program("tshark", "tshark", _tshark, "tests that open captures in Wireshark"),
    Probe(name="go", attempt=_go, disables="nothing: wg-interop install downloads Go if needed", needed=False),
    Probe(
        name="rust",
        attempt=_rust,
        disables="nothing: wg-interop install downloads Debian's Rust if needed",
        needed=False,
    ),
)


def _probes() -> Iterator[Probe]:
    yield from _PROBES
    for manifest in Registry().known.values():
        yield Probe(
            name=manifest.name,
            kind="implementation",
            attempt=partial(_implementation, manifest),
            disables=f"pairs with {manifest.name}",
            needed=False,
        )


def inside() -> None:
    """Run all probes and print their findings as lines of JSON; the child in the sandbox calls this."""
    with tempfile.TemporaryDirectory(prefix="wg-interop-doctor-") as scratch:
        bench = Bench(Path(scratch))
        for probe in _probes():
            print(json.dumps(asdict(probe.run(bench))), flush=True)  # noqa: T201 - to the parent
        bench.lab.close()


# Outside


def findings() -> Generator[Finding]:
    """Run the probes in a sandbox and yield each finding as it arrives.

    Raises HarnessError if the probes take longer than DEADLINE or end with another status than 0.
    """
    for finding in run_confined("doctor", "harness.cli.doctor", deadline=DEADLINE):
        yield Finding(**finding)


def is_able(found: Sequence[Finding]) -> bool:
    """Return whether lane netns can run: all that it needs works, and at least one implementation works."""
    return all(f.works for f in found if f.needed) and any(f.works for f in found if f.kind == "implementation")


def examine(stream: TextIO, *, as_json: bool) -> int:
    """Run all probes and print the findings, as text or as JSON; returns the exit status."""
    out = terminal.console(stream)
    found: list[Finding] = []
    if not as_json:
        terminal.line(out, f"{platform.system()} {platform.release()} {platform.machine()}, uid {os.geteuid()}")
    for finding in findings():
        found.append(finding)
        if not as_json:
            print_finding(out, finding)
    if as_json:
        document = {"schema": SCHEMA, "netns": is_able(found), "findings": [asdict(f) for f in found]}
        print(json.dumps(document, indent=1), file=stream)
    else:
        print_conclusion(out, found, able=is_able(found))
    return terminal.OK if is_able(found) else terminal.COULD_NOT


def print_finding(out: Console, found: Finding) -> None:
    """Print one finding, with what it disables and the command that fixes it."""
    style = "green" if found.works else "bold red" if found.needed else "yellow"
    terminal.line(out, f"{found.mark:<8} {found.name:<20} {found.detail}", style)
    if found.disables and found.mark == "MISSING":
        terminal.line(out, f"{'':<29} disables: {found.disables}")
    if found.remedy:
        terminal.line(out, f"{'':<29} to fix: {found.remedy}")


def print_conclusion(out: Console, found: Sequence[Finding], *, able: bool) -> None:
    """Print one command that installs all missing packages, and whether lane netns can run."""
    packages = sorted({each.package for each in found if each.package})
    if len(packages) > 1:
        terminal.line(out, f"to install all of them: {install_command(packages)}")
    usable = [each.name for each in found if each.kind == "implementation" and each.works]
    lacking = [each.name for each in found if each.needed and each.mark == "MISSING"]
    if untried := [each.name for each in found if each.mark == "untried"]:
        terminal.line(out, f"{UNTRIED}: {', '.join(untried)}", "yellow")
    if able:
        terminal.line(out, f"The netns lane can run, with {', '.join(usable)}.", "bold green")
    else:
        terminal.line(
            out, f"The netns lane cannot run without {', '.join(lacking) or 'an implementation'}.", "bold red"
        )


if __name__ == "__main__":
    inside()
