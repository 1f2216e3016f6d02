"""Read manifests: how a WireGuard program is found and started, and what it can do.

A manifest is a TOML file. docs/manifests.md explains every key; `wg-interop doctor` lists the known implementations.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from harness.errors import ControlError, HarnessError, Unavailable, UsageError
from harness.install import installer
from harness.net.rtnetlink import Rtnetlink
from harness.sandbox.process import program_environment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.install.recipes import Recipe
    from harness.tables import Table

KINDS: Final = ("kernel", "uapi")
_MTU: Final = range(68, 65536)  # what a TUN device takes
_RUN: Final = Path("/run")
_MAX_STOP_AFTER: Final = 60  # seconds; a test has 120 in all
_VERSION: Final = re.compile(r"\bv?(\d+\.\d[\w.+-]*)")
_KERNEL_VERSION: Final = re.compile(r"(\d+)\.(\d+)")

# Abilities beyond the core of the protocol, by the name that a manifest declares. A test that needs one has the marker
# `capability(NAME)`; for a program that does not declare it the result is `unsupported`.
CAPABILITIES: Final = {
    "roaming": "follows a peer that sends authentic packets from a new address",
    "sticky-source": "answers from the address that was addressed",
    "ipv6-underlay": "sends and receives over IPv6",
    "listen-port-change": "changes its listen port while it runs",
    "persistent-keepalive": "keeps a NAT mapping open",
    "remove-allowed-ip": "removes a single allowed ip on request (Linux 6.16, wireguard-go of May 2025)",
    "icmp-unreachable": "answers packets that no peer owns with ICMP",
    "icmp-through-nat": "these ICMP errors also reach a sender behind a NAT",
    "fwmark": "marks its datagrams",
    "update-peer": "changes the settings of an existing peer",
    "peer-before-key": "accepts peers before it has a private key",
    "bounded-loop": "its own datagram, routed back into the tunnel to the same peer, does not loop forever",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Manifest:
    """One implementation as its manifest describes it."""

    name: str
    kind: Literal["kernel", "uapi"]
    title: str = ""
    program: Path | None = None
    """The program, if it was given by its path; None if it is installed, or if the command needs none."""
    command: tuple[str, ...] = ("{program}", "-f", "{interface}")
    """The command that starts it in the foreground; `{program}`, `{interface}` and `{python}` (ours) are filled in."""
    version_command: tuple[str, ...] = ("{program}", "--version")
    """The command that prints its version."""
    preload: tuple[str, ...] = ()
    """For a program in Python, the modules that the lab imports once for all its starts; empty: none."""
    env: dict[str, str] = field(default_factory=dict)
    capabilities: frozenset[str] = frozenset()
    """The declared names of CAPABILITIES."""
    control_socket: str = "/run/wireguard/{interface}.sock"
    """The socket on which it serves UAPI: a path below a directory of /run; `{interface}` is filled in."""
    complaints: tuple[str, ...] = ()
    """Regular expressions that no line of its log may match."""
    stop_after: float = 2.0
    """Seconds, scaled, after which it must have ended when it was sent SIGTERM."""
    descriptors: int = 16
    """The number of descriptors that it may gain during a test."""
    threads: int = 32
    """The number of threads that it may gain during a test."""
    mtu: int | None = None
    """The MTU that the lab sets, for a program that leaves the interface at the 1500 of a TUN device; None: none."""
    install: Recipe | None = None
    """The recipe of its installation; None if its manifest has no table [install]."""
    variant: tuple[str, ...] = ()
    """Words added to the command for `NAME+VARIANT`; `{variant}` is filled in. Empty: it has no variants."""
    variant_env: dict[str, str] = field(default_factory=dict)
    """Variables added to the environment for such a variant."""
    named_variants: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Words added to the command for the variants of these names, in place of `variant` and `variant_env`."""
    key_log: tuple[str, ...] = ()
    """Words added to the command so that it logs its keys; `{file}` is filled in. Empty: it cannot."""
    source: Path | None = None
    """The manifest's file; None for a program without one."""
    base: str = ""
    """For a variant, the name before the `+`; for a version, the name before the `@`; otherwise empty."""
    like: Manifest | None = None
    """For a program given by its path, the manifest that `--like` names for it."""
    expectations: Path | None = None
    """The file of its known failures; None for those in selftests/expectations/."""

    def __repr__(self) -> str:
        return f"Manifest({self.name})"

    def find_program(self) -> Path:
        """Return the path of the program; raises Unavailable, with the remedy, if there is none."""
        if self.program is not None:
            return self.program
        if self.install is None:
            where = f"set program.path in {self.source}, or " if self.source else ""
            raise Unavailable(f"{self.name} names no program; {where}--impl {self.name}=PATH")
        # All variants are one program; versions are not, and lie side by side.
        base = self.base or self.name
        found = self.install.installed(base)
        if found is None:
            base = self.name if "@" in self.name else base
            why = installer.why_not_installed(base)
            said = f"could not be installed ({why})" if why else "is not installed"
            again = "to try again" if why else "to install it"
            known = self.source is None or self.source.parent == installer.MANIFESTS
            what = base if known else shlex.quote(str(self.source))
            raise Unavailable(f"{self.name} {said}; {again}: wg-interop install {what}")
        return found

    def argv(self, interface: str, key_log: Path | None = None) -> list[str]:
        """Return the command that serves the interface in the foreground; key_log: the file for its keys, if any."""
        revealing = [word.replace("{file}", str(key_log)) for word in self.key_log] if key_log is not None else []
        return self._fill(self.command, interface) + revealing

    def socket_path(self, interface: str) -> Path:
        """Return the path of this interface's control socket."""
        return Path(self.control_socket.format(interface=interface))

    def _fill(self, words: tuple[str, ...], interface: str = "") -> list[str]:
        program = str(self.find_program()) if self.needs_program else ""
        return [word.format(program=program, interface=interface, python=sys.executable) for word in words]

    @property
    def needs_program(self) -> bool:
        """Whether the command names the program, so that its file must exist."""
        return any("{program}" in word for word in self.command)

    @property
    def like_name(self) -> str:
        """The name of the manifest that `--like` names for it; empty without."""
        return self.like.name if self.like is not None else ""

    def given_as(self, name: str, program: Path) -> Manifest:
        """Return a copy of this manifest for the user's own program, under another name."""
        given = replace(self, name=name, program=program)
        if not self.needs_program:
            given = replace(
                given,
                command=GENERIC.command,
                version_command=GENERIC.version_command,
                key_log=GENERIC.key_log,
                preload=GENERIC.preload,
            )
        return given

    def at(self, version: str) -> Manifest:
        """Return the manifest of NAME@VERSION; raises UsageError if the lab cannot install other versions of it."""
        asked = f"{self.name}@{version}"
        if self.kind == "kernel":
            raise UsageError(f"{asked}: {self.name} is not a program; for another kernel use --kernel {version}")
        if not self.needs_program:
            raise UsageError(
                f"{asked}: {self.name} is a part of this project, so it has the version of this checkout alone; "
                f"for a program of your own: --impl {asked}=PATH"
            )
        name, recipe = installer.at_version(self.name, self.install, version)
        return replace(self, name=name, base=self.name, install=recipe, program=None)

    def has_variant(self, variant: str) -> bool:
        """Whether `varied` knows these names, with a `+` between; a manifest with `variant` takes every name."""
        return bool(self.variant) or all(name in self.named_variants for name in variant.split("+"))

    def varied(self, variant: str) -> Manifest:
        """Return the variant of this name, such as `refwg+simple`, `refwg+no-clamp` or `refwg+no-clamp+batch`."""
        words: list[str] = []
        env = dict(self.env)
        for name in variant.split("+"):
            if name in self.named_variants:
                words += self.named_variants[name]
            else:
                words += [word.replace("{variant}", name) for word in self.variant]
                env |= self.variant_env
        return replace(self, name=f"{self.name}+{variant}", base=self.name, command=(*self.command, *words), env=env)

    def why_unavailable(self) -> str | None:
        """Return why it cannot be tested on this machine, with the remedy; None if it can."""
        try:
            if self.kind == "uapi":
                self.argv("")
            elif not kernel_has_wireguard():
                raise Unavailable(
                    "this kernel has no WireGuard; run where `modprobe wireguard` works, or in the vm lane"
                )
        except HarnessError as error:
            return str(error)
        return None

    def version(self) -> str:
        """Return its version, from the version command or uname(2); `unknown` if none was printed within 10 s."""
        if self.kind == "kernel":
            return os.uname().release
        return _program_version(tuple(self._fill(self.version_command)))


