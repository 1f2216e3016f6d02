"""Start the program: command line, interface, UAPI socket, daemon, loop.

Takes the place of the driver's main.c. Command line and environment are wireguard-go's.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, NoReturn, TextIO

from refwg import uapi_socket
from refwg.errors import InterfaceGoneError, OptionError
from refwg.loop import STOPPING_SIGNALS, Loop
from refwg.tun import TUN_DEVICE, Tun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from refwg.boundary import Watcher
    from refwg.uapi_socket import SocketFile

_HELP: Final = """\
A WireGuard interface in userspace, written to be read: it does what the Linux driver does, one packet at a time.

refwg makes the interface NAME and the socket /var/run/wireguard/NAME.sock, by which wg(8) configures it as it would
configure the driver's. Then it goes into the background. A tunnel, by hand:

  refwg wg0
  wg set wg0 listen-port 51820 private-key ./key peer PUBLIC_KEY allowed-ips 10.0.0.2/32 endpoint 192.0.2.1:51820
  ip address add 10.0.0.1/24 dev wg0
  ip link set wg0 up

or with a configuration file: WG_QUICK_USERSPACE_IMPLEMENTATION=refwg wg-quick up wg0

"refwg selftest" makes no interface: it checks the parts that all else rests on, and ends with status 0 if all are well.
"""
_EPILOG: Final = """\
Once the command has come back, or in the foreground once the socket file is there, wg(8) is answered. The process ends,
and takes interface and socket with it, on SIGTERM and SIGINT, and when the interface or the socket file is removed. An
interface that is moved to another network namespace is followed; the UDP sockets stay where the process was started.

--drop-privileges USER keeps of root's rights CAP_NET_ADMIN, CAP_NET_RAW and CAP_NET_BIND_SERVICE: keys, peers, ports,
marks and the link may change as before. Only to follow an interface to another namespace takes more, so do not move it.
A helper of a few lines stays root until the end, to remove the socket file then.

environment:
  LOG_LEVEL              verbose (or debug), error (the default) or silent; logs go to standard error
  WG_PROCESS_FOREGROUND  1: as --foreground
  WG_TUN_FD              use this descriptor of a TUN interface (IFF_NO_PI) instead of making one
  WG_UAPI_FD             use this descriptor of a listening socket instead of making one

exit status: 0 ended as it was told to, or is ready in the background; 1 could not start, or a self-test failed; 2 usage
"""
_LEVELS: Final = {"verbose": 2, "debug": 2, "info": 1, "error": 1, "silent": 0}
_MAX_NAME: Final = 15
_SELFTEST: Final = "selftest"
_READY: Final = b"+"


def main(arguments: Sequence[str] | None = None) -> int:
    _occupy_standard_streams()
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.version:
        sys.stdout.write(f"refwg {_version()}\n")
        return 0
    if options.name == _SELFTEST:
        from refwg import selftest  # noqa: PLC0415 - no interface needs it

        return selftest.main()
    if not options.name or len(os.fsencode(options.name)) > _MAX_NAME or "/" in options.name:
        parser.error(f"NAME must be that of an interface, at most {_MAX_NAME} bytes without a slash")
    if options.mutant is not None:
        _break(parser, options.mutant)
    try:
        return _run(options)
    except (OSError, OptionError, InterfaceGoneError) as error:
        sys.stderr.write(f"refwg: {options.name}: {_explained(error)}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refwg", description=_HELP, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="name of the interface, or selftest")
    parser.add_argument("-f", "--foreground", action="store_true", help="do not go into the background")
    parser.add_argument("--engine", choices=["simple"], default="simple", help="how packets are moved")
    parser.add_argument("--trace", metavar="FILE", help="append every decision, timer and drop as JSON lines")
    parser.add_argument("--keylog", metavar="FILE", help="append the keys of all handshakes, for Wireshark: not safe")
    parser.add_argument("--drop-privileges", metavar="USER", help="become this user, with the rights that are needed")
    parser.add_argument("--version", action="store_true", help="print the version and end")
    parser.add_argument("--mutant", metavar="NAME", help=argparse.SUPPRESS)
    return parser


def _run(options: argparse.Namespace) -> int:
    """Make what can fail, and go into the background if that is wanted; the exit status, in either process."""
    log = _Log(options.name, _LEVELS.get(os.environ.get("LOG_LEVEL", "error"), 1))
    watcher = _watcher(options, log)
    tun = _tun(options.name)
    with _held_back(STOPPING_SIGNALS):
        return _run_with(tun, watcher, options, log)


def _run_with(tun: Tun, watcher: Watcher | None, options: argparse.Namespace, log: _Log) -> int:
    listener, file = _listener(tun.link.name)
    try:
        loop = Loop(tun, listener, watcher=watcher, log_error=log.error)
        if options.foreground or os.environ.get("WG_PROCESS_FOREGROUND") == "1":
            _serve(loop, file, options.drop_privileges, lambda: None)
        reader, writer = os.pipe()
        child = os.fork()
        if child:
            os.close(writer)
            return 0 if os.read(reader, 1) == _READY else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or 1
        os.close(reader)
        _leave_session()
        _serve(loop, file, options.drop_privileges, lambda: _let_go(writer, keeps_errors=log.level > 1))
    except BaseException:
        file.remove()
        raise


@contextmanager
def _held_back(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Who sees the socket file may tell us to end; until the loop can heed that and remove the file, it has to wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(loop: Loop, file: SocketFile, user: str | None, tell_ready: Callable[[], None]) -> NoReturn:
    """Run the loop, as another user if one is given, and with it end the process."""
    loop.stop_when_removed(file)
    if user is not None:
        from refwg import crypto, privileges  # noqa: PLC0415 - who stays root need not wait for it

        crypto.load()
        privileges.at_our_end(file.remove)
        privileges.drop(user)
    loop.start()
    tell_ready()
    loop.run()
    file.remove()
    # All is written and closed; to take a large configuration apart object by object would only take time.
    os._exit(0)


def _occupy_standard_streams() -> None:
    """If we were started without one of the first three descriptors, none of our own may take its place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # noqa: PLR2004 - 0, 1, 2
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - as long as the process lives


