"""Read manifests: how a WireGuard program is found and started, and what it can do.

A manifest is a TOML file. `wg-interop doctor` lists those that are known; docs/manifests.md explains every key.
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
from typing import TYPE_CHECKING, Any, Final, Literal

from harness.errors import ControlError, HarnessError, Unavailable, UsageError
from harness.install import installer, recipes
from harness.net.rtnetlink import Rtnetlink
from harness.sandbox.process import program_environment

if TYPE_CHECKING:
    from collections.abc import Iterable

KINDS: Final = ("kernel", "uapi")
_MTU: Final = range(68, 65536)  # what a TUN device takes
_VERSION: Final = re.compile(r"\bv?(\d+\.\d[\w.+-]*)")
_KERNEL_VERSION: Final = re.compile(r"(\d+)\.(\d+)")

# What a program may declare that it can do beyond the core of the protocol. Tests that need one carry the marker
# `capability(NAME)` and are reported as unsupported for a program that does not declare it.
CAPABILITIES: Final = {
    "roaming": "follows a peer that sends authentic packets from a new address",
    "sticky-source": "answers from the address that was addressed",
    "ipv6-underlay": "sends and receives over IPv6",
    "listen-port-change": "changes its listen port while it runs",
    "persistent-keepalive": "keeps a NAT mapping open",
    "remove-allowed-ip": "removes a single allowed ip on request (Linux 6.16, wireguard-go of May 2025)",
    "icmp-unreachable": "answers packets that no peer owns with ICMP",
    "icmp-through-nat": "these ICMP errors find their way back through a NAT that the packet came by",
    "fwmark": "marks its datagrams",
    "update-peer": "changes a peer that it has already",
    "peer-before-key": "takes peers before it has a private key",
    "bounded-loop": "a datagram of its own that comes back to be sent to the same peer does not go round for ever",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Manifest:
    """One implementation as its manifest describes it.

    command: how to start it in the foreground; `{program}`, `{interface}`, `{python}` (this interpreter) are filled in;
    a command without `{program}` needs none. version_command: prints its
    version. complaints: patterns that its log must not match. descriptors, threads: by how many it may grow in a test.
    """

    name: str
    kind: Literal["kernel", "uapi"]
    title: str = ""
    program: Path | None = None
    command: tuple[str, ...] = ("{program}", "-f", "{interface}")
    version_command: tuple[str, ...] = ("{program}", "--version")
    env: dict[str, str] = field(default_factory=dict)
    capabilities: frozenset[str] = frozenset()
    complaints: tuple[str, ...] = ()
    descriptors: int = 16
    threads: int = 32
    mtu: int | None = None
    """What the lab sets the interface's MTU to, for a program that leaves it at the 1500 of a TUN device."""
    install: dict[str, Any] = field(default_factory=dict)
    variant: tuple[str, ...] = ()
    """What is added to the command for a variant, `NAME+VARIANT`; `{variant}` is filled in. Empty: it has none."""
    variant_env: dict[str, str] = field(default_factory=dict)
    key_log: tuple[str, ...] = ()
    """What is added to the command so that it reveals its keys; `{file}` is filled in. Empty: it does not."""
    source: Path | None = None
    base: str = ""
    """What a variant is a variant of; empty for any other."""

    def find_program(self) -> Path:
        """Where the program is; raises Unavailable with the remedy if it is nowhere."""
        if self.program is not None:
            return self.program
        if not self.install:
            where = f"set program.path in {self.source}, or " if self.source else ""
            raise Unavailable(f"{self.name} names no program; {where}--impl {self.name}=PATH")
        # Every variant is the same program.
        base = self.base or self.name
        found = installer.installed(base, self.install)
        if found is None:
            why = installer.why_not_installed(base)
            said = f"could not be installed ({why})" if why else "is not installed"
            again = "to try again" if why else "to install it"
            known = self.source is None or self.source.parent == installer.MANIFESTS
            what = base if known else shlex.quote(str(self.source))
            raise Unavailable(f"{self.name} {said}; {again}: wg-interop install {what}")
        return found

    def argv(self, interface: str, key_log: Path | None = None) -> list[str]:
        """The command that serves the interface in the foreground; it may be told to reveal its keys to a file."""
        revealing = [word.replace("{file}", str(key_log)) for word in self.key_log] if key_log is not None else []
        return self._fill(self.command, interface) + revealing

    def _fill(self, words: tuple[str, ...], interface: str = "") -> list[str]:
        program = str(self.find_program()) if self.needs_program else ""
        return [word.format(program=program, interface=interface, python=sys.executable) for word in words]

    @property
    def needs_program(self) -> bool:
        """Whether there is a file to find before it can be started."""
        return any("{program}" in word for word in self.command)

    def varied(self, variant: str) -> Manifest:
        """This implementation as the variant of that name, `refwg+no-clamp`."""
        words = [word.replace("{variant}", variant) for word in self.variant]
        return replace(
            self,
            name=f"{self.name}+{variant}",
            base=self.name,
            command=(*self.command, *words),
            env={**self.env, **self.variant_env},
        )

    def why_unavailable(self) -> str | None:
        """Why it cannot be tested on this machine now; None if it can."""
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
        """Its version: what the version command prints, or `unknown`."""
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
    """Whether the running kernel makes a WireGuard interface, tried in this process's network namespace."""
    with closing(Rtnetlink(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))) as netlink:
        try:
            netlink.add_link("wgprobe", "wireguard")
        except ControlError:
            return False
        netlink.delete_link(socket.if_nametoindex("wgprobe"))
    return True


