"""Remove a peer and add it again, so that its sessions end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from harness import let_pass

if TYPE_CHECKING:
    from typing import Unpack

    from harness import Interface, Key
    from harness.control.records import PeerChanges

SPACING: Final = 0.1


def renew(side: Interface, key: Key, **changes: Unpack[PeerChanges]) -> None:
    """Remove a peer and add it with the settings it had, but for these changes.

    `Interface.set_peer` needs the capability `update-peer` for a peer that is there; this does not.
    """
    now = side.peer(key)
    if now.latest_handshake:
        let_pass(SPACING, "a peer refuses a second initiation within 20 ms, and timestamps are coarse")
    settings: PeerChanges = {
        "preshared_key": now.preshared_key,
        "endpoint": now.endpoint,
        "persistent_keepalive": now.persistent_keepalive or None,
        "allowed_ips": now.allowed_ips,
    }
    side.set_peer(key, remove=True)
    side.set_peer(key, **(settings | changes))
