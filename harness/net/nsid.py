"""Wait until network namespaces are destroyed, by the kernel's notifications RTM_DELNSID.

The kernel notifies every namespace that has an id for the destroyed one. An id is not a reference: it does not keep a
namespace alive. Source: include/uapi/linux/net_namespace.h; unhash_nsid in net/core/net_namespace.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from harness.net.rtnetlink import RTNLGRP_NSID, vanished_nsid

if TYPE_CHECKING:
    from harness.net.netns import NetNS

# The kernel assigns ids from 0 upwards where it needs them; ours begin far above those.
_FIRST_NSID: Final = 1000


class NsidEvents:
    """Event for `wait_for`: all watched namespaces are destroyed. Use it as a context manager."""

    def __init__(self, watcher: NetNS, *watched: NetNS) -> None:
        """Assign an id to each watched namespace. watcher: the node that gets the notifications; it must stay."""
        self._names = {_FIRST_NSID + index: node.name for index, node in enumerate(watched)}
        for nsid, node in zip(self._names, watched, strict=True):
            watcher.set_nsid(node, nsid)
        self._monitor = watcher.monitor(RTNLGRP_NSID)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._monitor.close()

    def fileno(self) -> int:
        """Return the netlink socket, which becomes readable with each notification."""
        return self._monitor.fileno()

    def look(self) -> bool | None:
        """Return True once all are destroyed, None before; OSError with ENOBUFS if notifications were lost."""
        for message in self._monitor.messages():
            nsid = vanished_nsid(message)
            if nsid is not None:
                self._names.pop(nsid, None)
        return None if self._names else True

    def seen(self) -> str:
        """Name the namespaces that still exist."""
        return f"still there: {', '.join(self._names.values())}"
