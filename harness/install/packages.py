"""Name the command that installs packages on this distribution, by Debian's names for them."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from harness.tables import Table

TABLE: Final = Path(__file__).with_name("packages.toml")
_UID_MAP: Final = Path("/proc/self/uid_map")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Distributions that install packages by the same command.

    ids: of os-release(5). packages: Debian's name -> the names here, separated by spaces, where they differ.
    """

    name: str
    ids: tuple[str, ...]
    install: str
    packages: Mapping[str, str]

    def names(self, debian: Iterable[str]) -> list[str]:
        """Return what these packages are called here, each once."""
        found = (name for package in debian for name in self.packages.get(package, package).split())
        return list(dict.fromkeys(found))


@cache
def families() -> tuple[Family, ...]:
    """Return the families of the table."""
    return tuple(_family(row) for row in read_toml(TABLE, TABLE.name).tables("family"))


def _family(row: Table) -> Family:
    found = Family(
        name=row.text("name"), ids=row.words("ids"), install=row.text("install"), packages=row.strings("packages")
    )
    row.refuse_rest()
    return found


def family() -> Family | None:
    """Return the family of this machine's distribution, by os-release(5); None if it is in no family of the table.

    ID decides; ID_LIKE names the distributions that it comes from, the nearest first.
    """
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return None
    for name in (release["ID"], *release.get("ID_LIKE", "").split()):
        for known in families():
            if name in known.ids:
                return known
    return None


def install_command(debian: Iterable[str]) -> str:
    """Return the command that installs these packages here; for an unknown distribution, what to look for.

    It begins with sudo unless this process is root, also outside of user namespaces.
    """
    here = family()
    if here is None:
        wanted = " ".join(dict.fromkeys(debian))
        return f"install {wanted} (Debian's names) with the package manager of this distribution"
    return f"{'' if is_root() else 'sudo '}{here.install} {' '.join(here.names(debian))}"


def is_root() -> bool:
    """Return whether this process may install packages: not so in the sandbox of an ordinary user.

    There it is root in a user namespace that has this user alone; in a container, a user namespace has more users.
    """
    users = sum(int(line.split()[2]) for line in _UID_MAP.read_text().splitlines())
    return os.geteuid() == 0 and users > 1
