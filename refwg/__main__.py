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
from refwg.engine.offloads import OFFLOADS
from refwg.errors import ForbiddenNamespace, InterfaceGoneError, OptionError, Shortage, UnsuitableMachine
from refwg.loop import (
    MAX_WORKERS,
    STOPPING_SIGNALS,
    EngineChoice,
    Loop,
    load_batch_engine,
    load_parallel_engine,
)
from refwg.shortage import SHORTAGES, reason
from refwg.tun import TUN_DEVICE, Tun, name_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from refwg.boundary import Watcher
    from refwg.uapi_socket import SocketFile

_HELP: Final = """\
A WireGuard interface in userspace, written to be easy to read. It behaves like the Linux driver. There are two
engines: the simple one handles one packet at a time; the batch engine handles many at a time, by the kernel's
offloads, and needs numpy.

refwg makes the interface NAME and the socket /var/run/wireguard/NAME.sock, and then goes into the background. In a NAME
such as wg%d the kernel replaces %d by the first free number; the log on standard error names the interface. wg(8)
configures the interface like one of the driver. To make a tunnel:

  refwg wg0
  wg set wg0 listen-port 51820 private-key ./key peer PUBLIC_KEY allowed-ips 10.0.0.2/32 endpoint 192.0.2.1:51820
  ip address add 10.0.0.1/24 dev wg0
  ip link set wg0 up

With a configuration file: WG_QUICK_USERSPACE_IMPLEMENTATION=refwg wg-quick up wg0

"refwg selftest" makes no interface. It checks the primitives, the replay window, the rate limiter and the allowed-ips
table, and exits with status 0 if all checks pass.
"""
_EPILOG: Final = """\
wg(8) can configure the interface as soon as the command returns, or with --foreground as soon as the socket file
exists. SIGTERM, SIGINT, or removing the interface or the socket file ends the process; interface and socket file are
then removed.

The interface may be moved to another network namespace. The UDP sockets stay in the namespace of the process.

When descriptors, memory, buffers or disk space run out, refwg logs the shortage and its remedy, at most once a minute
each, and goes on: packets may be lost, and new connections to the control socket are refused until it is over.

By default the simple engine begins, and the batch engine takes over when there are many packets to move. Each offload
that the kernel lacks is done without; --no-offload does without it in any case. --trace tells the engine, the
offloads that are on, and how often each was used.

--workers N makes N processes encrypt and decrypt for the batch engine, on cores of their own. Packets keep their order.
A worker that dies or hangs is replaced; the packets that it had are lost, and counted under WORKER_DIED in the trace.

--drop-privileges USER keeps only CAP_NET_ADMIN, CAP_NET_RAW and CAP_NET_BIND_SERVICE. Keys, peers, ports, marks and the
link can still be changed, but the interface must not be moved to another namespace: refwg then ends with status 1. A
small helper process stays root to remove the socket file at the end.

environment:
  LOG_LEVEL              verbose (or debug), error (the default) or silent; logs go to standard error
  WG_PROCESS_FOREGROUND  1: same as --foreground
  WG_TUN_FD              descriptor of a TUN interface (IFF_NO_PI) to use instead of a new one
  WG_UAPI_FD             descriptor of a listening socket to use instead of a new one

exit status: 0 ended on request, or because the interface or the socket file was removed, or is ready in the background;
1 could not start, could not go on, or a self-test failed; 2 usage
"""
_LEVELS: Final = {"verbose": 2, "debug": 2, "info": 1, "error": 1, "silent": 0}
_SELFTEST: Final = "selftest"
_READY: Final = b"+"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `refwg`; returns the exit status. arguments: None for those of the process.

    The process that serves the interface does not return: `_serve` ends it.
    """
    _occupy_standard_streams()
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.version:
        sys.stdout.write(f"refwg {_version()}\n")
        return 0
    if options.name == _SELFTEST:
        from refwg import selftest  # noqa: PLC0415 - no interface needs it

        return selftest.main()
    if options.name is None:
        parser.error("NAME is missing: the name of the interface to make, such as wg0, or the pattern wg%d")
    problem = name_problem(options.name)
    if problem:
        parser.error(f"NAME {options.name!r}: {problem}")
    if options.workers and options.engine == "simple":
        parser.error("--workers: the simple engine has none: choose --engine auto or batch")
    if options.mutant is not None:
        return _run_mutant(parser, options)
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Make the interface and serve it; prints the reason if that fails. options: of `main`."""
    try:
        return _run(options)
    except (OSError, OptionError, InterfaceGoneError, ForbiddenNamespace, Shortage) as error:
        sys.stderr.write(f"refwg: {options.name}: {_with_remedy(error)}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refwg", description=_HELP, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="interface to make (wg%%d: first free number), or selftest"
    )
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground")
    parser.add_argument(
        "--engine",
        choices=["auto", "simple", "batch"],
        default="auto",
        help="what moves the packets: one at a time (simple), many at a time by offloads and numpy (batch), or simple "
        "until there are many (auto, the default)",
    )
    parser.add_argument(
        "--no-offload",
        metavar="LIST",
        type=_offloads,
        default=frozenset(),
        help=f"offloads that the batch engine must not use, with commas: {', '.join(OFFLOADS)}, or all",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_workers,
        default=0,
        help=f"processes that encrypt and decrypt for the batch engine, 0 to {MAX_WORKERS}; 0, the default: it does so "
        "itself",
    )
    parser.add_argument("--trace", metavar="FILE", help="append every event and drop to FILE, as JSON lines")
    parser.add_argument("--keylog", metavar="FILE", help="append all secret keys to FILE, for Wireshark: unsafe")
    parser.add_argument("--drop-privileges", metavar="USER", help="run as this user, with few capabilities; see below")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--mutant", metavar="NAME", help=argparse.SUPPRESS)
    return parser


