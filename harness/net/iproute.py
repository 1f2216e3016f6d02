"""Give a node pyroute2's IPRoute, for what rtnetlink.py lacks: bridges, tunnels, tc.

Here an IPRoute belongs to the node's thread, and all its methods run there. The reason: an IPRoute opens a socket and
an event loop in each thread that uses it, in that thread's network namespace, but closes the event loop of one thread
only. `IPRoute(netns=...)` opens each socket in the right namespace, but forks this process for that (10 ms), and it
also leaves the event loops of other threads open.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from harness import steps
from harness.errors import Unavailable, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.sandbox.namespace import NamespaceThread

# These methods wait for notifications or sleep. Until they returned, nothing else could run in the node's thread.
_BLOCKING_METHODS: Final = frozenset({"bind", "ensure", "get", "poll", "recv"})
# rtnl_newlink answers EOPNOTSUPP for an unknown type of device, and tc_modify_qdisc ENOENT for an unknown qdisc.
_UNKNOWN_KIND: Final = frozenset({errno.EOPNOTSUPP, errno.ENOENT})


class NodeIPRoute:
    """An IPRoute of one node, with the same methods; any thread may call them.

    A method raises pyroute2's own error (NetlinkError for a refused request), with a note that names the node and the
    call. Use this as a context manager or call `close`; otherwise the node closes it.
    """

    def __init__(self, node: str, thread: NamespaceThread) -> None:
        from pyroute2 import IPRoute  # noqa: PLC0415 - takes 0.1 s and loads 200 modules: import it on first use

        self._node = node
        self._thread = thread
        # With ext_ack a refusal carries the kernel's error text (NETLINK_EXT_ACK, netlink(7)).
        self._iproute = thread.call(IPRoute, ext_ack=True)
        self._is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket and the event loop; a second call does nothing."""
        if self._is_open:
            self._is_open = False
            self._thread.call(self._iproute.close)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a method of pyroute2's IPRoute that runs in the node's thread."""
        if name.startswith("_"):
            raise AttributeError(name)
        if name in _BLOCKING_METHODS:
            raise AttributeError(f"{self._node}: iproute has no {name}, which waits: use wait_for with an event")
        self._check_open()
        # Look the name up in the node's thread, because some attributes open a socket.
        method = self._thread.call(getattr, self._iproute, name, None)
        if callable(method):
            return partial(self._call, name, method)
        raise AttributeError(f"{self._node}: iproute has no method {name}")

    def _call(self, name: str, method: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Any:
        self._check_open()
        text = ", ".join([*map(repr, arguments), *(f"{key}={value!r}" for key, value in keywords.items())])
        # Calls that only read are listed too: pyroute2 does not mark the calls that change something.
        with steps.step(self._node, f"pyroute2: {name}({text})"):
            try:
                return self._thread.call(_answer, method, *arguments, **keywords)
            except Exception as error:
                error.add_note(f"node {self._node}: {name}({text})")
                raise

    def _check_open(self) -> None:
        if not self._is_open:
            raise UsageError(f"{self._node}: this iproute is closed; ask the node for another one")


def _answer(method: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Any:
    """Call a method, and read a generator to its end: it would otherwise run in the thread that reads it."""
    answer = method(*arguments, **keywords)
    return tuple(answer) if isinstance(answer, Iterator) else answer


@contextmanager
def needs_kind(node: str, what: str) -> Iterator[None]:
    """Raise Unavailable if a call of pyroute2 in the block is refused because the kernel lacks a kind of thing.

    what: `device of type vrf`, for the message.
    """
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415 - as above

    try:
        yield
    except NetlinkError as error:
        if error.code not in _UNKNOWN_KIND:
            raise
        raise Unavailable(
            f"{node}: this kernel has no {what} ({error.args[1]}); the guests of lane vm have it"
        ) from error
