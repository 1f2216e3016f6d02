"""Try a program capability by capability, and write its manifest: `wg-interop probe`.

The probes of `harness.lab.probes` run in a child process in a sandbox, `python -m harness.cli.probe`, which prints each
result as a line of JSON. selftests/netns/test_capabilities.py runs the same probes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from harness.cli import terminal
from harness.cli.confined import run_confined
from harness.errors import HarnessError, Unavailable, UsageError
from harness.implementations.manifest_writer import manifest_values, write_manifest
from harness.implementations.registry import Registry
from harness.lab.lab import Lab
from harness.lab.probes import PROBES, NothingShownError, connect, mtu_at_start, probe, smoke_test
from harness.sandbox.launch import require_sandbox
from harness.wait import set_timeout_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from harness.implementations.manifest import Manifest

_PEER: Final = "refwg"
_DEADLINE: Final = 300.0  # seconds for all probes, scaled; each probe has shorter deadlines too
_TUNNEL_MTU: Final = 1420
_ERRORS: Final = {error.__name__: error for error in (HarnessError, UsageError, Unavailable)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The options of one probe: `--impl` or `--impl-manifest`, `--like`, and the factor of all deadlines."""

    impl: str = ""
    manifest: str = ""
    like: str = ""
    timeout_scale: float = 1.0

    def find(self) -> Manifest:
        """Return the program's manifest before the probe; raises UsageError or Unavailable."""
        if bool(self.impl) == bool(self.manifest):
            raise UsageError("name one program: --impl NAME=PATH, or --impl-manifest FILE")
        manifests = [Path(self.manifest)] if self.manifest else []
        registry = Registry.of_options([self.impl] if self.impl else [], manifests, [self.like] if self.like else [])
        found = registry.get(registry.asked[0])
        if found.kind == "kernel":
            raise UsageError(f"{found.name} is not a program; its manifest names its capabilities by kernel version")
        if reason := found.why_unavailable():
            raise Unavailable(reason)
        return found


def probe_program(order: Order, out: Path | None, *, force: bool) -> int:
    """Probe the program, print progress on stderr, and write its manifest; return the exit status."""
    manifest = order.find()
    if out is not None and out.exists() and not force:
        raise UsageError(f"{out} exists; to overwrite it: --force")
    if out is not None and not os.access(out.absolute().parent, os.W_OK):
        raise UsageError(f"-o {out}: cannot write to {out.absolute().parent}")
    screen = terminal.console(sys.stderr)
    values = manifest_values(manifest)
    lacking: dict[str, str] = {}
    unknown = 0
    deadline = _DEADLINE * order.timeout_scale
    words = json.dumps({name: getattr(order, name) for name in Order.__slots__})
    for event in run_confined("probe", "harness.cli.probe", words, deadline=deadline):
        if "error" in event:
            raise _ERRORS.get(event["kind"], HarnessError)(event["error"])
        _show(screen, event)
        if event["name"] == "mtu" and not event["works"]:
            values["program"]["mtu"] = _TUNNEL_MTU
        if event["name"] in PROBES and not event["works"]:
            lacking[event["name"]] = event["seen"]
            unknown += event["unknown"]
    text = write_manifest(values, lacking, _remarks(manifest))
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")
        terminal.line(screen, f"{len(PROBES) - len(lacking)} of {len(PROBES)} capabilities; manifest: {out}")
    if unknown:
        raise HarnessError(
            f"{unknown} of {len(PROBES)} capabilities could not be tried and are not declared; see the manifest"
        )
    return terminal.OK


def _remarks(manifest: Manifest) -> list[str]:
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    return [
        f"{manifest.name} {manifest.version()}, as `wg-interop probe` found it on {today} with {_PEER} as its peer.",
        "docs/manifests.md explains every key.",
    ]


def _show(screen: Console, event: dict[str, Any]) -> None:
    """Print a line of progress."""
    known = event["name"] in PROBES
    word = ("has" if event["works"] else "lacks") if known else ("ok" if event["works"] else "note")
    style = "green" if event["works"] else "yellow"
    if event["unknown"]:
        word, style = "UNKNOWN", "bold red"
    terminal.line(screen, f"{word:<8} {event['name']:<22} {' '.join(event['seen'].split())}", style)


# Inside the sandbox


def inside(order: Order) -> None:
    """Run all probes and print each result; an error is printed too, and the parent raises it."""
    set_timeout_scale(order.timeout_scale)
    try:
        require_sandbox()
        manifest = order.find()
        with tempfile.TemporaryDirectory(prefix="wg-interop-probe-") as scratch:
            for event in _steps(manifest, Registry().get(_PEER), Path(scratch)):
                _print(event)
    except (HarnessError, OSError) as error:
        kind = type(error).__name__ if type(error).__name__ in _ERRORS else HarnessError.__name__
        _print({"error": str(error), "kind": kind})


def _print(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)  # noqa: T201 - to the parent


def _steps(manifest: Manifest, peer: Manifest, scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield the result of each step. Raises HarnessError if the program does not work at all."""
    name = manifest.name

    def step(what: str, attempt: Callable[[Lab], object]) -> object:
        lab = Lab(scratch / what)
        try:
            result = attempt(lab)
            lab.close()
        except (HarnessError, OSError) as error:
            with suppress(HarnessError, OSError):
                lab.close()
            raise HarnessError(f"{name} {_FAILED[what]}, so no capability can be tried: {error}") from error
        return result

    step("smoke", lambda lab: smoke_test(lab, manifest))
    yield _event("smoke", seen=f"{manifest.version()} starts, answers, takes a key and a port, and stops")
    mtu = manifest.mtu or step("mtu", lambda lab: mtu_at_start(lab, manifest))
    usual = mtu == _TUNNEL_MTU or manifest.mtu is not None
    yield _event("mtu", works=usual, seen=f"{mtu}" if usual else f"{mtu}, so the lab has to set it to {_TUNNEL_MTU}")
    step("initiator", lambda lab: connect(lab, manifest, peer))
    step("responder", lambda lab: connect(lab, peer, manifest))
    yield _event("tunnel", seen=f"with {peer.name} over IPv4, each as initiator and responder")
    capabilities = set(PROBES)
    for capability in PROBES:
        able = replace(manifest, capabilities=frozenset(capabilities))
        try:
            found = probe(scratch / capability, 0, able, peer, capability)
            event = _event(capability, works=found.works, seen=found.seen)
        except NothingShownError as error:
            event = _event(capability, works=False, seen=str(error), unknown=True)
        if not event["works"]:
            # The next probes must not use it.
            capabilities.discard(capability)
        yield event


_FAILED: Final = {
    "smoke": "failed its smoke test",
    "mtu": "did not start a second time",
    "initiator": f"made no tunnel as initiator, with {_PEER} as responder",
    "responder": f"made no tunnel as responder, with {_PEER} as initiator",
}


def _event(name: str, *, works: bool = True, seen: str = "", unknown: bool = False) -> dict[str, Any]:
    return {"name": name, "works": works, "seen": seen, "unknown": unknown}


if __name__ == "__main__":
    inside(Order(**json.loads(sys.argv[1])))