def _offloads(text: str) -> frozenset[str]:
    names = frozenset(OFFLOADS if text == "all" else text.split(","))
    unknown = sorted(names - {*OFFLOADS})
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown offload {unknown[0]!r}: expected some of {', '.join(OFFLOADS)}")
    return names


def _workers(text: str) -> int:
    if not (text.isdecimal() and text.isascii() and int(text) <= MAX_WORKERS):
        raise argparse.ArgumentTypeError(f"{text!r} workers: expected a number from 0 to {MAX_WORKERS}")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    """Open files, interface and socket, which may fail, then run in the foreground or background."""
    log = _Log(options.name, _LEVELS.get(os.environ.get("LOG_LEVEL", "error"), 1))
    watcher = _watcher(options, log)
    tun = _tun(options.name, has_headers=options.engine != "simple")
    if tun.link.name != options.name:
        log.name = tun.link.name
        log.named(options.name)
    with _signals_blocked(STOPPING_SIGNALS):
        return _run_with(tun, watcher, options, log)


def _run_with(tun: Tun, watcher: Watcher | None, options: argparse.Namespace, log: _Log) -> int:
    listener, file = _listener(tun.link.name)
    try:
        engine = EngineChoice(options.engine, frozenset(OFFLOADS) - options.no_offload, options.workers)
        loop = Loop(tun, listener, watcher=watcher, log_error=log.error, engine=engine)
        if options.foreground or os.environ.get("WG_PROCESS_FOREGROUND") == "1":
            _serve(loop, file, options, lambda: None)
        reader, writer = os.pipe()
        child = os.fork()
        if child:
            os.close(writer)
            return 0 if os.read(reader, 1) == _READY else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or 1
        os.close(reader)
        _leave_session()
        _serve(loop, file, options, lambda: _detach_and_report(writer, keep_stderr=log.level > 1))
    except BaseException:
        file.remove()
        raise


@contextmanager
def _signals_blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Block these signals until the loop can handle them.

    A user may send SIGTERM as soon as the socket file exists. A process that ends before the loop handles signals would
    leave the file behind.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(loop: Loop, file: SocketFile, options: argparse.Namespace, report_ready: Callable[[], None]) -> NoReturn:
    """Run the loop, then end the process.

    options: of the command line. report_ready: called when the loop can answer wg(8).
    """
    loop.stop_when_removed(file)
    if options.drop_privileges is not None:
        from refwg import crypto, privileges  # noqa: PLC0415 - only needed with --drop-privileges

        # The user may not be allowed to read the files of these modules.
        crypto.load()
        if options.engine != "simple":
            with suppress(UnsuitableMachine, ImportError, OSError):
                load_batch_engine()
                if options.workers:
                    load_parallel_engine()
        privileges.at_our_end(file.remove)
        privileges.drop(options.drop_privileges)
    loop.start()
    report_ready()
    loop.run()
    file.remove()
    # Everything is written and closed. Freeing a large configuration object by object would only take time.
    os._exit(0)