def _tun(name: str) -> Tun:
    given = _descriptor("WG_TUN_FD")
    if given is None:
        return Tun.create(name)
    try:
        return Tun(given)
    except InterfaceGoneError as error:
        raise OptionError(f"WG_TUN_FD={given}: that is no TUN interface") from error


def _listener(name: str) -> tuple[socket.socket, SocketFile]:
    given = _descriptor("WG_UAPI_FD")
    listener = uapi_socket.listen(name) if given is None else socket.socket(fileno=given)
    return listener, uapi_socket.SocketFile(listener)


def _descriptor(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not (text.isdecimal() and text.isascii()):
        raise OptionError(f"{variable}={text}: want the number of an open descriptor")
    return int(text)


def _watcher(options: argparse.Namespace, log: _Log) -> Watcher | None:
    if not options.trace and not options.keylog and log.level <= 1:
        return None
    # Imported late: whoever wants no trace need not wait for the JSON module.
    from refwg.trace import FileWatcher  # noqa: PLC0415

    debug = log.debug if log.level > 1 else None
    return FileWatcher(_appended(options.trace), _appended(options.keylog), debug, log.error)


def _appended(name: str | None) -> TextIO | None:
    """Open a file for its owner only: there may be keys in it."""
    if not name:
        return None
    return open(name, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600))


def _leave_session() -> None:
    """Leave terminal and directory of whoever started us."""
    os.setsid()
    os.chdir("/")


def _let_go(writer: int, *, keeps_errors: bool) -> None:
    """Tell whoever started us that we are ready, and hold on to none of its files."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1) if keeps_errors else (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    os.write(writer, _READY)
    os.close(writer)


class _Log:
    """Lines on standard error, as far as they are wanted; where that cannot be written, nothing is lost but they."""

    def __init__(self, name: str, level: int) -> None:
        self.level = level
        self._name = name

    def debug(self, message: str) -> None:
        self._write("DEBUG", message)

    def error(self, message: str) -> None:
        if self.level:
            self._write("ERROR", message)

    def _write(self, kind: str, message: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{kind}: ({self._name}) {message}\n")
            sys.stderr.flush()


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
    if isinstance(error, PermissionError) and error.filename == TUN_DEVICE:
        return f"{error}: only its owner may open it; be root, or as root: chmod 0666 {TUN_DEVICE}"
    if isinstance(error, PermissionError):
        return f"{error}; CAP_NET_ADMIN is needed: be root, or in a user namespace of your own"
    if isinstance(error, FileNotFoundError) and error.filename == TUN_DEVICE:
        return f"{error}: the kernel has no TUN interfaces here; modprobe tun"
    if isinstance(error, OSError) and error.errno == errno.EBUSY:
        return f"{error}: there is an interface of that name already"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
