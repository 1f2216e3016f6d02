"""Serve the UAPI socket: the file in /var/run/wireguard, and its connections.

The driver has no such file, because it uses netlink. The text protocol itself is in uapi.py.
"""

from __future__ import annotations

import errno
import os
import resource
import selectors
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from refwg.shortage import SHORTAGES, reason
from refwg.uapi import Conversation

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.boundary import Sockets
    from refwg.device import Device, Effect

DIRECTORY: Final = Path("/var/run/wireguard")
_CHUNK: Final = 1 << 18
_HANGS_UP_WITHIN: Final = 1.0
_NO_DESCRIPTOR: Final = frozenset({errno.EMFILE, errno.ENFILE})
# Descriptors that connections leave free: for new UDP sockets, and for sockets in the interface's namespace.
_KEPT_FREE: Final = 16
_REFUSAL: Final = f"errno={-errno.EMFILE}\n\n".encode()


def socket_path(name: str) -> Path:
    """Return the path at which wg(8) expects the socket of this interface."""
    return DIRECTORY / f"{name}.sock"


class SocketFile:
    """The file of a listening socket, identified by its inode, because a later file may have the same path.

    path: None for a socket that has no file.
    """

    def __init__(self, listener: socket.socket) -> None:
        name = listener.getsockname()
        # A socket from WG_UAPI_FD may have no name, or an abstract one.
        self.path = Path(name) if isinstance(name, str) and name.startswith("/") else None
        self._identity = self._look()

    @property
    def is_there(self) -> bool:
        """True while the path still leads to the file of this socket."""
        return self._identity is not None and self._look() == self._identity

    def remove(self) -> None:
        """Remove the file, unless another process has replaced it."""
        if self.path is not None and self.is_there:
            with suppress(OSError):
                self.path.unlink()

    def _look(self) -> tuple[int, int] | None:
        try:
            status = None if self.path is None else self.path.stat()
        except OSError:
            return None
        return None if status is None else (status.st_dev, status.st_ino)


def listen(name: str) -> socket.socket:
    """Open the listening socket of an interface, for its owner only, and replace the file of a dead process.

    Raises OSError, with EADDRINUSE if a live process serves the file.
    """
    with suppress(FileExistsError):
        DIRECTORY.mkdir(parents=True)
        # Other users may list the interfaces, whatever the umask is.
        DIRECTORY.chmod(0o755)
    path = socket_path(name)
    if _is_answered(path):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), str(path))
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen()
    return listener


def _is_answered(path: Path) -> bool:
    """Return True if a live process serves this socket, and not one that is about to end and closes the connection.

    Raises OSError if that cannot be found out: the file of a live process must not be replaced.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(_HANGS_UP_WITHIN)
        try:
            probe.connect(str(path))
            # A process with too many connections refuses this one by an errno; it lives.
            return bool(probe.recv(1))
        except (TimeoutError, BlockingIOError):
            # Nothing was received, or the backlog is full: the process is busy.
            return True
        except (ConnectionError, FileNotFoundError):
            return False


class Control:
    """Accepts UAPI connections and serves them without blocking.

    clock: returns `now` in nanoseconds. carry_out: called with the effects of each request. complain: called with a
    topic and a message when connections are refused. try_later: calls a function again in a while.
    """

    def __init__(
        self,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        device: Device,
        sockets: Sockets,
        *,
        clock: Callable[[], int],
        carry_out: Callable[[tuple[Effect, ...]], None],
        complain: Callable[[str, str], None] = lambda _topic, _message: None,
        try_later: Callable[[Callable[[], None]], None] = lambda _: None,
    ) -> None:
        self._listener = listener
        self._selector = selector
        self._device = device
        self._sockets = sockets
        self._clock = clock
        self._carry_out = carry_out
        self._complain = complain
        self._try_later = try_later
        self._reserve: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        listener.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self, _: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self._turn_away(error.errno)
            elif error.errno in SHORTAGES:
                self._stop_listening(error.errno)
            return
        connection.setblocking(False)
        # The kernel gives the lowest free number, so a high one means that few are left.
        if connection.fileno() >= _highest_for_connections():
            self._refuse(connection, errno.EMFILE)
            return
        _Connection(self, connection)

    def _refuse(self, connection: socket.socket, number: int) -> None:
        """Answer with an errno and close: an idle connection must not take what the interface needs."""
        self._complain("accept", f"control socket: a connection was refused: {reason(number)}")
        with connection, suppress(OSError):
            connection.send(_REFUSAL)

    def _turn_away(self, number: int) -> None:
        """Free a reserved descriptor to accept and refuse a connection, because no other descriptor is left.

        Otherwise the connection would stay in the backlog and keep the listening socket readable: a busy loop.
        """
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            pass
        except OSError as error:
            self._stop_listening(error.errno or number)
        else:
            connection.setblocking(False)
            self._refuse(connection, number)
        with suppress(OSError):
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _stop_listening(self, number: int) -> None:
        """Leave connections in the backlog for a while, because they can neither be accepted nor refused."""
        self._complain("accept", f"control socket: no connection can be accepted: {reason(number)}")
        self._selector.unregister(self._listener)
        self._try_later(self._listen)

    def serve(self, connection: socket.socket, handler: Callable[[int], None], events: int) -> None:
        """Call `handler` when a connection is ready for `events` (selectors.EVENT_READ, EVENT_WRITE)."""
        try:
            self._selector.modify(connection, events, handler)
        except KeyError:
            self._selector.register(connection, events, handler)

    def leave(self, connection: socket.socket) -> None:
        """Close a connection and stop watching it."""
        with suppress(KeyError):
            self._selector.unregister(connection)
        connection.close()

    def converse(self) -> Conversation:
        """Return the protocol state for a new connection."""
        return Conversation(self._device, self._sockets)

    def feed(self, conversation: Conversation, data: bytes) -> tuple[bytes, bool]:
        """Process received bytes and carry out their effects; returns the reply, and whether to close after it."""
        answer = conversation.feed(data, self._clock())
        self._carry_out(answer.effects)
        return answer.reply, answer.is_over


def _highest_for_connections() -> int:
    """Return the first descriptor number that no connection may have; read each time, as prlimit(2) may change it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit - min(_KEPT_FREE, limit // 4)


class _Connection:
    def __init__(self, control: Control, connection: socket.socket) -> None:
        self._control = control
        self._socket = connection
        self._conversation = control.converse()
        self._unsent = memoryview(b"")
        self._is_over = False
        control.serve(connection, self._ready, selectors.EVENT_READ)

    def _ready(self, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._read()
            self._write()
        except BlockingIOError:
            return
        except OSError:
            self._control.leave(self._socket)
        except MemoryError:
            # The request is lost; its client must not wait for the reply.
            self._control.leave(self._socket)
            raise

    def _read(self) -> None:
        data = self._socket.recv(_CHUNK)
        if not data:
            self._is_over = True
            return
        reply, self._is_over = self._control.feed(self._conversation, data)
        self._unsent = memoryview(bytes(self._unsent) + reply)

    def _write(self) -> None:
        if self._unsent:
            with suppress(BlockingIOError):
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        if not self._unsent and self._is_over:
            self._control.leave(self._socket)
            return
        # While a client does not read its replies, its requests are not read either.
        self._control.serve(self._socket, self._ready, selectors.EVENT_WRITE if self._unsent else selectors.EVENT_READ)