def _occupy_standard_streams() -> None:
    """Open /dev/null for each missing standard stream, so that no descriptor of ours gets its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # noqa: PLR2004 - 0, 1, 2
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or _devnull(), sys.stderr or _devnull()


def _devnull() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - open until the process ends


def _tun(name: str, *, has_headers: bool) -> Tun:
    given = _descriptor("WG_TUN_FD")
    if given is None:
        return Tun.create(name, has_headers=has_headers)
    try:
        return Tun(given)
    except InterfaceGoneError as error:
        raise OptionError(f"WG_TUN_FD={given}: not a TUN interface") from error


def _listener(name: str) -> tuple[socket.socket, SocketFile]:
    given = _descriptor("WG_UAPI_FD")
    listener = uapi_socket.listen(name) if given is None else socket.socket(fileno=given)
    return listener, uapi_socket.SocketFile(listener)


def _descriptor(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not (text.isdecimal() and text.isascii()):
        raise OptionError(f"{variable}={text}: expected the number of an open descriptor")
    return int(text)


def _watcher(options: argparse.Namespace, log: _Log) -> Watcher | None:
    if not options.trace and not options.keylog and log.level <= 1:
        return None
    # Imported late, because importing the JSON module takes time.
    from refwg.trace import FileWatcher, LineFile  # noqa: PLC0415

    debug = log.debug if log.level > 1 else None
    trace, keylog = (LineFile(name, log.error) if name else None for name in (options.trace, options.keylog))
    return FileWatcher(trace, keylog, debug)


def _leave_session() -> None:
    """Detach from the terminal and the directory of the parent process."""
    os.setsid()
    os.chdir("/")


def _detach_and_report(writer: int, *, keep_stderr: bool) -> None:
    """Close the parent's standard streams, and report through `writer` that the process is ready."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1) if keep_stderr else (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    os.write(writer, _READY)
    os.close(writer)


class _Log:
    """Log lines on standard error; a line that cannot be written is dropped.

    level: 2 debug and errors, 1 errors, 0 nothing. name: that of the interface, in each line.
    """

    def __init__(self, name: str, level: int) -> None:
        self.level = level
        self.name = name

    def debug(self, message: str) -> None:
        """Print an event; the caller checks that the level is 2."""
        self._write("DEBUG", message)

    def named(self, pattern: str) -> None:
        """Print the name that the kernel chose for this pattern, unless LOG_LEVEL is silent."""
        if self.level:
            self._write("INFO", f"the interface for {pattern} is {self.name}")

    def error(self, message: str) -> None:
        """Print an error, unless LOG_LEVEL is silent."""
        if self.level:
            self._write("ERROR", message)

    def _write(self, kind: str, message: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{kind}: ({self.name}) {message}\n")
            sys.stderr.flush()


def _run_mutant(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Load refwg again, with one module broken on purpose, and run that."""
    from refwg import mutants  # noqa: PLC0415 - loaded only for --mutant

    variable, value = mutants.PERMISSION
    known = mutants.load_mutants()
    if os.environ.get(variable) != value or options.mutant not in known:
        parser.error(f"--mutant requires {variable}={value} and one of: {', '.join(known)}")
    mutant = known[options.mutant]
    options.engine = mutant.engine or options.engine
    mutants.install(mutant)
    from refwg import __main__ as broken  # noqa: PLC0415, PLW0406 - imports the modules again

    return broken.run(options)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow, and rarely needed

    try:
        return version("wg-interop")
    except PackageNotFoundError:
        return "unknown"


def _with_remedy(error: Exception) -> str:
    if isinstance(error, InterfaceGoneError):
        return "the interface was deleted"
    if isinstance(error, PermissionError):
        return f"{error}: {_permission(error.filename)}"
    if isinstance(error, FileNotFoundError) and error.filename == TUN_DEVICE:
        return f"{error}: the kernel module tun is not loaded; as root: modprobe tun"
    if isinstance(error, OSError) and error.errno == errno.EBUSY:
        return f"{error}: an interface with this name already exists"
    if isinstance(error, OSError) and error.errno in SHORTAGES and not error.filename:
        return f"[Errno {error.errno}] {reason(error.errno)}"
    return str(error)


def _permission(filename: object) -> str:
    if filename == TUN_DEVICE:
        return f"run as root, or allow others to open it, as root: chmod 0666 {TUN_DEVICE}"
    if filename:
        return "the user of refwg needs write permission there"
    return "CAP_NET_ADMIN is needed: run as root, or in a user namespace of your own"


if __name__ == "__main__":
    sys.exit(main())
