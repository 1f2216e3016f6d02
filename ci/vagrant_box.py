"""Run the provisioners of the Vagrantfile in a fresh Debian root, in place of the box.

The root has the parts of the box that a minimal Debian lacks: the user vagrant, sudo, kmod, and the modules of a
Debian kernel. This machine's kernel runs there, so modprobe only makes a dry run with those modules. pytest collects
all tests there and runs a few, some of them with tunnels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from ci import debian_root
from ci.enter_root import command_line
from ci.junit import read_counts
from ci.machine_settings import LOCAL_CERTIFICATES, collect
from ci.setup_checkout import EXIT_COULD_NOT, EXIT_INTERRUPTED, ROOT
from ci.vagrantfile import parse
from harness.errors import HarnessError, ProgramFailed, Unavailable
from harness.install.cache import cache_root, remove
from harness.install.progress import Step
from harness.install.tools import ToolFailed, ended, exit_on_sigterm, run_tool
from harness.plugin.rundir import RunDirectory
from harness.vm import kernels

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ci.machine_settings import Settings
    from ci.vagrantfile import Box, Provisioner
    from harness.install.progress import OnLine

# Parts of the box that the provisioners use and a minimal Debian lacks: modprobe, sudo, /etc/modules-load.d, group kvm.
# The provisioners must install everything else.
BOX_PACKAGES: Final = ("kmod", "sudo", "systemd", "udev")
TOOLS: Final = ("debootstrap", "rsync")
USER: Final = "vagrant"
UID: Final = 1000
HOME: Final = f"/home/{USER}"
# The variables that sshd sets; /etc/profile replaces the PATH in a login shell.
SESSION: Final = {
    "HOME": HOME,
    "USER": USER,
    "LOGNAME": USER,
    "SHELL": "/bin/bash",
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/games",
}
AS_USER: Final = (
    "setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "env", f"--chdir={HOME}",
)  # fmt: skip
SCRIPT: Final = "/tmp/vagrant-shell"  # noqa: S108 - vagrant's own path, in a root that nobody else can enter
# The record separator begins each line of bash's trace.
MARK: Final = "\x1e"
PAIR: Final = "wireguard-go~refwg"
# Files of quick tests: the first needs no tunnel, the second makes one in each test.
FILES: Final = ("test_counter.py", "test_ping_and_counters.py")
JUNIT: Final = "report/vagrant-box.xml"
LOG: Final = ROOT / "report" / "vagrant-box.log"
TAIL: Final = 40  # lines of a failed provisioner's output that are printed


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """The root folder that is used in place of the box."""

    folder: Path
    box: Box
    settings: Settings
    kernel: str  # the release of the kernel whose modules it has

    def command(self, *command: str) -> list[str]:
        """Return the command line that runs a command in the root (ci/enter_root.py)."""
        hostname, shares = self.box.hostname, self.settings.shares
        return command_line(*command, root=self.folder, hostname=hostname, shares=shares)

    def environment(self) -> dict[str, str]:
        """Return the variables of a login session of the user vagrant."""
        tests = " or ".join(FILES)
        return {
            **SESSION,
            **self.settings.variables,
            "MODPROBE_OPTIONS": f"--dry-run --set-version={self.kernel}",
            "PYTEST_ADDOPTS": f"--pair={PAIR} -k '{tests}' --junit-xml={JUNIT}",
        }

    def write(self, path: str, text: str) -> Path:
        """Write a file in the root, and return its path on this machine."""
        file = self.folder / path.lstrip("/")
        file.write_text(text)
        return file


def main() -> int:
    """Run all provisioners; return 0 if all passed, 1 if one failed, 125 if the root could not be made."""
    exit_on_sigterm()
    try:
        if os.geteuid() != 0:
            raise Unavailable("only root can make a Debian root that has other users; run this as root")
        with RunDirectory() as run, _removed(run.path / "root") as folder:
            try_provisioners(parse((ROOT / "Vagrantfile").read_text()), folder)
    except ProgramFailed as error:
        print(f"ci/vagrant_box: {error}", file=sys.stderr)
        return 1
    except (HarnessError, ToolFailed, OSError) as error:
        print(f"ci/vagrant_box: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    except KeyboardInterrupt:
        print("ci/vagrant_box: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def try_provisioners(box: Box, folder: Path) -> None:
    """Make a root in `folder`, and run each provisioner in it, in the order of in_order().

    Raises ProgramFailed if a provisioner or a test fails, Unavailable if something could not be tested.
    """
    LOG.parent.mkdir(exist_ok=True)
    LOG.unlink(missing_ok=True)
    root = make_root(box, folder)
    for provisioner in in_order(box.provisioners):
        provision(root, provisioner)
    counts = read_counts(folder / box.folder.target.lstrip("/") / JUNIT)
    print(f"tests in the root: {counts}", flush=True)
    if counts.failed or not counts.passed:
        raise ProgramFailed(f"tests in the root: {counts}; expected no failed and at least one passed test")
    if counts.skipped:
        raise Unavailable(f"tests in the root: {counts}; expected no skipped test")


@contextmanager
def _removed(folder: Path) -> Iterator[Path]:
    try:
        yield folder
    finally:
        with Step("removal of the root"):
            remove(folder)


def in_order(provisioners: Iterable[Provisioner]) -> list[Provisioner]:
    """Return the provisioners of `vagrant up` first, then those that run only by name."""
    return sorted(provisioners, key=lambda provisioner: provisioner.on_request)


def make_root(box: Box, folder: Path) -> Root:
    """Make the root, in the state of the box before `vagrant up` provisions it."""
    with Step("tools") as step:
        debian_root.ensure_programs(TOOLS, step)
    with Step("settings"):
        settings = machine_settings()
    with Step("kernel modules") as step:
        kernel = kernels.find(box.suite, cache_root())
        step.note = kernel.release
    root = Root(folder=folder, box=box, settings=settings, kernel=kernel.release)
    with Step("debootstrap") as step:
        proxy = debian_root.http_proxy(settings.apt)
        archive = debian_root.archive(box.suite, BOX_PACKAGES, proxy, step)
    with Step("box") as step:
        _unpack(root, archive, step.on_line)
        _write_settings(root)
        _add_user(root, step.on_line)
        _add_modules(root, kernel, step.on_line)
    with Step("synced folder") as step:
        _sync(root, step.on_line)
    return root


def machine_settings() -> Settings:
    """Collect the settings of this machine's pip, apt and environment that the root needs."""

    def silent(_: str) -> None:
        """Ignore a line of output."""

    pip_config = run_tool([sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"], silent)
    return collect(os.environ, pip_config, run_tool(["apt-config", "dump", "Acquire"], silent))


def _unpack(root: Root, archive: Path, on_line: OnLine) -> None:
    root.folder.mkdir()
    root.folder.chmod(0o755)
    run_tool(["tar", "--extract", "--numeric-owner", f"--file={archive}", f"--directory={root.folder}"], on_line)


def _write_settings(root: Root) -> None:
    hostname = root.box.hostname
    root.write("etc/hostname", f"{hostname}\n")
    root.write("etc/hosts", f"{Path('/etc/hosts').read_text()}\n127.0.1.1 {hostname}\n")
    root.write("etc/resolv.conf", Path("/etc/resolv.conf").read_text())
    root.write("etc/apt/sources.list", debian_root.machine_sources(root.box.suite).lines)
    root.write("etc/apt/apt.conf.d/90machine", root.settings.apt)
    # Without this dpkg waits for the disk after each file, for a root that is removed at the end.
    root.write("etc/dpkg/dpkg.cfg.d/unsafe-io", "force-unsafe-io\n")
    # The package ca-certificates adds them to its bundle when a provisioner installs it.
    if LOCAL_CERTIFICATES.is_dir():
        shutil.copytree(LOCAL_CERTIFICATES, root.folder / LOCAL_CERTIFICATES.relative_to("/"), dirs_exist_ok=True)


def _add_user(root: Root, on_line: OnLine) -> None:
    useradd = ("useradd", "--create-home", f"--uid={UID}", "--user-group", "--shell=/bin/bash", USER)
    _run_as_root(root, on_line, *useradd)
    root.write(f"etc/sudoers.d/{USER}", f"{USER} ALL=(ALL) NOPASSWD: ALL\n").chmod(0o440)


def _add_modules(root: Root, kernel: kernels.Kernel, on_line: OnLine) -> None:
    if kernel.modules is None:
        raise Unavailable(f"kernel {kernel.release} has no modules")
    shutil.copytree(kernel.modules, root.folder / "lib/modules" / kernel.release, symlinks=True)
    _run_as_root(root, on_line, "depmod", kernel.release)


def _run_as_root(root: Root, on_line: OnLine, *command: str) -> None:
    run_tool(root.command(*command), on_line, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, cwd=ROOT)


def _sync(root: Root, on_line: OnLine) -> None:
    """Copy the checkout with the options that vagrant gives to rsync (plugins/synced_folders/rsync/helper.rb)."""
    folder = root.box.folder
    source, target = (ROOT / folder.source).resolve(), root.folder / folder.target.lstrip("/")
    options = ["--archive", "--delete", "--copy-links", f"--chown={UID}:{UID}"]
    excluded = [f"--exclude={pattern}" for pattern in (".vagrant/", *folder.excluded)]
    run_tool(["rsync", *options, *excluded, f"{source}/", str(target)], on_line)


def provision(root: Root, provisioner: Provisioner) -> None:
    """Run a provisioner's script as vagrant does, and show each of its commands as a step.

    vagrant copies the script to the box and runs it by bash, a privileged one by `sudo -E -H`. Source:
    plugins/provisioners/shell/provisioner.rb, plugins/communicators/ssh/communicator.rb. Raises ProgramFailed or
    Unavailable.
    """
    print(f"\n-- {provisioner.name}, as {'root' if provisioner.privileged else USER}", flush=True)
    root.write(SCRIPT, traced(provisioner.script)).chmod(0o755)
    become = ("sudo", "-E", "-H") if provisioner.privileged else ()
    output: list[str] = []
    try:
        with LOG.open("a") as log:
            follow(root.command(*AS_USER, *become, "bash", "-l", SCRIPT), root.environment(), output, log)
    except (ProgramFailed, Unavailable) as error:
        print(*output[-TAIL:], f"complete output: {LOG}", sep="\n", flush=True)
        raise type(error)(f"provisioner {provisioner.name}: {error}") from error


def traced(script: str) -> str:
    """Return the script with tracing turned on: bash prints each command on a line that begins with MARK."""
    return f"PS4=$'\\x{ord(MARK):02x} '; set -x\n{script}"


def follow(command: list[str], environ: dict[str, str], output: list[str], log: TextIO) -> None:
    """Run a traced script, show each of its commands as a step, and add its output to `output` and `log`.

    Raises Unavailable for the exit status 125, ProgramFailed for any other but 0.
    """
    process = subprocess.Popen(
        command,
        env=environ,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with process, ended(process), ExitStack() as steps:
        assert process.stdout is not None  # noqa: S101 - stdout=PIPE gives one
        step = None
        for line in process.stdout:
            log.write(line.replace(MARK, "+"))
            text, mark, traced_command = line.rstrip().partition(MARK)
            if text:
                output.append(text)
            if text and step is not None:
                step.on_line(text)
                step.note = " ".join(text.split())
            if mark:
                steps.close()
                step = steps.enter_context(Step(traced_command.lstrip(f"{MARK} ")))
        status = process.wait()
        if status == EXIT_COULD_NOT:
            raise Unavailable("could not run (exit status 125)")
        if status != 0:
            raise ProgramFailed(f"exit status {status}")


if __name__ == "__main__":
    sys.exit(main())
