"""Collect the keys of a lab's interfaces in Wireshark's key log format.

They come from the programs' key logs and from the configuration. Source: Wireshark's description of its key log format
for WireGuard. With the ephemeral private keys of one side Wireshark decrypts all its sessions, with the static keys
only the handshakes.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from harness.control.base import EVIDENCE_TIMEOUT
from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.implementations.interface import Interface

_LINE: Final = re.compile(
    r"(LOCAL_STATIC_PRIVATE|REMOTE_STATIC_PUBLIC|LOCAL_EPHEMERAL_PRIVATE|PRESHARED)_KEY = [A-Za-z0-9+/]{43}="
)


def key_log(interfaces: Iterable[Interface]) -> str:
    """Return all known keys of these interfaces, a line each; empty if none is known."""
    made = list(interfaces)
    # A preshared key belongs to the ephemeral key before it, so the lines of a program stay in order.
    lines = [line for interface in made for line in configured(interface)]
    lines += [line for interface in made for line in revealed(interface)]
    return "".join(f"{line}\n" for line in lines)


def configured(interface: Interface) -> list[str]:
    """Return lines for the static keys of the interface and its peers, as reported, or else as configured."""
    # A program that has died reports nothing.
    with suppress(HarnessError, OSError):
        state = interface.get(EVIDENCE_TIMEOUT)
        key = state.private_key or interface.told
        own = [] if key is None else [f"LOCAL_STATIC_PRIVATE_KEY = {key}"]
        return own + [f"REMOTE_STATIC_PUBLIC_KEY = {peer.public_key}" for peer in state.peers]
    return []


def revealed(interface: Interface) -> list[str]:
    """Return the lines of the program's key log, without those of another format."""
    if interface.key_log is None or not interface.key_log.exists():
        return []
    return [line for line in interface.key_log.read_text(errors="replace").splitlines() if _LINE.fullmatch(line)]
