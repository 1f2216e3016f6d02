"""List the implementations of a run by name, and which of them the user asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from harness.errors import UsageError
from harness.implementations.manifest import CAPABILITIES, GENERIC, Manifest, executable, load_manifest
from harness.install.installer import MANIFESTS, NAME


class Registry:
    """The implementations that are known in this run, and those that were asked for."""

    def __init__(self) -> None:
        manifests = [load_manifest(path) for path in sorted(MANIFESTS.glob("*.toml"))]
        self.known = {manifest.name: manifest for manifest in manifests}
        self.asked: list[str] = []

    def choose(self, text: str) -> Manifest:
        """Take an `--impl NAME` or `--impl NAME=PROGRAM`.

        A name that no manifest has, with a program, is started as wireguard-go is: `PROGRAM -f INTERFACE`.
        """
        name, equals, program = text.partition("=")
        self._derive(name)
        if not equals and name not in self.known:
            known = ", ".join(self.known)
            raise UsageError(f"unknown implementation {name!r}; there are: {known}; yours: --impl {name}=/path")
        if equals:
            if not NAME.fullmatch(name):
                raise UsageError(f"--impl {text}: a name is lower-case letters, digits and . _ + -")
            path = executable(Path(program), f"--impl {text}")
            base = self.known.get(name) or Manifest(name=name, kind="uapi", capabilities=frozenset(CAPABILITIES))
            if base.kind == "kernel":
                raise UsageError(f"--impl {text}: {name} is no program; for another kernel use --kernel")
            if not base.needs_program:
                base = replace(base, command=GENERIC.command, version_command=GENERIC.version_command, key_log=())
            self.known[name] = replace(base, program=path)
        return self._ask(name)

    def add(self, path: Path) -> Manifest:
        """Take an `--impl-manifest FILE`."""
        manifest = load_manifest(path)
        self.known[manifest.name] = manifest
        return self._ask(manifest.name)

    def _ask(self, name: str) -> Manifest:
        if name not in self.asked:
            self.asked.append(name)
        return self.known[name]

    def _derive(self, name: str) -> None:
        """Make the variant known that a name like `refwg+no-clamp` asks for."""
        base, plus, variant = name.partition("+")
        named = plus and name not in self.known and NAME.fullmatch(name)
        if named and base in self.known and self.known[base].variant:
            self.known[name] = self.known[base].varied(variant)

    def get(self, name: str) -> Manifest:
        """A known implementation by name."""
        self._derive(name)
        if name not in self.known:
            raise UsageError(f"unknown implementation {name!r}; there are: {', '.join(self.known)}")
        return self.known[name]
