"""Drop root's privileges: another user, and only the capabilities that refwg needs.

The driver has no such file. The standard library lacks prctl(2) and capset(2), so they are called through ctypes. See
capabilities(7).
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Final

from refwg.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

# In this order: for listen ports below 1024; for fwmark and for setting the interface down; for ICMP errors.
_CAP_NET_BIND_SERVICE: Final = 10
_CAP_NET_ADMIN: Final = 12
_CAP_NET_RAW: Final = 13
KEPT: Final = 1 << _CAP_NET_BIND_SERVICE | 1 << _CAP_NET_ADMIN | 1 << _CAP_NET_RAW

_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_CAPABILITY_HEADER: Final = Struct("=LL")
# Effective, permitted, inheritable: first the lower, then the upper 32 capabilities.
_CAPABILITY_DATA: Final = Struct("=6L")
_LOWER: Final = 0xFFFFFFFF


def drop(user: str) -> None:
    """Change to this user and keep only `KEPT`, which cannot be undone.

    Raises OptionError if the user does not exist, and OSError if the system refuses a step.
    """
    try:
        entry = pwd.getpwnam(user)
    except KeyError as error:
        raise OptionError(f"--drop-privileges {user}: this user does not exist") from error
    libc = ctypes.CDLL(None, use_errno=True)
    kept = KEPT & _permitted()
    for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        if not kept >> capability & 1:
            _call("prctl(PR_CAPBSET_DROP)", libc.prctl, _PR_CAPBSET_DROP, capability, 0, 0, 0)
    _call("prctl(PR_SET_KEEPCAPS)", libc.prctl, _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    _change_groups(user, entry.pw_gid)
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    header = _CAPABILITY_HEADER.pack(_CAPABILITY_VERSION_3, 0)
    data = _CAPABILITY_DATA.pack(kept & _LOWER, kept & _LOWER, 0, kept >> 32, kept >> 32, 0)
    _call("capset", libc.capset, header, data)
    _call("prctl(PR_CAP_AMBIENT)", libc.prctl, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _call("prctl(PR_SET_NO_NEW_PRIVS)", libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def at_our_end(task: Callable[[], None]) -> None:
    """Call `task` with the present privileges when this process ends, even if it is killed.

    A forked helper waits for the end of the process; call it before `drop`.
    """
    reader, _ = os.pipe()
    if os.fork():
        # The write end stays open until the kernel closes it at the end of this process.
        os.close(reader)
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    os.chdir("/")
    # An open TUN descriptor here would keep the interface alive after the process has ended.
    os.closerange(0, reader)
    os.closerange(reader + 1, os.sysconf("SC_OPEN_MAX"))
    try:
        os.read(reader, 1)
        with suppress(OSError):
            task()
    finally:
        os._exit(0)


def _change_groups(user: str, group: int) -> None:
    try:
        os.initgroups(user, group)
    except PermissionError:
        # Groups cannot be changed in a user namespace that an ordinary user has made (user_namespaces(7)).
        if Path("/proc/self/setgroups").read_text().strip() != "deny":
            raise


def _permitted() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("CapPrm:"))


def _call(name: str, function: Callable[..., int], *arguments: int | bytes) -> None:
    if function(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
