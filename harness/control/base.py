"""Define `Control`, which UAPI and netlink both implement, and describe a change in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from harness.control.records import keyword_changes

if TYPE_CHECKING:
    from harness.control.records import DeviceConfig, DeviceState, PeerConfig

# Of one that is asked for evidence after a failure, which may be that it does not answer.
EVIDENCE_TIMEOUT: Final = 2.0


class Control(Protocol):
    """One WireGuard interface, in whichever way it is reached."""

    def get(self, timeout: float | None = None) -> DeviceState: ...

    def set(self, config: DeviceConfig) -> None: ...


def describe(config: DeviceConfig) -> str:
    """Say in one line what a configuration changes; without private and preshared keys, which are of no help."""
    changes = [_change(name, value) for name, value in keyword_changes(config).items() if name != "peers"]
    match config.peers:
        case []:
            pass
        case [only]:
            changes.append(_describe_peer(only))
        case several:
            changes.append(f"{len(several)} peers")
    return f"set {', '.join(changes) or 'nothing'}"


def _describe_peer(peer: PeerConfig) -> str:
    changes = [_change(name, value) for name, value in keyword_changes(peer).items() if name != "public_key"]
    return f"peer {peer.public_key}" + (f" ({', '.join(changes)})" if changes else "")


def _change(name: str, value: object) -> str:
    if name == "allowed_ips" and isinstance(value, tuple):
        return f"{len(value)} allowed_ips"
    if value is True or name.endswith("_key"):
        return name
    return f"{name} {value}"
