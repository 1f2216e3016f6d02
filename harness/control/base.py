"""Define `Control`, which UAPI and netlink both implement, and describe a change in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from harness import steps
from harness.control.records import keyword_changes

if TYPE_CHECKING:
    from harness.control.records import DeviceConfig, DeviceState, PeerConfig

# Seconds to wait for a state that is read as evidence: the failure may be that the program does not answer.
EVIDENCE_TIMEOUT: Final = 2.0
# Peers of a change, and prefixes of a peer, that the evidence names.
_PEERS: Final = 3
_PREFIXES: Final = 4


class Control(Protocol):
    """Read and change the configuration of one WireGuard interface."""

    def get(self, timeout: float | None = None) -> DeviceState:
        """Read the device. timeout: seconds, scaled; None for the control's own."""
        ...

    def set(self, config: DeviceConfig) -> None:
        """Apply a configuration; raises ControlError with the errno of a refusal."""
        ...


def wg_set(ifname: str, config: DeviceConfig) -> str:
    """Format a change as the command `wg set` for the evidence: the first peers and prefixes, and no whole key.

    `wg set` cannot replace all peers; the text notes that in brackets.
    """
    words = ["wg set", ifname]
    words += _given("fwmark", config.fwmark) + _given("listen-port", config.listen_port)
    words += [] if config.private_key is None else ["private-key", f"<(echo {config.private_key})"]
    words += [word for peer in config.peers[:_PEERS] for word in _wg_peer(peer)]
    if len(config.peers) > _PEERS:
        words.append(f"(and {len(config.peers) - _PEERS} more peers)")
    if config.replace_peers:
        words.append("(in place of all peers)")
    return steps.shortened(" ".join(words))


def _wg_peer(peer: PeerConfig) -> list[str]:
    words = ["peer", str(peer.public_key), *["remove"] * peer.remove, *["update-only"] * peer.update_only]
    words += [] if peer.preshared_key is None else ["preshared-key", f"<(echo {peer.preshared_key})"]
    words += _given("endpoint", peer.endpoint) + _given("persistent-keepalive", peer.persistent_keepalive)
    words += _given("protocol-version", peer.protocol_version)
    if peer.allowed_ips or peer.replace_allowed_ips:
        # A prefix with a sign is added or taken away; without one, the list replaces what there was.
        sign = "" if peer.replace_allowed_ips else "+"
        prefixes = (f"{'' if prefix.remove else sign}{prefix}" for prefix in peer.allowed_ips[:_PREFIXES])
        more = f",(and {len(peer.allowed_ips) - _PREFIXES} more)" * (len(peer.allowed_ips) > _PREFIXES)
        words += ["allowed-ips", ",".join(prefixes) + more or "''"]
    return words


def _given(word: str, value: object) -> list[str]:
    return [] if value is None else [word, str(value)]


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