@cache
def _program_version(argv: tuple[str, ...]) -> str:
    try:
        answer = subprocess.run(
            argv, capture_output=True, text=True, timeout=10, check=False, env=program_environment()
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = _VERSION.search(answer.stdout + answer.stderr)
    return found[1] if found else "unknown"


@cache
def kernel_has_wireguard() -> bool:
    """Whether the running kernel can create a WireGuard interface; tries it in this process's network namespace."""
    with closing(Rtnetlink(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))) as netlink:
        try:
            netlink.add_link("wgprobe", "wireguard")
        except ControlError:
            return False
        netlink.delete_link(socket.if_nametoindex("wgprobe"))
    return True


GENERIC: Final = Manifest(name="-", kind="uapi")


def load_manifest(path: Path) -> Manifest:
    """Read a manifest; for a mistake, raises a UsageError of one line that names the file and the key."""
    top = installer.read_manifest(path)
    kind = _take_kind(top)
    program, watch, variant = top.table("program"), top.table("watch"), top.table("variant")
    command = _take_command(program, "command", GENERIC.command)
    manifest = Manifest(
        name=installer.take_name(top),
        kind=kind,
        title=top.text("title", ""),
        capabilities=_take_capabilities(top) | _take_capabilities_since(top, kind),
        install=installer.take_recipe(top),
        program=_take_program(program, path),
        command=command,
        version_command=_take_command(program, "version", GENERIC.version_command),
        preload=_take_preload(program, command),
        env=program.strings("env", {}),
        mtu=_take_mtu(program),
        variant=_take_variant(variant),
        variant_env=variant.strings("env", {}),
        named_variants=_take_named_variants(variant),
        key_log=_take_key_log(program),
        control_socket=_take_control_socket(program),
        complaints=_take_complaints(watch),
        descriptors=watch.number("descriptors", GENERIC.descriptors),
        threads=watch.number("threads", GENERIC.threads),
        stop_after=_take_stop_after(watch),
        source=path,
        expectations=_take_expectations(top, path),
    )
    for table in (top, program, watch, variant):
        table.refuse_rest()
    return manifest


