"""Make bare Debian roots by debootstrap from this machine's mirrors, cached as archives."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from ci.enter_root import command_line
from ci.setup_checkout import ROOT
from harness.errors import Unavailable
from harness.install.cache import Area, building, directory, locked, remove
from harness.install.debian import apt_install
from harness.install.tools import ToolFailed, run_tool

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from harness.install.progress import Step

MIRROR: Final = "http://deb.debian.org/debian/"
SECURITY_MIRROR: Final = "http://deb.debian.org/debian-security/"
ARCHIVE: Final = "root.tar.gz"
# One row per source of apt: mirror, release, component, origin. The origin is empty before `apt-get update`.
_TARGETS: Final = ("apt-get", "indextargets", "--format", "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Sources of a Debian release. mirror: URL of the release itself. lines: all sources, for sources.list(5)."""

    mirror: str
    lines: str


def sources(suite: str, targets: str) -> Sources:
    """Choose the sources of a Debian release: those of this machine's apt, or deb.debian.org if apt has none.

    suite: the release, `bookworm`. targets: rows that `apt-get indextargets` prints in the format of _TARGETS.
    """
    wanted = (suite, f"{suite}-updates", f"{suite}-security")
    rows = [row.split("|") for row in targets.splitlines()]
    mirrors = {
        release: mirror
        for mirror, release, component, origin in rows
        if release in wanted and component == "main" and origin in {"Debian", ""}
    }
    if suite not in mirrors:
        mirrors = dict(zip(wanted, (MIRROR, MIRROR, SECURITY_MIRROR), strict=True))
    lines = "".join(f"deb {mirror} {release} main\n" for release, mirror in mirrors.items())
    return Sources(mirror=mirrors[suite], lines=lines)


def machine_sources(suite: str) -> Sources:
    """Choose the sources of a Debian release on this machine; ToolFailed if apt-get fails."""
    return sources(suite, run_tool([*_TARGETS, "Created-By: Packages"], lambda _: None))


def ensure_programs(programs: Sequence[str], step: Step) -> None:
    """Install missing programs, each from the package of the same name; Unavailable if that fails."""
    missing = [program for program in programs if shutil.which(program) is None]
    step.note = f"installed {', '.join(missing)}" if missing else "all installed"
    if not missing:
        return
    try:
        apt_install(missing, step.on_line)
    except ToolFailed as error:
        raise Unavailable(
            f"missing: {', '.join(missing)} ({error}); try: apt-get install {' '.join(missing)}"
        ) from error


def archive(suite: str, packages: Sequence[str], proxy: str | None, step: Step) -> Path:
    """Return the path of an archive of a minimal Debian root with these packages, which is made at most once a week.

    proxy: for http, None for the environment's. Raises ToolFailed if debootstrap fails.
    """
    year, week, _ = datetime.now(UTC).isocalendar()
    target = directory(Area.ROOTS) / f"{suite}-{year}-W{week:02}-{'+'.join(packages)}"
    with locked(target, step.on_line):
        step.note = f"from the cache: {target}"
        if not (target / ARCHIVE).exists():
            with building(target) as part:
                _bootstrap(suite, packages, proxy, part, step)
            for old in target.parent.glob(f"{suite}-*"):
                if old != target:
                    remove(old)
            step.note = f"stored in {target}"
    return target / ARCHIVE


def _bootstrap(suite: str, packages: Sequence[str], proxy: str | None, part: Path, step: Step) -> None:
    root = part / "root"
    environ = os.environ | ({"http_proxy": proxy} if proxy else {})
    options = ("--variant=minbase", f"--include={','.join(packages)}")
    # In namespaces of its own, so that debootstrap's mounts end with it.
    command = command_line("debootstrap", *options, suite, str(root), machine_sources(suite).mirror)
    run_tool(command, step.on_line, env=environ, cwd=ROOT)
    step.on_line("packing the root")
    for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
        remove(root / folder)
        # apt fails without these folders.
        (root / folder / "partial").mkdir(parents=True)
    packing = ["tar", "--create", "--numeric-owner", f"--file={part / ARCHIVE}", "--use-compress-program=gzip -1"]
    run_tool([*packing, f"--directory={root}", "."], step.on_line)
    remove(root)


def http_proxy(apt_options: str) -> str | None:
    """Return the proxy for http in lines of apt.conf(5), None if they name none."""
    match = re.search(r'^Acquire::http::Proxy "(.+)";$', apt_options, re.MULTILINE)
    return match[1] if match else None
