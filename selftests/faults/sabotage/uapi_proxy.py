#!/usr/bin/env python3
"""Start the real program, and change requests and answers between its control socket and the harness.

    uapi_proxy.py SABOTAGE -f NAME        SABOTAGE: a method of Saboteur; SABOTAGED_PROGRAM: the real program

The real program serves its socket in its own mount namespace; the harness connects to the socket of this proxy.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from harness.control.uapi import UapiControl
from harness.implementations.interface import CONTROL_SOCKETS
from harness.sandbox.launcher import die_with_parent
from harness.sandbox.namespace import NamespaceThread, enter_new_mounts
from harness.wait import EntryAppears, poll_until, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INITIATION = 148


class Saboteur:
    """One method per sabotage: it takes one line of a request or an answer and yields the changed lines."""

    def __init__(self) -> None:
        self.port: str | None = None
        self.is_set = False
        self.peer = ""
        self.owners: dict[ipaddress.IPv4Network | ipaddress.IPv6Network, str] = {}

    def nothing(self, line: str) -> Iterator[str]:
        yield line

    def miscount(self, line: str) -> Iterator[str]:
        """Received handshake initiations are not counted."""
        name, _, value = line.partition("=")
        yield f"rx_bytes={max(0, int(value) - INITIATION)}" if name == "rx_bytes" else line

    def keep_port(self, line: str) -> Iterator[str]:
        """Every listen port that is set after the first is accepted and ignored."""
        name, _, value = line.partition("=")
        if name in {"set", "get"}:
            self.is_set = name == "set"
        if name == "listen_port" and self.is_set:
            self.port = self.port or value
        yield f"listen_port={self.port or value}" if name == "listen_port" else line

    def first_come(self, line: str) -> Iterator[str]:
        """An allowed ip within a wider one of another peer is accepted and ignored."""
        name, _, value = line.partition("=")
        if name == "public_key":
            self.peer = value
        if name == "allowed_ip":
            network = ipaddress.ip_network(value)
            if any(self.peer != peer and _within(network, wide) for wide, peer in self.owners.items()):
                return
            self.owners[network] = self.peer
        yield line


def _within(narrow: ipaddress.IPv4Network | ipaddress.IPv6Network, wide: object) -> bool:
    return type(narrow) is type(wide) and narrow.subnet_of(wide)  # type: ignore[arg-type]


def changed(text: bytes, sabotage: Callable[[str], Iterator[str]]) -> bytes:
    """Return the request or answer with each line sabotaged."""
    lines = text.decode().removesuffix("\n\n").split("\n")
    return ("\n".join(new for line in lines for new in sabotage(line)) + "\n\n").encode()


def receive(connection: socket.socket) -> bytes:
    """Receive one request up to its empty line; empty if the client has closed the connection."""
    request = b""
    while not request.endswith(b"\n\n"):
        data = connection.recv(1 << 16)
        if not data:
            return b""
        request += data
    return request


def serve(name: str, real: UapiControl, sabotage: Callable[[str], Iterator[str]]) -> NoReturn:
    """Serve one request after the other until the process ends."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(CONTROL_SOCKETS / f"{name}.sock"))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                if request := receive(connection):
                    answer = real.exchange(changed(request, sabotage), "the request of the harness")
                    connection.sendall(changed(answer, sabotage))


def main() -> NoReturn:
    sabotage, *arguments, name = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    thread = NamespaceThread("the real program", partial(enter_new_mounts, CONTROL_SOCKETS))
    ready = thread.call(EntryAppears, CONTROL_SOCKETS, f"{name}.sock")
    command = [os.environ["SABOTAGED_PROGRAM"], *arguments, name]
    program = thread.call(subprocess.Popen, command, preexec_fn=lambda: die_with_parent(True))

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        thread.call(connection.connect, str(CONTROL_SOCKETS / f"{name}.sock"))
        return connection

    def is_listening() -> bool:
        with suppress(ConnectionRefusedError), connect():
            return True
        return False

    try:
        wait_for(ready, 5.0, "the real program's socket")
        # The program binds its socket, which creates the file, a moment before it listens.
        poll_until(is_listening, bool, 5.0)
        serve(name, UapiControl(name, connect), getattr(Saboteur(), sabotage))
    finally:
        program.terminate()
        program.wait()


if __name__ == "__main__":
    main()
