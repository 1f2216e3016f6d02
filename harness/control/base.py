"""Define `Control`, which UAPI and netlink both implement, and describe a change in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from harness.control.records import keyword_changes

if TYPE_CHECKING:
    from harness.control.records import DeviceConfig, DeviceState, PeerConfig

# Seconds to wait for a state that is read as evidence: the failure may be that the program does not answer.
EVIDENCE_TIMEOUT: Final = 2.0


class Control(Protocol):
    """Read and change the configuration of one WireGuard interface."""

    def get(self, timeout: float | None = None) -> DeviceState:
        """Read the device. timeout: seconds, scaled; None for the control's own."""
        ...

    def set(self, config: DeviceConfig) -> None:
        """Apply a configuration; raises ControlError with the errno of a refusal."""
        ...


def describe(config: DeviceConfig) -> str:
    """Describe in one line what a configuration changes, without the values of private and preshared keys."""
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
