"""Stand in for ssh: run the command in namespaces of its own on this machine.

    python ssh.py OPTIONS -- HOST COMMAND

STANDIN_HOME: a directory for the home directories of the hosts. STANDIN_LINKS: a directory with Python packages.
STANDIN_HIDDEN: a directory that is empty for the host. STANDIN_LIMITS, `b=2 c=3`: host b is cut off in its
third test, after the report of its call. Some hosts have a defect by their name: `unreachable`, `old`, `confined`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

# By this variable the test finds the processes of a host (host.Run).
MARK = "WG_INTEROP_FAULT_TEST"
# In the namespaces: hide a directory, for the host named so allow no further namespaces, and run the command.
SCRIPT = """
mount -t tmpfs none "$STANDIN_HIDDEN" || exit 1
[ "$1" != confined ] || echo 0 > /proc/sys/user/max_net_namespaces
cd && exec /bin/sh -c "$0"
"""
OLD = "#!/bin/sh\ncase $2 in *version_info*) exit 1;; esac\necho 3.9.2\n"


def main() -> int:
    host, command = sys.argv[sys.argv.index("--") + 1 :]
    if host == "unreachable":
        sys.stderr.write(f"ssh: connect to host {host} port 22: No route to host\n")
        return 255
    limits = dict(word.split("=") for word in os.environ.get("STANDIN_LIMITS", "").split())
    process = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", SCRIPT, command, host],
        stdout=subprocess.PIPE,
        env=environment(host),
        start_new_session=True,
    )
    assert process.stdout is not None
    left = int(limits.get(host, -1))
    for line in process.stdout:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        left -= b'"when": "teardown"' in line
        # Cut off between two reports of one test.
        if left == 0 and b'"when": "call"' in line:
            os.killpg(process.pid, signal.SIGKILL)
            sys.stderr.write(f"Connection to {host} closed by remote host.\n")
            return 255
    return process.wait()


def environment(host: str) -> dict[str, str]:
    """Return the environment of a login on the host, which has no network: pip must not look for dependencies."""
    homes = Path(os.environ["STANDIN_HOME"])
    home = homes / host
    home.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if host == "old":
        path = str(home)
        (home / "python3").write_text(OLD)
        (home / "python3").chmod(0o755)
        for name in ("sh", "cat", "mount", "unshare"):
            (home / name).unlink(missing_ok=True)
            (home / name).symlink_to(next(p for p in (Path("/bin", name), Path("/usr/bin", name)) if p.exists()))
    ours = ("WG_", "PYTEST", "STANDIN_LIMITS", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if name == MARK or not name.startswith(ours)}
    return kept | {
        "PATH": path,
        "HOME": str(home),
        # Shared, so that the wheel is installed once.
        "XDG_CACHE_HOME": str(homes / "cache"),
        "PYTHONPATH": os.environ["STANDIN_LINKS"],
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
    }


if __name__ == "__main__":
    sys.exit(main())
