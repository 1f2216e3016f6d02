"""Wait until network namespaces have vanished, by the kernel's messages RTM_DELNSID.

The kernel notifies every namespace that holds an id of a destroyed one. Source: RTM_NEWNSID and RTM_DELNSID,
rtnetlink(7) and include/uapi/linux/net_namespace.h. An id is not a reference: it keeps nothing alive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from harness.net.rtnetlink import RTNLGRP_NSID, vanished_nsid

if TYPE_CHECKING:
    from harness.net.netns import NetNS

# Far from those that the kernel gives out by itself.
_FIRST: Final = 1000


class NsidEvents:
    """All of some namespaces have vanished: an event, for `wait_for`; as a context manager."""

    def __init__(self, watcher: NetNS, *watched: NetNS) -> None:
        """Give each an id. watcher: in whose namespace the kernel notifies, and which stays."""
        self._names = {_FIRST + index: node.name for index, node in enumerate(watched)}
        for nsid, node in zip(self._names, watched, strict=True):
            watcher.set_nsid(node, nsid)
        self._monitor = watcher.monitor(RTNLGRP_NSID)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._monitor.close()

    def fileno(self) -> int:
        return self._monitor.fileno()

    def look(self) -> bool | None:
        for message in self._monitor.messages():
            nsid = vanished_nsid(message)
            if nsid is not None:
                self._names.pop(nsid, None)
        return None if self._names else True

    def seen(self) -> str:
        return f"still there: {', '.join(self._names.values())}"
