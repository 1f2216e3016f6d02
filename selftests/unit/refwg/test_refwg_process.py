"""Run refwg with malformed requests, under limits, stopped, and with its parts deleted."""

from __future__ import annotations

import pytest

from selftests.support.sandbox import run_in_sandbox

SETUP = """
        import errno, os, resource, signal, socket, subprocess, sys, time
        from pathlib import Path
        from harness.wait import let_pass, poll_until
        path = Path("/run/wireguard/wg0.sock")
        def ip(text): return subprocess.run(["ip", *text.split()], capture_output=True, text=True)
        def wg(text): return subprocess.run(["wg", *text.split()], capture_output=True, text=True)
        def wait_for(condition):
            assert poll_until(condition, bool, 60)
        def ask(request):
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(str(path)); client.sendall(request)
                    return client.recv(1000)
                except ConnectionError:
                    return b""
        def ports():
            rows = [line.split()[1] for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
            return {int(row.rpartition(":")[2], 16) for row in rows}
        def cpu(pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
        errors = open("/run/errors", "w")
        refwg = subprocess.Popen([sys.executable, "-m", "refwg", "-f", "wg0"], stderr=errors)
        wait_for(path.exists); wait_for(lambda: wg("set wg0 listen-port 7").returncode == 0)
        def end():
            refwg.terminate()
            print(refwg.wait(5), path.exists(), Path("/run/errors").read_text())
"""
# Exit status 0, no socket left, no errors printed.
CLEAN_EXIT = "0 False \n"


def run(code: str) -> str:
    return run_in_sandbox(SETUP, code)


@pytest.mark.requirement("CFG-53", "CFG-45", "CFG-55")
def test_malformed_request_gets_errno_or_closed_connection() -> None:
    code = """
        einval = b"errno=-22\\n\\n"
        print(ask(b"\\x00\\xff\\xfe\\n\\n"), ask(b"GET / HTTP/1.1\\r\\n\\r\\n"))
        print(ask(b"set=1\\n\\xff\\x00=\\xfe\\n\\n") == einval)
        print(ask(b"set=1\\nlisten_port=" + b"9" * 5000 + b"\\n\\n") == einval)
        print(ask(b"set=1\\n" + b"a" * 100_000), ask(b"set=1\\nno equals sign\\n\\n"))
        halves = [socket.socket(socket.AF_UNIX) for _ in range(100)]
        for half in halves:
            half.connect(str(path)); half.sendall(b"set=1\\nlisten_port=8\\n")
        print(wg("show wg0 listen-port").stdout.strip())
        for half in halves:
            half.close()
        print(wg("show wg0 listen-port").stdout.strip()); end()
    """
    answers = "b'' b''\nTrue\nTrue\nb'errno=-22\\n\\n' b'errno=-71\\n\\n'\n7\n7\n"
    assert run(code) == answers + CLEAN_EXIT


def test_stopped_process_applies_link_changes_when_continued() -> None:
    code = """
        ip("link set wg0 up"); wait_for(lambda: 7 in ports())
        refwg.send_signal(signal.SIGSTOP); ip("link set wg0 down"); ip("link set wg0 up"); ip("link set wg0 down")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for number in range(1000):
                sender.sendto(os.urandom(number), ("127.0.0.1", 7))
        refwg.send_signal(signal.SIGCONT); wait_for(lambda: 7 not in ports())
        ip("link set wg0 up"); wait_for(lambda: 7 in ports()); end()
    """
    assert run(code) == CLEAN_EXIT


def test_link_state_is_read_again_after_netlink_overflow() -> None:
    code = """
        ip("link set wg0 up"); wait_for(lambda: 7 in ports()); refwg.send_signal(signal.SIGSTOP)
        Path("/run/batch").write_text("".join(
            f"address add 10.{number >> 8}.{number & 255}.1/24 dev wg0\\n" for number in range(2000)))
        ip("-batch /run/batch"); ip("link set wg0 down"); refwg.send_signal(signal.SIGCONT)
        wait_for(lambda: 7 not in ports()); end()
    """
    assert run(code) == CLEAN_EXIT


