"""The program: reads the command line, makes interface and UAPI socket, becomes a daemon, runs the loop.

Mirrors main.c of the driver in place, and wireguard-go in how it is started.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from refwg import control
from refwg.loop import Loop
from refwg.tun import InterfaceGoneError, Tun

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from refwg.boundary import Watcher

_HELP: Final = """\
A WireGuard interface in userspace, written to be read: it does what the Linux driver does, one packet at a time.

refwg makes the interface NAME and the socket /var/run/wireguard/NAME.sock, by which wg(8) configures it as it would
configure the driver's. Then it goes into the background. A tunnel, by hand:

  refwg wg0
  wg set wg0 listen-port 51820 private-key ./key peer PUBLIC_KEY allowed-ips 10.0.0.2/32 endpoint 192.0.2.1:51820
  ip address add 10.0.0.1/24 dev wg0
  ip link set wg0 up

or with a configuration file: WG_QUICK_USERSPACE_IMPLEMENTATION=refwg wg-quick up wg0
"""
_EPILOG: Final = """\
The process ends, and takes the interface with it, on SIGTERM and SIGINT, and when the interface or the socket file is
removed.

environment:
  LOG_LEVEL              verbose (or debug), error (the default) or silent; logs go to standard error
  WG_PROCESS_FOREGROUND  1: as --foreground
  WG_TUN_FD              use this descriptor of a TUN interface (IFF_NO_PI) instead of making one
  WG_UAPI_FD             use this descriptor of a listening socket instead of making one

exit status: 0 ended as it was told to, 1 could not start, 2 usage
"""
_LEVELS: Final = {"verbose": 2, "debug": 2, "info": 1, "error": 1, "silent": 0}
_MAX_NAME: Final = 15


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.version:
        sys.stdout.write(f"refwg {_version()}\n")
        return 0
    if not options.name or len(options.name) > _MAX_NAME or "/" in options.name:
        parser.error(f"NAME must be that of an interface, at most {_MAX_NAME} characters")
    if options.mutant is not None:
        _break(parser, options.mutant)
    try:
        loop = _start(options)
    except (OSError, InterfaceGoneError) as error:
        sys.stderr.write(f"refwg: {options.name}: {_explained(error)}\n")
        return 1
    if loop is not None:
        loop.run()
        control.socket_path(options.name).unlink(missing_ok=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refwg", description=_HELP, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="name of the interface")
    parser.add_argument("-f", "--foreground", action="store_true", help="do not go into the background")
    parser.add_argument("--engine", choices=["simple"], default="simple", help="how packets are moved")
    parser.add_argument("--trace", metavar="FILE", help="append every decision, timer and drop as JSON lines")
    parser.add_argument("--keylog", metavar="FILE", help="append the keys of all handshakes, for Wireshark: not safe")
    parser.add_argument("--version", action="store_true", help="print the version and end")
    parser.add_argument("--mutant", metavar="NAME", help=argparse.SUPPRESS)
    return parser


def _start(options: argparse.Namespace) -> Loop | None:
    """Make everything that can fail, then let the shell have its prompt back; None in the process that ends."""
    level = _LEVELS.get(os.environ.get("LOG_LEVEL", "error"), 1)
    watcher = _watcher(options, _logger("DEBUG", options.name) if level > 1 else None)
    tun = _tun(options.name)
    try:
        listener = _listener(options.name)
    except BaseException:
        tun.close()
        raise
    loop = Loop(tun, listener, watcher=watcher, log_error=_logger("ERROR", options.name) if level else _ignore)
    if not options.foreground and os.environ.get("WG_PROCESS_FOREGROUND") != "1":
        if os.fork():
            return None
        _detach(keeps_errors=level > 1)
    path = Path(listener.getsockname())
    if path.exists():
        loop.stop_when_removed(path)
    return loop


def _tun(name: str) -> Tun:
    given = os.environ.get("WG_TUN_FD")
    return Tun(int(given)) if given else Tun.create(name)


def _listener(name: str) -> socket.socket:
    given = os.environ.get("WG_UAPI_FD")
    return socket.socket(fileno=int(given)) if given else control.listen(name)


def _watcher(options: argparse.Namespace, debug: Callable[[str], None] | None) -> Watcher | None:
    if not options.trace and not options.keylog and debug is None:
        return None
    # Imported late: whoever wants no trace need not wait for the JSON module.
    from refwg.trace import FileWatcher  # noqa: PLC0415

    return FileWatcher(_appended(options.trace), _appended(options.keylog), debug)


def _appended(name: str | None) -> TextIO | None:
    """Open a file for its owner only: there may be keys in it."""
    if not name:
        return None
    descriptor = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "a")


def _detach(*, keeps_errors: bool) -> None:
    """Leave terminal, session and directory of whoever started us."""
    os.setsid()
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1) if keeps_errors else (0, 1, 2):
        os.dup2(nothing, descriptor)


def _logger(level: str, name: str) -> Callable[[str], None]:
    def log(message: str) -> None:
        with suppress(OSError):
            sys.stderr.write(f"{level}: ({name}) {message}\n")
            sys.stderr.flush()

    return log


def _ignore(_: str) -> None:
    pass


def _break(parser: argparse.ArgumentParser, name: str) -> None:
    from refwg import mutants  # noqa: PLC0415 - out of reach unless asked for

    variable, value = mutants.PERMISSION
    if os.environ.get(variable) != value or name not in mutants.MUTANTS:
        parser.error(f"--mutant: needs {variable}={value} and one of: {', '.join(mutants.MUTANTS)}")
    mutants.apply(name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow, and seldom wanted

    try:
        return version("wg-interop")
    except PackageNotFoundError:
        return "unknown"


def _explained(error: Exception) -> str:
    if isinstance(error, InterfaceGoneError):
        return str(error) or "the interface is gone"
    if isinstance(error, PermissionError):
        return f"{error}; CAP_NET_ADMIN is needed: be root, or in a user namespace of your own"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