GENERIC: Final = Manifest(name="-", kind="uapi")


def load_manifest(path: Path) -> Manifest:
    """Read a manifest; every mistake in it is a UsageError that names the file and the key."""
    return _Reader(path, installer.read(path)).manifest()


class _Reader:
    """Checks a manifest's keys and types one by one."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self._path = path
        self._data = data

    def _wrong(self, what: str) -> UsageError:
        return UsageError(f"manifest {self._path}: {what}")

    def _take(self, table: dict[str, Any], key: str, kind: type, default: Any) -> Any:
        value = table.pop(key, default)
        if value is not default and not isinstance(value, kind):
            raise self._wrong(f"{key} must be a {kind.__name__}, not {value!r}")
        return value

    def _words(self, table: dict[str, Any], key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        value = self._take(table, key, list, default)
        if not all(isinstance(word, str) for word in value):
            raise self._wrong(f"{key} must be a list of strings")
        return tuple(value)

    def manifest(self) -> Manifest:
        data = dict(self._data)
        kind = self._kind(data)
        program = self._take(data, "program", dict, {})
        watch = self._take(data, "watch", dict, {})
        variant = self._take(data, "variant", dict, {})
        manifest = Manifest(
            name=self._name(data),
            kind=kind,
            title=self._take(data, "title", str, ""),
            capabilities=self._capabilities(data) | self._capabilities_since(data, kind),
            install=self._install(data),
            program=self._program(program),
            command=self._command(program, "command", GENERIC.command),
            version_command=self._command(program, "version", GENERIC.version_command),
            env=self._env(program, "program"),
            mtu=self._mtu(program),
            variant=self._variant(variant),
            variant_env=self._env(variant, "variant"),
            key_log=self._key_log(program),
            complaints=self._patterns(watch),
            descriptors=self._take(watch, "descriptors", int, 16),
            threads=self._take(watch, "threads", int, 32),
            source=self._path,
        )
        for table, title in [(data, ""), (program, "program."), (watch, "watch."), (variant, "variant.")]:
            for key in table:
                raise self._wrong(f"unknown key {title}{key}")
        return manifest

    def _name(self, data: dict[str, Any]) -> str:
        return installer.checked_name(self._take(data, "name", str, ""), self._path)

    def _kind(self, data: dict[str, Any]) -> Literal["kernel", "uapi"]:
        kind = data.pop("kind", None)
        if kind not in KINDS:
            raise self._wrong(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        return "kernel" if kind == "kernel" else "uapi"

    def _capabilities(self, data: dict[str, Any]) -> frozenset[str]:
        return self._known_capabilities(self._words(data, "capabilities", ()))

    def _capabilities_since(self, data: dict[str, Any], kind: str) -> frozenset[str]:
        """What the running kernel is new enough for; a program comes with its version, its manifest knows it."""
        since = self._take(data, "capabilities_since", dict, {})
        if since and kind != "kernel":
            raise self._wrong('capabilities_since is for kind "kernel": a program\'s go into capabilities')
        names = self._known_capabilities(since)
        return frozenset(name for name in names if self._is_reached(name, since[name]))

    def _is_reached(self, name: str, version: object) -> bool:
        wanted = _KERNEL_VERSION.fullmatch(version) if isinstance(version, str) else None
        if wanted is None:
            raise self._wrong(f'capabilities_since.{name} must be a kernel version such as "6.16", not {version!r}')
        running = _KERNEL_VERSION.match(os.uname().release)
        return running is not None and _numbers(running) >= _numbers(wanted)

    def _known_capabilities(self, names: Iterable[str]) -> frozenset[str]:
        known = frozenset(names)
        for name in sorted(known - CAPABILITIES.keys()):
            raise self._wrong(f"unknown capability {name!r}; there are: {', '.join(sorted(CAPABILITIES))}")
        return known

    def _command(self, table: dict[str, Any], key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        words = self._words(table, key, default)
        if not words:
            raise self._wrong(f"program.{key} must not be empty")
        self._fillable(f"program.{key}", words, "{program}, {interface} and {python}")
        return words

    def _variant(self, table: dict[str, Any]) -> tuple[str, ...]:
        words = self._words(table, "args", ())
        # Its name is put in first; they are filled in with the command, to which they are added.
        named = [word.replace("{variant}", "") for word in words]
        self._fillable("variant.args", named, "{variant}, {program}, {interface} and {python}")
        return words

    def _fillable(self, key: str, words: Iterable[str], names: str) -> None:
        try:
            [word.format(program="", interface="", python="") for word in words]
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            raise self._wrong(f"{key}: only {names} are filled in: {error}") from error

    def _key_log(self, table: dict[str, Any]) -> tuple[str, ...]:
        words = self._words(table, "key_log", ())
        if words and not any("{file}" in word for word in words):
            raise self._wrong('program.key_log: {file} is missing: key_log = ["--keylog", "{file}"]')
        return words

    def _env(self, table: dict[str, Any], title: str) -> dict[str, str]:
        env: dict[str, str] = self._take(table, "env", dict, {})
        for name, value in env.items():
            if not isinstance(value, str):
                raise self._wrong(f"{title}.env.{name} must be a str, not {value!r}")
        return env

    def _mtu(self, table: dict[str, Any]) -> int | None:
        mtu: int | None = self._take(table, "mtu", int, None)
        if mtu is not None and mtu not in _MTU:
            raise self._wrong(f"program.mtu must be from {_MTU.start} to {_MTU.stop - 1}, not {mtu}")
        return mtu

    def _install(self, data: dict[str, Any]) -> dict[str, Any]:
        table: dict[str, Any] = self._take(data, "install", dict, {})
        try:
            if table:
                recipes.parse_recipe("-", table)
        except UsageError as error:
            raise self._wrong(str(error).removeprefix("-: ")) from error
        return table

    def _program(self, table: dict[str, Any]) -> Path | None:
        text = self._take(table, "path", str, "")
        if not text:
            return None
        try:
            path = Path(text).expanduser()
        except RuntimeError as error:
            raise self._wrong(f"program.path: {text}: {error}") from error
        return executable(self._path.parent / path, f"manifest {self._path}")

    def _patterns(self, table: dict[str, Any]) -> tuple[str, ...]:
        patterns = self._words(table, "complaints", ())
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise self._wrong(f"watch.complaints: {pattern!r}: {error}") from error
        return patterns


def _numbers(version: re.Match[str]) -> tuple[int, int]:
    return int(version[1]), int(version[2])


def executable(path: Path, what: str) -> Path:
    """The absolute path of a program that can be started; UsageError if it cannot."""
    resolved = path.expanduser().absolute()
    if not resolved.is_file():
        raise UsageError(f"{what}: no program {resolved}")
    if not os.access(resolved, os.X_OK):
        raise UsageError(f"{what}: {resolved} is not executable: chmod +x {resolved}")
    return resolved
