"""Import the modules of a Python program once, and fork a process for each of its starts.

    python -P fork_server.py DESCRIPTOR MODULE...

DESCRIPTOR: of a socket (SOCK_SEQPACKET) to the process that started us; each message is one JSON object. We end when it
is closed. The first message is ours: the modules are imported, or `error`. A request has a number, which its answer
repeats. `start` starts the program as `python -m` would: its words
from the module on, with `env` and `cwd`, and with three descriptors: for its output, of its network namespace, of its
mount namespace. The answer has its pid, and a pidfd. `reap` names the pid of a process that has ended, and is answered
by its exit status. A request that fails is answered by `error`.

This is a program of its own that imports only the standard library: what it imports, its children have imported too.
It has one thread, because a forked process has no other threads. Sources: fork(2), setns(2), pidfd_open(2), unix(7).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWNET: Final = 0x40000000
LARGEST: Final = 1 << 20  # bytes of a message
READY: Final = 0  # number of the first answer, to no request
DESCRIPTORS: Final = 3  # of a request, at most
_STANDARD_STREAMS: Final = (0, 1, 2)
_ALL: Final = (1 << 31) - 1

_libc = ctypes.CDLL(None, use_errno=True)


def preload(modules: Sequence[str]) -> None:
    """Import these modules. One that is called `__main__` can still be run: nothing refers to the imported one."""
    for name in modules:
        importlib.import_module(name)
        if name.rpartition(".")[2] == "__main__":
            # Else runpy would warn that it runs a module which is imported already.
            del sys.modules[name]
    # The collector writes into the objects that it looks at, and so would copy their pages in every child.
    gc.collect()
    gc.freeze()


def serve(requests: socket.socket) -> list[str] | None:
    """Answer requests until the socket is closed; then returns None. In a new process returns the words to run."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, LARGEST, DESCRIPTORS)
        if not data:
            return None
        request = json.loads(data)
        answer: dict[str, Any] = {"number": request["number"]}
        pidfd = []
        try:
            if "reap" in request:
                _, status = os.waitpid(request["reap"], 0)
                answer["status"] = os.waitstatus_to_exitcode(status)
            else:
                answer["pid"] = os.fork()
        except OSError as error:
            answer["error"] = error.strerror
        if answer.get("pid") == 0:
            become(request["env"], request["cwd"], *descriptors)
            words: list[str] = request["start"]
            return words
        if "pid" in answer:
            # The child does the same; whichever is first.
            with suppress(OSError):
                os.setpgid(answer["pid"], answer["pid"])
            pidfd = [os.pidfd_open(answer["pid"])]
        socket.send_fds(requests, [json.dumps(answer).encode()], pidfd)
        for descriptor in (*descriptors, *pidfd):
            os.close(descriptor)


def become(env: dict[str, str], cwd: str, output: int, network: int, mounts: int) -> None:
    """Give this new process the streams, namespaces, environment and directory that the program would start with."""
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDONLY)
    for stream, descriptor in zip(_STANDARD_STREAMS, (null, output, output), strict=True):
        os.dup2(descriptor, stream)
    for descriptor, kind in ((network, CLONE_NEWNET), (mounts, CLONE_NEWNS)):
        if _libc.setns(descriptor, kind) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"setns: {os.strerror(number)}")
    os.closerange(len(_STANDARD_STREAMS), _ALL)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)


def main() -> None:
    """Serve the socket; in a new process, run the program."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    try:
        preload(sys.argv[2:])
    except Exception as error:  # noqa: BLE001 - whatever a module raises is the reason
        requests.send(json.dumps({"number": READY, "error": f"{type(error).__name__}: {error}"}).encode())
        return
    requests.send(json.dumps({"number": READY}).encode())
    words = serve(requests)
    # In a new process the descriptor is closed already, and may have another owner.
    requests.detach()
    if words is not None:
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
