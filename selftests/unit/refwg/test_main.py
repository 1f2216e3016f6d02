from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from refwg.__main__ import main
from refwg.tun import Tun
from selftests.support.sandbox import ROOT, run_in_sandbox

if TYPE_CHECKING:
    from pathlib import Path

START = """
        import os, signal, socket, subprocess, sys, time
        from pathlib import Path
        from harness.wait import let_pass, poll_until
        PEER = "ZhSqwJ0LZ1hEYIuTj2tBkYJ0MMTDFCQwnlTYfyp8Bkc="
        path = Path("/run/wireguard/wg0.sock")
        def start(*options, **environment):
            return subprocess.Popen([sys.executable, "-m", "refwg", *options, "wg0"], env={**os.environ, **environment})
        def wait_for(condition):
            assert poll_until(condition, bool, 60)
        def ip(text): return subprocess.run(["ip", *text.split()], capture_output=True, text=True)
        def is_free(port):
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
                try:
                    probe.bind(("::", port))
                except OSError:
                    return False
                return True
        def wg(text): return subprocess.run(["wg", *text.split()], capture_output=True, text=True)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a" * 16],
        ["a/b"],
        ["--engine", "none", "wg0"],
        ["--no-offload", "lro", "wg0"],
        ["--mutant", "no-clamp", "wg0"],
    ],
)
def test_invalid_arguments_end_with_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: refwg" in capsys.readouterr().err


def test_unknown_mutant_ends_with_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFWG_MUTANTS", "allowed")
    with pytest.raises(SystemExit) as end:
        main(["--mutant", "no-such-one", "wg0"])
    assert end.value.code == 2


def test_help_explains_usage_and_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    words = ("wg set wg0", "wg-quick up", "selftest", "--drop-privileges", "WG_TUN_FD", "LOG_LEVEL", "exit status")
    assert all(word in text for word in words)
    assert "mutant" not in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("refwg ")


def test_main_imports_only_standard_library_and_cryptography() -> None:
    code = "import sys; before = set(sys.modules); import refwg.__main__; print(*set(sys.modules) - before)"
    completed = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    packages = {name.partition(".")[0] for name in completed.stdout.split()}
    assert packages - sys.stdlib_module_names <= {"refwg", "cryptography", "_cffi_backend", "_openssl"}
    late = {"refwg.selftest", "refwg.privileges", "refwg.trace", "refwg.inotify", "refwg.mutants"}
    assert not {"asyncio", "ctypes", "json", "importlib.metadata", "logging"} & set(completed.stdout.split())
    assert not late & set(completed.stdout.split())


@pytest.mark.requirement("CFG-54")
@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGTERM)", "os.kill(os.getpid(), signal.SIGINT)", "listener[1].path.unlink()"]
)
def test_socket_is_removed_when_refwg_ends_right_after_making_it(end: str) -> None:
    program = f"""if True:
        import os, signal, sys
        from refwg import __main__ as refwg
        listen = refwg._listener
        def listen_and_end(name):
            listener = listen(name)
            {end}
            return listener
        refwg._listener = listen_and_end
        sys.exit(refwg.main(["-f", "wg0"]))
    """
    code = f"""
        completed = subprocess.run([sys.executable, "-c", {program!r}], timeout=10)
        print(completed.returncode, path.exists(), ip("link show wg0").returncode)
    """
    assert run_in_sandbox(START, code) == "0 False 1\n"


@pytest.mark.requirement("CFG-40")
def test_refwg_goes_into_background_once_it_can_be_configured() -> None:
    code = """
        print(start().wait(), oct(path.stat().st_mode & 0o777), wg("show wg0 listen-port").stdout.strip())
        path.unlink(); wait_for(lambda: ip("link show wg0").returncode)
    """
    assert run_in_sandbox(START, code) == "0 0o600 0\n"


@pytest.mark.requirement("CFG-40")
def test_wg_is_answered_at_once_when_start_command_has_returned() -> None:
    code = """
        for _ in range(5):
            print(start().wait(), wg("show wg0 fwmark").stdout.strip())
            path.unlink(); wait_for(lambda: ip("link show wg0").returncode)
    """
    assert run_in_sandbox(START, code) == "0 off\n" * 5


@pytest.mark.parametrize("options", ["'-f'", "'--trace', '/run/trace'"])
def test_start_that_fails_late_has_status_1_and_leaves_nothing(options: str) -> None:
    code = f"""
        Path("/proc/sys/user/max_inotify_instances").write_text("0")
        process = subprocess.run([sys.executable, "-m", "refwg", {options}, "wg0"], capture_output=True, text=True)
        print(process.returncode, path.exists(), ip("link show wg0").returncode, process.stderr)
    """
    reason = "inotify: Too many open files (raise fs.inotify.max_user_instances, or RLIMIT_NOFILE)"
    assert run_in_sandbox(START, code) == f"1 False 1 refwg: wg0: [Errno 24] {reason}: '/var/run/wireguard'\n\n"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ("WG_TUN_FD='none'", "WG_TUN_FD=none: expected the number of an open descriptor"),
        ("WG_TUN_FD='1'", "WG_TUN_FD=1: not a TUN interface"),
        ("WG_TUN_FD='99'", "Bad file descriptor"),
        ("WG_UAPI_FD='-1'", "WG_UAPI_FD=-1: expected the number of an open descriptor"),
        ("WG_UAPI_FD='1'", "Socket operation on non-socket"),
    ],
)
def test_invalid_descriptor_in_environment_is_reported(environment: str, words: str) -> None:
    code = f"""
        env = {{**os.environ, **dict({environment})}}
        completed = subprocess.run([sys.executable, "-m", "refwg", "wg0"], env=env, capture_output=True, text=True)
        print(completed.returncode, {words!r} in completed.stderr, "Traceback" in completed.stderr)
    """
    assert run_in_sandbox(START, code) == "1 True False\n"


def test_interface_name_in_use_is_reported() -> None:
    code = """
        ip("link add wg0 type veth peer name other")
        completed = subprocess.run([sys.executable, "-m", "refwg", "wg0"], capture_output=True, text=True)
        print(completed.returncode, completed.stderr, end="")
    """
    words = "an interface with this name already exists, and it is not a TUN interface"
    assert run_in_sandbox(START, code) == f"1 refwg: wg0: {words}\n"


# The names of the kernel (dev_valid_name), each with the rule that it breaks.
@pytest.mark.bug("IB-78")
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("", "0 bytes: an interface name has 1 to 15 bytes"),
        ("a" * 16, "16 bytes: an interface name has 1 to 15 bytes"),
        ("ä" * 8, "16 bytes: an interface name has 1 to 15 bytes"),
        ("à", "must not contain white space (the kernel takes the byte 0xa0 for one too)"),
        ("wg 0", "must not contain white space"),
        ("wg\n", "must not contain white space"),
        ("a/b", "must not contain '/'"),
        ("wg:0", "must not contain ':'"),
        (".", "must not be '.' or '..'"),
        ("..", "must not be '.' or '..'"),
        ("wg%s", "a pattern contains '%d' once"),
        ("wg%", "a pattern contains '%d' once"),
        ("%d%d", "a pattern contains '%d' once"),
    ],
)
def test_name_that_kernel_refuses_is_answered_by_its_rule(
    name: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["-f", name])
    assert (end.value.code, rule in capsys.readouterr().err) == (2, True)


@pytest.mark.bug("IB-78")
def test_kernel_refuses_exactly_names_that_refwg_refuses() -> None:
    code = """
        from refwg.errors import OptionError
        from refwg.tun import Tun, name_problem
        names = ["wg0", "x", "a" * 15, "a" * 16, "ä", "à", "é", "wg 0", "wg\\t", "wg\\x0b", "a/b", "a:b", ".", "..",
                 "...", "wg%d", "%d", "wg%s", "wg%", "%d%d", "wg%d%", "wg%%d", "-", "wg\\x01", "all", "default"]
        for name in names:
            try:
                Tun.create(name).close()
            except OptionError:
                if not name_problem(name): print(name, "is refused by the kernel")
            else:
                if name_problem(name) and len(name) < 16: print(name, "is taken by the kernel")
    """
    # These two are directories of /proc/sys/net; an older kernel takes them.
    assert run_in_sandbox(START, code) in {"", "all is refused by the kernel\ndefault is refused by the kernel\n"}


@pytest.mark.bug("IB-78")
def test_interface_of_pattern_gets_first_free_number() -> None:
    code = """
        def begin(*options):
            return subprocess.run([sys.executable, "-m", "refwg", *options, "wg%d"], capture_output=True, text=True)
        first, second = begin(), begin("--trace", "/run/trace")
        print(first.stderr, second.stderr, first.stdout, second.stdout, sorted(os.listdir("/run/wireguard")))
        print(sorted(wg("show interfaces").stdout.split()))
        for number in (0, 1):
            Path(f"/run/wireguard/wg{number}.sock").unlink()
            wait_for(lambda: ip(f"link show wg{number}").returncode)
    """
    logs = [f"INFO: (wg{number}) the interface for wg%d is wg{number}\n" for number in (0, 1)]
    expected = f"{logs[0]} {logs[1]}   ['wg0.sock', 'wg1.sock']\n['wg0', 'wg1']\n"
    assert run_in_sandbox(START, code) == expected


@pytest.mark.bug("IB-78")
def test_persistent_tun_interface_of_same_name_is_taken_over() -> None:
    code = """
        ip("tuntap add dev wg0 mode tun"); index = socket.if_nametoindex("wg0")
        print(start().wait(), wg("show wg0 fwmark").stdout.strip(), socket.if_nametoindex("wg0") == index)
        path.unlink(); wait_for(lambda: ip("tuntap del dev wg0 mode tun").returncode == 0)
    """
    assert run_in_sandbox(START, code).startswith("0 off True\n")


def test_unwritable_trace_file_is_reported_with_its_remedy(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "trace"
    completed = subprocess.run(
        [sys.executable, "-m", "refwg", "-f", "--trace", str(missing), "wg0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    error = f"refwg: wg0: [Errno 2] No such file or directory: '{missing}'\n"
    assert (completed.returncode, completed.stderr) == (1, error)


@pytest.mark.parametrize(
    ("number", "file", "remedy"),
    [
        (errno.EACCES, "/dev/net/tun", ": run as root, or allow others to open it, as root: chmod 0666 /dev/net/tun"),
        (errno.EPERM, None, ": CAP_NET_ADMIN is needed: run as root, or in a user namespace of your own"),
        (errno.ENOENT, "/dev/net/tun", ": the kernel module tun is not loaded; as root: modprobe tun"),
    ],
)
def test_remedy_is_printed_when_interface_cannot_be_created(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, file: str | None, remedy: str
) -> None:
    refusal = OSError(number, os.strerror(number), file)

    def refuse(_: str, **__: bool) -> Tun:
        raise refusal

    monkeypatch.setattr(Tun, "create", refuse)
    assert main(["-f", "wg0"]) == 1
    assert capsys.readouterr().err == f"refwg: wg0: {refusal}{remedy}\n"


@pytest.mark.parametrize("error", [KeyError(4), IndexError("list index out of range")])
def test_internal_error_is_raised_and_not_reported_as_user_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str, **__: bool) -> Tun:
        raise error

    monkeypatch.setattr(Tun, "create", fail)
    with pytest.raises(type(error)):
        main(["-f", "wg0"])


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_refwg_works_without_standard_streams(closed: str) -> None:
    code = f"""
        print(subprocess.run(["sh", "-c", f"exec {{sys.executable}} -m refwg wg0 {closed}"]).returncode)
        print(wg("show wg0 fwmark").stdout.strip(), wg("set wg0 listen-port 7").returncode)
        ip("link set wg0 up"); wait_for(lambda: not is_free(7))
        path.unlink(); wait_for(lambda: ip("link show wg0").returncode)
    """
    assert run_in_sandbox(START, code) == "0\noff 0\n"


def test_trace_loses_events_while_disk_is_full() -> None:
    code = """
        errors = open("/run/errors", "w")
        process = subprocess.Popen([sys.executable, "-m", "refwg", "-f", "--trace", "/dev/full", "wg0"], stderr=errors)
        wait_for(path.exists); wait_for(lambda: wg("set wg0 listen-port 7").returncode == 0)
        ip("link set wg0 up"); wait_for(lambda: not is_free(7))
        ip("link set wg0 down"); wait_for(lambda: is_free(7)); process.terminate()
        print(process.wait(5), Path("/run/errors").read_text(), end="")
    """
    reason = "No space left on device: free space on the file system; events are lost until then"
    assert run_in_sandbox(START, code) == f"0 ERROR: (wg0) /dev/full: {reason}\n"


@pytest.mark.bug("IB-77")
def test_trace_goes_on_in_whole_lines_once_disk_has_room() -> None:
    code = """
        import json
        Path("/run/small").mkdir(); subprocess.run("mount -t tmpfs -o size=8k none /run/small".split(), check=True)
        filler, trace = Path("/run/small/filler"), Path("/run/small/trace"); filler.write_bytes(bytes(4096))
        errors = open("/run/errors", "w")
        process = subprocess.Popen([sys.executable, "-m", "refwg", "-f", "--trace", trace, "wg0"], stderr=errors)
        wait_for(path.exists); wait_for(lambda: wg("set wg0 listen-port 7").returncode == 0)
        def flap():
            ip("link set wg0 up"); wait_for(lambda: not is_free(7))
            ip("link set wg0 down"); wait_for(lambda: is_free(7))
        while not Path("/run/errors").stat().st_size:
            flap()
        filler.unlink(); flap(); process.terminate()
        print(process.wait(5), {json.loads(line)["event"] for line in trace.read_text().splitlines()})
        first, second = Path("/run/errors").read_text().splitlines()
        print(first); print(second.replace("1 events", "N events").replace("2 events", "N events"))
    """
    reason = "No space left on device: free space on the file system; events are lost until then"
    words = [
        "0 {'up', 'down'}",
        f"ERROR: (wg0) /run/small/trace: {reason}",
        "ERROR: (wg0) /run/small/trace: written again; N events were lost",
    ]
    output = run_in_sandbox(START, code).replace("{'down', 'up'}", "{'up', 'down'}")
    assert output.splitlines() == words


def test_file_that_replaced_socket_is_kept_when_refwg_ends() -> None:
    code = """
        process = start("-f"); wait_for(path.exists); wait_for(lambda: wg("show wg0").returncode == 0)
        path.rename("/run/wireguard/away"); path.touch(); print(process.wait(5), path.exists())
    """
    assert run_in_sandbox(START, code) == "0 True\n"


RIGHTS = """
        subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
        def status(pid, name):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            return next(line.split()[1] for line in lines if line.startswith(name + ":"))
