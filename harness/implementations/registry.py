"""List the implementations of a run by name, and which of them the user asked for."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UsageError
from harness.implementations.found import known_manifests
from harness.implementations.manifest import CAPABILITIES, Manifest, executable, load_manifest
from harness.install.installer import NAME
from harness.install.releases import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence


class Registry:
    """The implementations of a run.

    known: every manifest by its name. asked: the names that the command line gave, in order.
    """

    def __init__(self) -> None:
        self.known = known_manifests()
        self.asked: list[str] = []
        # Programs given by their paths under names that no manifest has.
        self._bare: dict[str, Path] = {}

    def choose(self, text: str) -> Manifest:
        """Take an `--impl NAME` or `--impl NAME=PROGRAM` and return its manifest; raises UsageError.

        A program under a name without a manifest is started like wireguard-go: `PROGRAM -f INTERFACE`.
        """
        name, equals, program = text.partition("=")
        if not equals:
            name = self._derive(name)
        if not equals and name not in self.known:
            known = ", ".join(self.known)
            raise UsageError(f"unknown implementation {name!r}; there are: {known}; yours: --impl {name}=/path")
        if equals:
            plain, at, version = name.partition("@")
            if not NAME.fullmatch(plain) or (at and not VERSION.fullmatch(version)):
                raise UsageError(f"--impl {text}: a name is lower-case letters, digits and . _ + -")
            path = executable(Path(program), f"--impl {text}")
            # NAME@VERSION=PROGRAM is a version of NAME that the user has built.
            self._vary(name)
            base = self.known.get(name) or self.known.get(plain)
            if base is None or plain in self._bare:
                self._bare[name] = path
                base = Manifest(name=name, kind="uapi", capabilities=frozenset(CAPABILITIES))
            if base.kind == "kernel":
                raise UsageError(f"--impl {text}: {name} is not a program; for another kernel use --kernel")
            self.known[name] = replace(base.given_as(name, path), base=plain if at else base.base)
        return self._ask(name)

    @classmethod
    def of_options(cls, programs: Sequence[str], manifests: Sequence[Path], likes: Sequence[str]) -> Registry:
        """Take all `--impl`, `--impl-manifest` and `--like` of a command line; raises UsageError."""
        registry = cls()
        for path in manifests:
            registry.add(path)
        for text in programs:
            registry.choose(text)
        registry.liken(likes)
        return registry

    def add(self, path: Path) -> Manifest:
        """Take an `--impl-manifest FILE` and return the manifest; raises UsageError."""
        manifest = load_manifest(path)
        self.known[manifest.name] = manifest
        return self._ask(manifest.name)

    def liken(self, texts: Sequence[str]) -> None:
        """Take every `--like`, after all programs; raises UsageError.

        `NAME=LIKE` is for one program, `LIKE` for all others without a manifest. Such a program gets the manifest of
        LIKE, except its name and path, and the known failures of LIKE are expected of it.
        """
        likes: dict[str, Manifest] = {}
        # Those for one program first.
        for text in sorted(texts, key=lambda text: "=" not in text):
            name, equals, target = text.rpartition("=")
            like = self._find_like(text, target)
            names = [name] if equals else [bare for bare in self._bare if bare not in likes]
            if equals and name not in self._bare:
                raise UsageError(f"--like {text}: {self._why_not_bare(name)}")
            if not names and not self._bare:
                raise UsageError(f"--like {text}: no program to apply it to: add --impl NAME=PATH, without a manifest")
            if not names or name in likes:
                raise UsageError(f"--like {text}: each program has one already; leave this one out")
            likes |= dict.fromkeys(names, like)
        for name, like in likes.items():
            given = like.given_as(name, self._bare[name])
            own = replace(given, like=like, install=None, source=None, base="", title="")
            self.known[name] = replace(own, variant=(), named_variants={})

    def _find_like(self, text: str, name: str) -> Manifest:
        name = self._derive(name)
        if name not in self.known or name in self._bare:
            known = ", ".join(known for known in self.known if known not in self._bare)
            what = f"{name} has no manifest" if name in self._bare else f"unknown implementation {name!r}"
            raise UsageError(f"--like {text}: {what}; there are: {known}")
        if self.known[name].kind == "kernel":
            raise UsageError(f"--like {text}: {name} is not a program")
        return self.known[name]

    def _why_not_bare(self, name: str) -> str:
        if name in self.known:
            return f"{name} has a manifest of its own; give your program another name: --impl mine=PATH"
        return f"there is no --impl {name}=PATH"

    def remarks(self) -> list[str]:
        """Return a sentence for each program given by its path: what the run assumes of it."""
        found = []
        for name, path in self._bare.items():
            if like := self.known[name].like:
                found.append(f"{name} has the capabilities and known failures of {like.name} (--like), of any version")
            else:
                command = f"wg-interop probe --impl {name}={shlex.quote(str(path))}"
                found.append(f"{name} has no manifest, so all capabilities are assumed; to find out: {command}")
        return found

    def _ask(self, name: str) -> Manifest:
        if name not in self.asked:
            self.asked.append(name)
        return self.known[name]

    def _derive(self, name: str) -> str:
        """Add the version or variant that a name such as `boringtun@0.6.0` or `refwg+simple` names.

        Returns the name in full: `wireguard-go@20230223` names `wireguard-go@0.0.20230223`.
        """
        base, at, version = name.partition("@")
        if at and name not in self.known and base in self.known:
            manifest = self.known[base].at(version)
            self.known.setdefault(manifest.name, manifest)
            return manifest.name
        self._vary(name)
        return name

    def _vary(self, name: str) -> None:
        """Add the variant that a name such as `refwg+simple` or `refwg+no-clamp` names."""
        base, plus, variant = name.partition("+")
        named = plus and name not in self.known and NAME.fullmatch(name)
        if named and base in self.known and self.known[base].has_variant(variant):
            self.known[name] = self.known[base].varied(variant)

    def get(self, name: str) -> Manifest:
        """Return a known implementation, or a variant or version of one, by its name; raises UsageError."""
        name = self._derive(name)
        if name not in self.known:
            raise UsageError(f"unknown implementation {name!r}; there are: {', '.join(self.known)}")
        return self.known[name]