def test_port_change_gets_emfile_until_descriptors_are_free() -> None:
    code = """
        ip("link set wg0 up"); wait_for(lambda: 7 in ports())
        before = resource.prlimit(refwg.pid, resource.RLIMIT_NOFILE)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path)); client.sendall(b"get=1\\n\\n"); client.recv(1000)
            highest = max(int(name) for name in os.listdir(f"/proc/{refwg.pid}/fd"))
            resource.prlimit(refwg.pid, resource.RLIMIT_NOFILE, (highest + 1, before[1]))
            client.sendall(b"set=1\\nlisten_port=8\\n\\n"); print(client.recv(1000), 7 in ports())
            # A client that writes after the refusal gets EPIPE instead.
            print(ask(b"get=1\\n\\n") in {b"", b"errno=-24\\n\\n"})
            used = cpu(refwg.pid); let_pass(0.5, "a busy loop would cost that")
            print(cpu(refwg.pid) - used < 0.3)
            resource.prlimit(refwg.pid, resource.RLIMIT_NOFILE, before)
            client.sendall(b"set=1\\nlisten_port=8\\n\\n"); print(client.recv(1000), 8 in ports())
        end()
    """
    answers = "b'errno=-24\\n\\n' True\nTrue\nTrue\nb'errno=0\\n\\n' True\n"
    reason = "Too many open files: close idle connections to the control socket, or raise RLIMIT_NOFILE (ulimit -n)"
    assert run(code) == answers + f"0 False ERROR: (wg0) control socket: a connection was refused: {reason}\n\n"


@pytest.mark.bug("IB-77")
def test_handshake_needs_no_descriptor_once_refwg_runs() -> None:
    code = """
        with socket.socket(socket.AF_UNIX) as client, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind(("127.0.0.1", 0)); peer.settimeout(10)
            client.connect(str(path)); client.sendall(b"get=1\\n\\n"); client.recv(1000)
            ip("link set wg0 up"); wait_for(lambda: 7 in ports())
            resource.prlimit(refwg.pid, resource.RLIMIT_NOFILE, (3, 1000))
            endpoint = f"endpoint=127.0.0.1:{peer.getsockname()[1]}\\npersistent_keepalive_interval=1\\n"
            client.sendall(f"set=1\\nprivate_key={'41' * 32}\\npublic_key={'09' + '00' * 31}\\n{endpoint}\\n".encode())
            print(client.recv(1000), len(peer.recv(1000)))
        end()
    """
    assert run(code) == "b'errno=0\\n\\n' 148\n" + CLEAN_EXIT


@pytest.mark.bug("IB-77")
def test_refwg_goes_on_after_request_that_needs_too_much_memory() -> None:
    code = """
        key = os.urandom(32).hex()
        prefixes = "".join(f"allowed_ip=10.{n >> 8 & 255}.{n & 255}.{n >> 16}/32\\n" for n in range(300_000))
        request = f"set=1\\npublic_key={key}\\n{prefixes}\\n".encode()
        before = resource.prlimit(refwg.pid, resource.RLIMIT_AS)
        size = int(Path(f"/proc/{refwg.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(refwg.pid, resource.RLIMIT_AS, (size + (8 << 20), before[1]))
        print(ask(request), refwg.poll())
        resource.prlimit(refwg.pid, resource.RLIMIT_AS, before)
        print(ask(f"set=1\\npublic_key={key}\\nremove=true\\n\\n".encode()), wg("show wg0 listen-port").stdout.strip())
        ip("link set wg0 up"); wait_for(lambda: 7 in ports()); end()
    """
    reason = "Cannot allocate memory: free memory, or raise the memory limit of the process or its cgroup"
    log = f"ERROR: (wg0) an event could not be handled: {reason}\n"
    assert run(code) == f"b'' None\nb'errno=0\\n\\n' 7\n0 False {log}\n"


def test_interface_goes_down_again_when_its_port_is_in_use() -> None:
    code = """
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("", 7)); ip("link set wg0 up")
            wait_for(lambda: ",UP" not in ip("link show wg0").stdout and Path("/run/errors").read_text())
        print(Path("/run/errors").read_text(), end=""); errors.truncate(0)
        ip("link set wg0 up"); wait_for(lambda: 7 in ports()); refwg.terminate(); print(refwg.wait(5))
    """
    assert run(code) == "ERROR: (wg0) port 7: Address already in use; the interface is set down\n0\n"


