"""Serve the UAPI socket: the file in /var/run/wireguard, and its connections.

No kernel file has this; netlink does it for the driver. What is said on the socket is the business of uapi.py.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from refwg.uapi import Conversation

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.boundary import Sockets
    from refwg.device import Device, Effect

DIRECTORY: Final = Path("/var/run/wireguard")
_CHUNK: Final = 1 << 18
_HANGS_UP_WITHIN: Final = 1.0
_NO_DESCRIPTOR: Final = frozenset({errno.EMFILE, errno.ENFILE})


def socket_path(name: str) -> Path:
    return DIRECTORY / f"{name}.sock"


class SocketFile:
    """The file of a listening socket, as long as it is that and not another one of the same name."""

    def __init__(self, listener: socket.socket) -> None:
        name = listener.getsockname()
        # A socket that was given to us may have no name, or none in the file system.
        self.path = Path(name) if isinstance(name, str) and name.startswith("/") else None
        self._identity = self._look()

    @property
    def is_there(self) -> bool:
        return self._identity is not None and self._look() == self._identity

    def remove(self) -> None:
        """Remove it, unless somebody has made another one meanwhile."""
        if self.path is not None and self.is_there:
            with suppress(OSError):
                self.path.unlink()

    def _look(self) -> tuple[int, int] | None:
        try:
            found = None if self.path is None else self.path.stat()
        except OSError:
            return None
        return None if found is None else (found.st_dev, found.st_ino)


def listen(name: str) -> socket.socket:
    """Make the socket of an interface, for its owner only; one that a dead process has left behind is replaced."""
    with suppress(FileExistsError):
        DIRECTORY.mkdir(parents=True)
        # Others may look for interfaces, whatever umask we were started with.
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
    """Whether a process serves this socket, and goes on doing so: one whose interface was just deleted hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(_HANGS_UP_WITHIN)
        try:
            probe.connect(str(path))
            probe.recv(1)
        except TimeoutError:
            return True
        except OSError:
            return False
        return False


class Control:
    """Accepts connections and lets each have its conversation; slow readers hold up nobody."""

    def __init__(
        self,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        device: Device,
        sockets: Sockets,
        *,
        clock: Callable[[], int],
        carry_out: Callable[[tuple[Effect, ...]], None],
    ) -> None:
        self._listener = listener
        self._selector = selector
        self._device = device
        self._sockets = sockets
        self._clock = clock
        self._carry_out = carry_out
        self._reserve: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, self._accept)

    def _accept(self, _: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self._turn_away()
            return
        connection.setblocking(False)
        _Connection(self, connection)

    def _turn_away(self) -> None:
        """Too many files are open: one kept in reserve allows to hang up, where the caller would be heard for ever."""
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None
        with suppress(OSError):
            self._listener.accept()[0].close()
        with suppress(OSError):
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def serve(self, connection: socket.socket, handler: Callable[[int], None], events: int) -> None:
        """Call `handler` when a connection is ready."""
        try:
            self._selector.modify(connection, events, handler)
        except KeyError:
            self._selector.register(connection, events, handler)

    def leave(self, connection: socket.socket) -> None:
        with suppress(KeyError):
            self._selector.unregister(connection)
        connection.close()

    def converse(self) -> Conversation:
        return Conversation(self._device, self._sockets)

    def feed(self, conversation: Conversation, data: bytes) -> tuple[bytes, bool]:
        """Carry on a conversation; returns what to write, and whether it is over then."""
        answer = conversation.feed(data, self._clock())
        self._carry_out(answer.effects)
        return answer.reply, answer.is_over


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
        # Whoever does not read its answers is not listened to either.
        self._control.serve(self._socket, self._ready, selectors.EVENT_WRITE if self._unsent else selectors.EVENT_READ)