def _take_kind(top: Table) -> Literal["kernel", "uapi"]:
    kind = top.take("kind")
    if kind not in KINDS:
        raise top.wrong(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    return "kernel" if kind == "kernel" else "uapi"


def _take_capabilities(top: Table) -> frozenset[str]:
    return _known_capabilities(top, top.words("capabilities", ()))


def _take_capabilities_since(top: Table, kind: str) -> frozenset[str]:
    """Return the capabilities that the running kernel is new enough for; for kind `kernel` only."""
    since = top.table("capabilities_since")
    names = since.rest()
    if names and kind != "kernel":
        raise top.wrong('capabilities_since is for kind "kernel": a program\'s go into capabilities')
    return frozenset(name for name in _known_capabilities(top, names) if _is_reached(since, name))


def _is_reached(since: Table, name: str) -> bool:
    version = since.take(name)
    wanted = _KERNEL_VERSION.fullmatch(version) if isinstance(version, str) else None
    if wanted is None:
        raise since.wrong(f'{since.title}{name} must be a kernel version such as "6.16", not {version!r}')
    running = _KERNEL_VERSION.match(os.uname().release)
    return running is not None and _numbers(running) >= _numbers(wanted)


def _known_capabilities(top: Table, names: Iterable[str]) -> frozenset[str]:
    known = frozenset(names)
    for name in sorted(known - CAPABILITIES.keys()):
        raise top.wrong(f"unknown capability {name!r}; there are: {', '.join(sorted(CAPABILITIES))}")
    return known


def _take_command(program: Table, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    words = program.words(key, default)
    if not words:
        raise program.wrong(f"program.{key} must not be empty")
    _check_fillable(program, key, words, "{program}, {interface} and {python}")
    return words


def _take_variant(variant: Table) -> tuple[str, ...]:
    words = variant.words("args", ())
    # `{variant}` is replaced first, and the rest when the whole command is filled in.
    named = [word.replace("{variant}", "") for word in words]
    _check_fillable(variant, "args", named, "{variant}, {program}, {interface} and {python}")
    return words


def _take_named_variants(variant: Table) -> dict[str, tuple[str, ...]]:
    """Return the words of each variant in the table [variant.named]."""
    named = variant.table("named")
    variants = {}
    for name in named.rest():
        if not installer.NAME.fullmatch(name):
            raise named.wrong(f"{named.title}{name}: a name is lower-case letters, digits and . _ + -")
        variants[name] = named.words(name)
        _check_fillable(named, name, variants[name], "{program}, {interface} and {python}")
    return variants


def _check_fillable(table: Table, key: str, words: Iterable[str], names: str) -> None:
    try:
        [word.format(program="", interface="", python="") for word in words]
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise table.wrong(f"{table.title}{key}: only {names} are filled in: {error}") from error


def _take_key_log(program: Table) -> tuple[str, ...]:
    words = program.words("key_log", ())
    if words and not any("{file}" in word for word in words):
        raise program.wrong('program.key_log: {file} is missing: key_log = ["--keylog", "{file}"]')
    return words


def _take_preload(program: Table, command: tuple[str, ...]) -> tuple[str, ...]:
    modules = program.words("preload", ())
    if modules and command[:2] != ("{python}", "-m"):
        raise program.wrong('program.preload is for a command that begins with "{python}", "-m"')
    return modules


def _take_control_socket(program: Table) -> str:
    """Take the template of the control socket; the lab can make directories private below /run only."""
    text = program.text("control_socket", GENERIC.control_socket)
    wrong = program.wrong(
        f"program.control_socket must be like /run/DIRECTORY/{{interface}}.sock, not {text!r}: a path in a "
        "directory of /run other than netns, and only {interface} is filled in"
    )
    try:
        path = Path(text.format(interface="wg0"))
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise wrong from error
    if path.is_relative_to("/var/run"):
        path = _RUN / path.relative_to("/var/run")
        text = text.removeprefix("/var")
    if "{interface}" not in text or not path.is_relative_to(_RUN) or ".." in path.parts:
        raise wrong
    top, *below = path.relative_to(_RUN).parts
    if not below or top == "netns" or "{" in text.split("/")[2]:
        raise wrong
    return text


def _take_stop_after(watch: Table) -> float:
    seconds = watch.decimal("stop_after", GENERIC.stop_after)
    if not 0 < seconds <= _MAX_STOP_AFTER:
        raise watch.wrong(f"watch.stop_after must be more than 0 and at most {_MAX_STOP_AFTER} seconds, not {seconds}")
    return seconds


def _take_mtu(program: Table) -> int | None:
    if "mtu" not in program:
        return None
    mtu = program.number("mtu")
    if mtu not in _MTU:
        raise program.wrong(f"program.mtu must be from {_MTU.start} to {_MTU.stop - 1}, not {mtu}")
    return mtu


def _take_program(program: Table, manifest: Path) -> Path | None:
    text = program.text("path", "")
    if not text:
        return None
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise program.wrong(f"program.path: {text}: {error}") from error
    return executable(manifest.parent / path, program.name)


def _take_expectations(top: Table, manifest: Path) -> Path | None:
    if not (text := top.text("expectations", "")):
        return None
    path = (manifest.parent / text).absolute()
    if not path.is_file():
        raise top.wrong(f"expectations: no file {path}")
    return path


def _take_complaints(watch: Table) -> tuple[str, ...]:
    patterns = watch.words("complaints", ())
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise watch.wrong(f"watch.complaints: {pattern!r}: {error}") from error
    return patterns


def _numbers(version: re.Match[str]) -> tuple[int, int]:
    return int(version[1]), int(version[2])


def executable(path: Path, what: str) -> Path:
    """Return the absolute path of a program; UsageError, beginning with `what`, if it cannot be executed."""
    resolved = path.expanduser().absolute()
    if not resolved.is_file():
        raise UsageError(f"{what}: no program {resolved}")
    if not os.access(resolved, os.X_OK):
        raise UsageError(f"{what}: {resolved} is not executable: chmod +x {resolved}")
    return resolved
