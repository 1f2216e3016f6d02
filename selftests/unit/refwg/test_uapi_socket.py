from __future__ import annotations

import resource
import select
import selectors
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from refwg import uapi_socket
from refwg.uapi_socket import Control
from selftests.support.pair import Pair

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from refwg.device import Effect


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the socket of wg0, below a temporary directory."""
    monkeypatch.setattr(uapi_socket, "DIRECTORY", tmp_path / "run" / "wireguard")
    return uapi_socket.socket_path("wg0")


class Server:
    """A control socket of side A, and a loop for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.side = Pair().a
        self.effects: list[Effect] = []
        self.selector = selectors.DefaultSelector()
        self.listener = uapi_socket.listen("wg0")
        Control(
            self.listener,
            self.selector,
            self.side.device,
            self.side.sockets,
            clock=lambda: 0,
            carry_out=self.effects.extend,
        )

    def turn(self) -> None:
        """Handle all events that are ready."""
        while ready := self.selector.select(0):
            for key, events in ready:
                key.data(events)

    def client(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(2)
        client.connect(str(self.path))
        return client

    def close(self) -> None:
        self.turn()
        self.selector.close()
        self.listener.close()


@pytest.fixture
def server(path: Path) -> Iterator[Server]:
    server = Server(path)
    yield server
    server.close()


@pytest.mark.requirement("CFG-40")
def test_control_socket_has_mode_0600_and_directory_0755(server: Server) -> None:
    assert server.path.stat().st_mode & 0o777 == 0o600
    assert server.path.parent.stat().st_mode & 0o777 == 0o755


def test_existing_directory_keeps_its_mode(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o700)
    uapi_socket.listen("wg0").close()
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_stale_control_socket_is_replaced(path: Path) -> None:
    uapi_socket.listen("wg0").close()
    assert path.exists()
    uapi_socket.listen("wg0").close()


def test_control_socket_in_use_is_not_replaced(server: Server) -> None:
    with pytest.raises(OSError, match="Address already in use"):
        uapi_socket.listen("wg0")
    assert server.path.exists()


@pytest.mark.requirement("CFG-54")
@pytest.mark.parametrize("is_replaced", [False, True])
def test_control_socket_is_removed_unless_it_was_replaced(path: Path, is_replaced: bool) -> None:
    listener = uapi_socket.listen("wg0")
    file = uapi_socket.SocketFile(listener)
    assert file.is_there
    if is_replaced:
        path.rename(path.with_name("away"))
        uapi_socket.listen("wg0").close()
    assert file.is_there is not is_replaced
    file.remove()
    file.remove()
    assert path.exists() is is_replaced
    listener.close()


def test_unbound_socket_has_no_file_to_remove() -> None:
    with socket.socket(socket.AF_UNIX) as unbound:
        file = uapi_socket.SocketFile(unbound)
        file.remove()
    assert (file.path, file.is_there) == (None, False)


def test_clients_are_disconnected_while_no_descriptor_is_free(server: Server) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with server.client() as client, server.client() as late, socket.socket() as highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno(), before[1]))
        server.turn()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert [client.recv(100), late.recv(100)] == [b"errno=-24\n\n"] * 2
    with server.client() as client:
        client.sendall(b"get=1\n\n")
        server.turn()
        assert client.recv(100000).endswith(b"errno=0\n\n")


@pytest.mark.bug("IB-77")
def test_socket_that_refuses_for_shortage_is_not_replaced(server: Server) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def turn_without_descriptors() -> None:
        wait_until_readable(server.listener)
        with socket.socket() as highest:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno(), before[1]))
            server.turn()
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

    thread = threading.Thread(target=turn_without_descriptors)
    thread.start()
    with pytest.raises(OSError, match="Address already in use"):
        uapi_socket.listen("wg0")
    thread.join()
    assert server.path.exists()


def wait_until_readable(listener: socket.socket) -> None:
    assert select.select([listener], [], [], 10)[0]


@pytest.mark.bug("IB-77")
def test_control_socket_with_full_backlog_is_not_replaced(path: Path) -> None:
    listener = uapi_socket.listen("wg0")
    listener.listen(0)
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(path))
        with pytest.raises(OSError, match="Address already in use"):
            uapi_socket.listen("wg0")
    assert path.exists()
    listener.close()


def test_listen_waits_until_ending_process_closes_its_socket(path: Path) -> None:
    dying = uapi_socket.listen("wg0")
    closes = threading.Timer(0.2, dying.close)
    closes.start()
    uapi_socket.listen("wg0").close()
    closes.join()
    assert path.exists()


@pytest.mark.requirement("CFG-53", "CFG-55")
def test_client_is_answered_while_other_request_is_incomplete(server: Server) -> None:
    with server.client() as first, server.client() as second:
        first.sendall(b"set=1\nfwmark=7\n")
        second.sendall(b"set=1\nfwmark=8\n\n")
        server.turn()
        assert second.recv(1000) == b"errno=0\n\n"
        first.sendall(b"\nget=1\n\n")
        server.turn()
        assert b"\nfwmark=7\n" in first.recv(10000)


@pytest.mark.requirement("CFG-53")
def test_unknown_operation_closes_connection(server: Server) -> None:
    with server.client() as client:
        client.sendall(b"get=2\n\n")
        server.turn()
        assert client.recv(1000) == b""


def test_effects_of_request_are_carried_out(server: Server) -> None:
    with server.client() as client:
        key = server.side.peer.public_key.hex()
        client.sendall(f"set=1\npublic_key={key}\npersistent_keepalive_interval=5\n\n".encode())
        server.turn()
    assert len(server.effects) == 1


def test_early_disconnect_of_client_changes_nothing(server: Server) -> None:
    with server.client() as client:
        client.sendall(b"set=1\nfwm")
    server.turn()
    client = server.client()
    client.sendall(b"get=1\n\n" * 100)
    client.close()
    server.turn()
    assert server.side.device.fwmark == 0


@pytest.mark.requirement("AIP-17")
def test_answer_with_thousands_of_allowed_ips_is_complete(server: Server) -> None:
    prefixes = "".join(f"allowed_ip=10.{number >> 8}.{number & 255}.0/24\n" for number in range(5_000))
    with server.client() as client:
        client.setblocking(False)
        request = f"set=1\npublic_key={'aa' * 32}\n{prefixes}\nget=1\n\n".encode()
        received = b""
        while not received.endswith(b"errno=0\n\n") or received.count(b"errno") < 2:
            try:
                request = request[client.send(request) :] if request else request
                received += client.recv(1 << 16)
            except BlockingIOError:
                server.turn()
    assert received.count(b"allowed_ip") == 5_002