@pytest.mark.requirement("NS-06", "CFG-54")
@pytest.mark.parametrize("is_up", [False, True])
def test_refwg_ends_when_namespace_of_its_interface_is_deleted(is_up: bool) -> None:
    code = f"""
        ip("netns add other"); ip("link set wg0 netns other")
        if {is_up}:
            ip("-n other link set wg0 up"); wait_for(lambda: 7 in ports())
        ip("netns delete other"); print(refwg.wait(10), path.exists(), Path("/run/errors").read_text())
    """
    assert run(code) == CLEAN_EXIT


@pytest.mark.requirement("ROB-07", "CFG-54")
def test_refwg_ends_cleanly_when_busy_interface_is_deleted() -> None:
    code = """
        ip("link set wg0 up"); ip("address add 10.0.0.1/24 dev wg0"); wait_for(lambda: 7 in ports())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for number in range(2000):
                try:
                    sender.sendto(b"to nobody", ("10.0.0.2", 9))
                    if number == 500:
                        subprocess.Popen(["ip", "link", "delete", "wg0"])
                except OSError:
                    pass
        print(refwg.wait(10), path.exists(), Path("/run/errors").read_text())
    """
    assert run(code) == CLEAN_EXIT


@pytest.mark.requirement("CFG-54")
def test_refwg_ends_when_control_directory_is_removed() -> None:
    code = """
        path.unlink(); path.parent.rmdir(); print(refwg.wait(10), Path("/run/errors").read_text())
    """
    assert run(code) == "0 \n"


ENGINE = """
        refwg.terminate(); refwg.wait(5)
        def start(*options, **environment):
            command = [sys.executable, "-m", "refwg", "-f", "--trace", "/run/trace", *options, "wg0"]
            process = subprocess.Popen(command, env=os.environ | environment, stderr=errors)
            wait_for(path.exists); wait_for(lambda: wg("set wg0 listen-port 7").returncode == 0)
            return process
        def engines():
            events = [json.loads(line) for line in Path("/run/trace").read_text().splitlines()]
            return [(event["name"], event["offloads"]) for event in events if event["event"] == "engine"]
"""


def test_batch_engine_takes_over_when_there_are_many_packets() -> None:
    code = """
        import json
        refwg = start()
        ip("address add 10.0.0.1/24 dev wg0"); ip("link set wg0 up"); wait_for(lambda: 7 in ports())
        print(engines())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            refwg.send_signal(signal.SIGSTOP)
            for _ in range(100): sender.sendto(b"packet", ("10.0.0.2", 7))
            refwg.send_signal(signal.SIGCONT)
        wait_for(engines); print(engines()[0][0], "csum" in engines()[0][1]); end()
    """
    assert run_in_sandbox(SETUP, ENGINE + code) == "[]\nbatch True\n" + CLEAN_EXIT


def test_chosen_engine_begins_without_forbidden_offloads() -> None:
    code = """
        import json
        refwg = start("--engine", "batch", "--no-offload", "all"); wait_for(engines); print(engines())
        refwg.terminate(); refwg.wait(5); Path("/run/trace").unlink()
        refwg = start("--engine", "simple"); print(engines()); end()
    """
    assert run_in_sandbox(SETUP, ENGINE + code) == "[('batch', [])]\n[]\n" + CLEAN_EXIT


def test_simple_engine_stays_if_numpy_cannot_be_loaded() -> None:
    code = """
        import json
        Path("/run/numpy.py").write_text("raise ImportError('no numpy here')")
        refwg = start("--engine", "batch", PYTHONPATH="/run" + os.pathsep + os.environ.get("PYTHONPATH", ""))
        wait_for(lambda: "no numpy here" in Path("/run/errors").read_text()); print(engines())
        print(wg("show wg0 listen-port").stdout.strip()); refwg.terminate(); print(refwg.wait(5))
    """
    assert run_in_sandbox(SETUP, ENGINE + code) == "[]\n7\n0\n"