"""


@pytest.mark.requirement("CFG-54")
def test_refwg_keeps_three_capabilities_and_can_gain_none() -> None:
    code = """
        process = start("-f", "--drop-privileges", "root"); wait_for(path.exists)
        wait_for(lambda: wg("show wg0").returncode == 0)
        print({name: int(status(process.pid, name), 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")})
        print(status(process.pid, "NoNewPrivs"), wg("set wg0 listen-port 7 fwmark 9").returncode)
        ip("link set wg0 up"); wait_for(lambda: not is_free(7)); print(wg("set wg0 listen-port 8").returncode)
        ip("link set wg0 down"); wait_for(lambda: is_free(8))
        process.terminate(); print(process.wait(5)); wait_for(lambda: not path.exists())
    """
    kept = 1 << 10 | 1 << 12 | 1 << 13
    capabilities = {"CapEff": kept, "CapPrm": kept, "CapInh": 0, "CapBnd": kept, "CapAmb": 0}
    assert run_in_sandbox(START + RIGHTS, code) == f"{capabilities}\n1 0\n0\n0\n"


@pytest.mark.parametrize("end", ["os.kill(pid, signal.SIGKILL)", "os.kill(pid, signal.SIGTERM)", "path.unlink()"])
def test_socket_is_removed_when_refwg_ends_after_privilege_drop(end: str) -> None:
    code = f"""
        print(start("--drop-privileges", "root").wait())
        others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
        (pid,) = [other for other in others if status(other, "NoNewPrivs") == "1"]
        {end}
        wait_for(lambda: not path.exists()); wait_for(lambda: ip("link show wg0").returncode)
    """
    assert run_in_sandbox(START + RIGHTS, code) == "0\n"


def test_unknown_user_for_privilege_drop_is_reported() -> None:
    code = """
        completed = subprocess.run([sys.executable, "-m", "refwg", "--drop-privileges", "nobody-at-all", "wg0"],
                              capture_output=True, text=True)
        print(completed.returncode, completed.stderr, path.exists(), ip("link show wg0").returncode)
    """
    words = "refwg: wg0: --drop-privileges nobody-at-all: this user does not exist"
    assert run_in_sandbox(START, code) == f"1 {words}\n False 1\n"


def test_interface_and_socket_may_be_given_as_descriptors() -> None:
    code = """
        from refwg.uapi_socket import listen
        from refwg.tun import Tun
        tun, listener = Tun.create("wg0"), listen("wg0")
        given = {"WG_TUN_FD": str(tun.fileno()), "WG_UAPI_FD": str(listener.fileno())}
        command, descriptors = [sys.executable, "-m", "refwg", "-f", "wg0"], (tun.fileno(), listener.fileno())
        process = subprocess.Popen(command, env={**os.environ, **given}, pass_fds=descriptors)
        tun.close(); listener.close()
        wait_for(lambda: wg("show wg0").returncode == 0)
        process.terminate(); print(process.wait(5), path.exists(), ip("link show wg0").returncode)
    """
    assert run_in_sandbox(START, code) == "0 False 1\n"


@pytest.mark.requirement("CFG-54")
@pytest.mark.parametrize(
    "end", ["process.terminate()", "process.send_signal(signal.SIGINT)", "path.unlink()", "ip('link delete wg0')"]
)
def test_refwg_removes_interface_and_socket_when_it_ends(end: str) -> None:
    code = f"""
        process = start("-f"); wait_for(path.exists); wait_for(lambda: wg("show wg0").returncode == 0)
        let_pass(0.2, "it does nothing but wait then")
        {end}
        print(process.wait(5), path.exists(), ip("link show wg0").returncode)
    """
    assert run_in_sandbox(START, code) == "0 False 1\n"


@pytest.mark.requirement("IF-08", "IF-05", "IF-06")
def test_udp_sockets_follow_link_state() -> None:
    code = """
        process = start(WG_PROCESS_FOREGROUND="1", LOG_LEVEL="silent"); wait_for(path.exists)
        def is_up(): return ",UP" in ip("link show wg0").stdout
        wait_for(lambda: wg("set wg0 listen-port 7").returncode == 0)
        print(is_free(7)); ip("link set wg0 up"); wait_for(lambda: not is_free(7))
        ip("link set wg0 down"); wait_for(lambda: is_free(7))
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
            other.bind(("::", 7)); ip("link set wg0 up"); wait_for(lambda: not is_up())
        process.terminate(); print(process.wait(5))
    """
    assert run_in_sandbox(START, code) == "True\n0\n"


@pytest.mark.requirement("CFG-48", "CFG-19")
def test_wg_reports_address_in_use_when_port_is_taken() -> None:
    code = """
        process = start("-f"); wait_for(path.exists); wait_for(lambda: wg("show wg0").returncode == 0)
        ip("link set wg0 up"); wait_for(lambda: wg("show wg0 listen-port").stdout != "0\\n")
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
            other.bind(("::", 7)); refused = wg("set wg0 listen-port 7")
        print(refused.returncode, refused.stderr, end="")
        print(wg("set wg0 listen-port 7").returncode); process.terminate(); print(process.wait(5))
    """
    words = "Unable to modify interface: Address already in use"
    assert run_in_sandbox(START, code) == f"1 {words}\n0\n0\n"


@pytest.mark.requirement("CFG-42", "CFG-41")
def test_unmodified_wg_configures_refwg() -> None:
    code = """
        process = start("-f"); wait_for(path.exists); wait_for(lambda: wg("show wg0").returncode == 0)
        Path("/run/key").write_text(subprocess.run(["wg", "genkey"], capture_output=True, text=True).stdout)
        print(wg(f"set wg0 private-key /run/key fwmark 7 peer {PEER} allowed-ips 10.0.0.0/8").returncode)
        conf = wg("showconf wg0").stdout
        Path("/run/conf").write_text(conf)
        print(wg("setconf wg0 /run/conf").returncode, wg("syncconf wg0 /run/conf").returncode)
        print(wg("showconf wg0").stdout == conf, "AllowedIPs = 10.0.0.0/8" in conf)
        process.terminate(); print(process.wait(5))
    """
    assert run_in_sandbox(START, code) == "0\n0 0\nTrue True\n0\n"


def test_trace_is_written_and_keylog_has_mode_0600() -> None:
    code = """
        process = start("-f", "--trace", "/run/trace", "--keylog", "/run/keys"); wait_for(path.exists)
        Path("/run/key").write_text(subprocess.run(["wg", "genkey"], capture_output=True, text=True).stdout)
        wait_for(lambda: wg(f"set wg0 private-key /run/key peer {PEER} endpoint 127.0.0.1:9").returncode == 0)
        ip("link set wg0 up"); wg(f"set wg0 peer {PEER} persistent-keepalive 25")
        wait_for(lambda: "initiation" in Path("/run/trace").read_text())
        print(*(oct(Path("/run", name).stat().st_mode & 0o777) for name in ("trace", "keys")))
        print(Path("/run/keys").read_text().split()[0])
        process.terminate(); print(process.wait(5))
    """
    assert run_in_sandbox(START, code) == "0o600 0o600\nLOCAL_STATIC_PRIVATE_KEY\n0\n"


def test_missing_privilege_ends_with_status_1_without_traceback() -> None:
    completed = subprocess.run(
        ["unshare", "--user", "--net", sys.executable, "-m", "refwg", "-f", "wg0"],
        cwd=ROOT,
        env={**os.environ, "LOG_LEVEL": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in completed.stderr
    assert completed.returncode == 1
