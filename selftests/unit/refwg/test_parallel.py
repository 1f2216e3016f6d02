"""Check that batches which workers encrypt and decrypt leave and arrive in order, with the results of one process."""

from __future__ import annotations

import errno
import os
import random
import resource
import select
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from refwg.__main__ import main
from refwg.errors import DropReason
from refwg.messages import MILLISECOND, REKEY_AFTER_TIME, SECOND, Data
from selftests.support.packets import ip_packet, udp
from selftests.support.recorded import MSS, RecordedSockets, Rig, superframe, tcp_segments
from selftests.support.sandbox import ROOT, run_in_sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refwg.boundary import Transmit
    from refwg.noise import Keypair
    from refwg.peer import Peer
    from selftests.support.pair import Side

DEADLINE = 60_000  # milliseconds, of anything that another process must do
PLAIN = bytes(10)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with closing(Rig(2)) as rig:
        yield rig


def frame_to(rig: Rig, side: Side, packets: int, sequence: int = 1) -> bytes:
    """Return a superframe of so many packets from A."""
    payload = random.Random(sequence).randbytes(packets * MSS - 7)  # noqa: S311 - not a secret
    return superframe(rig.a.inner[4], side.inner[4], payload, sequence=sequence)


def segments_from(rig: Rig, side: Side, packets: int, sequence: int = 1) -> list[bytes]:
    payload = random.Random(sequence).randbytes(packets * MSS)  # noqa: S311 - not a secret
    return tcp_segments(side.inner[4], rig.a.inner[4], payload, sequence=sequence)


def wait_for_answer(rig: Rig) -> None:
    """Wait until a worker has answered, and let the engine take the answer."""
    poll = select.poll()
    poll.register(rig.parallel.pool, select.POLLIN)
    assert poll.poll(DEADLINE), "no worker has answered"
    rig.parallel.work_done()


def stop_first_worker(rig: Rig) -> int:
    """Stop the worker that gets the next job; returns its id."""
    worker = rig.parallel.pool.processes[0]
    os.kill(worker, signal.SIGSTOP)
    os.waitid(os.P_PID, worker, os.WSTOPPED)
    return worker


def session_with(rig: Rig, side: Side) -> Keypair:
    peer = rig.a.device.peer(side.public_key)
    assert peer is not None
    assert peer.keypairs.current is not None
    return peer.keypairs.current


# The same input, and the same output as without workers.


def play(rig: Rig, seed: int) -> None:
    """Send and receive a random mix: superframes, equal packets, single packets, keepalives, replays, wrong tags."""
    chance = random.Random(seed)  # noqa: S311 - not a secret
    earlier: list[list[bytes]] = []
    for sequence in range(0, 60_000_000, 1_000_000):
        side = chance.choice(rig.others)
        there, here = side.inner[4], rig.a.inner[4]
        what = chance.randrange(9)
        if what < 3:
            rig.send(*(frame_to(rig, side, chance.randint(1, 46), sequence + step) for step in range(3)))
        elif what == 3:
            rig.send(*(PLAIN + ip_packet(here, there, udp(1, 2, chance.randbytes(300))) for _ in range(20)))
        elif what == 4:
            rig.send(PLAIN + ip_packet(here, there, chance.randbytes(chance.randint(1, 900))))
            rig.send(superframe(here, there, chance.randbytes(60_000), sequence=sequence, size=500))
        else:
            datagrams = rig.sealed(side, segments_from(rig, side, chance.randint(1, 30), sequence))
            if what == 5 and earlier:
                datagrams = [*datagrams, *chance.choice(earlier)]
            elif what == 6:
                position = chance.randrange(len(datagrams))
                datagrams[position] = datagrams[position][:-1] + bytes([datagrams[position][-1] ^ 1])
            elif what == 7:
                chance.shuffle(datagrams)
                datagrams += rig.sealed(side, [b"not a packet" + bytes(8)])
            rig.receive(side, datagrams, ecn=3 if what == 8 else 0)
            earlier.append(datagrams)
        if chance.random() < 0.3:
            rig.engine.time_passed()
    rig.engine.settle()


def written_for(rig: Rig, side: Side) -> list[bytes]:
    """Return what was delivered from one side, in order."""
    source = bytes(map(int, side.inner[4].split(".")))
    return [frame for frame in rig.tun.written if frame[22:26] == source]


@pytest.mark.parametrize("threads", [False, True], ids=["processes", "threads"])
@pytest.mark.parametrize("seed", range(3))
def test_workers_give_results_of_single_process(seed: int, threads: bool) -> None:
    with closing(Rig(0)) as alone, closing(Rig(3, threads=threads)) as rig:
        play(alone, seed)
        play(rig, seed)
        assert rig.a.device.statistics == alone.a.device.statistics
        assert set(rig.a.device.statistics.drops) >= {DropReason.REPLAY, DropReason.INVALID_TAG}
        assert rig.offloads.used == alone.offloads.used
        for side, same_side in zip(rig.others, alone.others, strict=True):
            assert rig.sent_to(side) == alone.sent_to(same_side)
            assert written_for(rig, side) == written_for(alone, same_side)
            peer, same_peer = rig.a.device.peer(side.public_key), alone.a.device.peer(same_side.public_key)
            assert peer is not None
            assert same_peer is not None
            assert (peer.statistics, peer.endpoint) == (same_peer.statistics, same_peer.endpoint)
            mine, other = session_with(rig, side), session_with(alone, same_side)
            for keypair in (mine, other):
                assert keypair.sending_counter > 100
            assert mine.sending_counter == other.sending_counter
            last = mine.sending_counter + 5000
            assert [mine.receiving_counter.is_fresh(counter) for counter in range(last)] == [
                other.receiving_counter.is_fresh(counter) for counter in range(last)
            ]
        deadlines = rig.engine.next_deadline(), alone.engine.next_deadline()
        assert all(deadline is not None for deadline in deadlines)
        # Each timer has a random part, whose draws may come in another order.
        assert abs((deadlines[0] or 0) - (deadlines[1] or 0)) <= 334 * MILLISECOND


def test_worker_seals_packets_of_superframe(rig: Rig) -> None:
    payload = random.Random(1).randbytes(40 * MSS - 100)  # noqa: S311 - not a secret
    rig.send(superframe(rig.a.inner[4], rig.b.inner[4], payload))
    assert not rig.sent_to(rig.b), "no worker had it"
    rig.engine.settle()
    assert rig.opened_by(rig.b) == tcp_segments(rig.a.inner[4], rig.b.inner[4], payload)


# Order.


def test_sent_batches_keep_order_when_second_is_done_first(rig: Rig) -> None:
    stopped = stop_first_worker(rig)
    rig.send(frame_to(rig, rig.b, 40), frame_to(rig, rig.b, 9))
    rig.send(PLAIN + ip_packet(rig.a.inner[4], rig.b.inner[4]))
    wait_for_answer(rig)
    assert not rig.sent_to(rig.b), "a batch was sent before an earlier one"
    rig.send(frame_to(rig, rig.c, 9))
    wait_for_answer(rig)
    assert len(rig.sent_to(rig.c)) == 9, "a batch waits for that of another peer"
    os.kill(stopped, signal.SIGCONT)
    rig.engine.settle()
    first = rig.counters_to(rig.b)[0]
    assert rig.counters_to(rig.b) == list(range(first, first + 50))


def test_received_batches_keep_order_when_second_is_done_first(rig: Rig) -> None:
    first, second, single = (
        segments_from(rig, rig.b, count, sequence) for count, sequence in ((20, 1), (9, 2), (1, 3))
    )
    stopped = stop_first_worker(rig)
    rig.receive(rig.b, rig.sealed(rig.b, first))
    rig.receive(rig.b, rig.sealed(rig.b, second))
    rig.receive(rig.b, rig.sealed(rig.b, single))
    wait_for_answer(rig)
    assert not rig.tun.written, "a packet was delivered before an earlier one"
    other = segments_from(rig, rig.c, 9)
    rig.receive(rig.c, rig.sealed(rig.c, other))
    wait_for_answer(rig)
    assert len(written_for(rig, rig.c)) == 1, "a batch waits for that of another peer"
    os.kill(stopped, signal.SIGCONT)
    rig.engine.settle()
    sequences = [int.from_bytes(frame[34:38]) for frame in written_for(rig, rig.b)]
    assert sequences == [1, 2, 3]


def test_endpoint_is_that_of_last_datagram_if_batch_ends_later(rig: Rig) -> None:
    batch, single = (rig.sealed(rig.b, segments_from(rig, rig.b, count)) for count in (20, 1))
    stopped = stop_first_worker(rig)
    rig.receive(rig.b, batch)
    # The peer has moved to C's address.
    rig.udp.waiting.append((single[0], len(single[0]), rig.c.endpoint, 0))
    rig.receive(rig.b, [])
    os.kill(stopped, signal.SIGCONT)
    rig.engine.settle()
    peer = rig.a.device.peer(rig.b.public_key)
    assert peer is not None
    assert (peer.endpoint, len(rig.tun.written)) == (rig.c.endpoint, 2)


def test_initiation_that_renews_session_follows_batch(rig: Rig) -> None:
    rig.now += REKEY_AFTER_TIME
    rig.send(frame_to(rig, rig.b, 20))
    rig.engine.settle()
    assert [datagram[0] for datagram in rig.sent_to(rig.b)] == [4] * 20 + [1]


def test_replayed_batch_is_refused_while_original_is_in_work(rig: Rig) -> None:
    datagrams = rig.sealed(rig.b, segments_from(rig, rig.b, 20))
    rig.receive(rig.b, datagrams)
    rig.receive(rig.b, datagrams)
    rig.engine.settle()
    assert (len(rig.tun.written), rig.a.device.statistics.drops) == (1, {DropReason.REPLAY: 20})


def test_keepalive_waits_behind_batch_in_work(rig: Rig) -> None:
    stopped = stop_first_worker(rig)
    rig.send(frame_to(rig, rig.b, 20))
    # A received packet asks for a keepalive after ten seconds; here it is asked for at once.
    peer = rig.a.device.peer(rig.b.public_key)
    assert peer is not None
    rig.engine.carry_out(rig.a.device.peer_configured(peer, rig.now, wants_keepalive=True))
    assert not rig.sent_to(rig.b)
    os.kill(stopped, signal.SIGCONT)
    rig.engine.settle()
    counters, lengths = rig.counters_to(rig.b), [len(datagram) for datagram in rig.sent_to(rig.b)]
    assert (counters, lengths[-1]) == (sorted(counters), 32)


def test_engine_waits_for_workers_when_all_memory_is_in_work(rig: Rig) -> None:
    frames = [frame_to(rig, rig.b, 45, sequence) for sequence in range(50)]
    rig.send(*frames)
    rig.engine.settle()
    counters = rig.counters_to(rig.b)
    assert counters == list(range(counters[0], counters[0] + 50 * 45))


class FullSockets(RecordedSockets):
    """Sockets that lack memory for the first batch."""

    is_full = True

    def send(self, transmit: Transmit[Peer], segment: int = 0) -> str:
        if self.is_full:
            self.is_full = False
            raise OSError(errno.ENOBUFS, "No buffer space available")
        return super().send(transmit, segment)


def test_shortage_while_sending_costs_only_one_batch() -> None:
    with closing(Rig(2, udp=FullSockets())) as rig:
        rig.send(*(frame_to(rig, rig.b, 20, sequence) for sequence in range(20)))
        rig.engine.settle()
        counters = rig.counters_to(rig.b)
        assert counters == list(range(counters[0], counters[0] + 19 * 20))
        assert [topic for topic, _ in rig.complaints] == ["turn"]


# Workers that die.


def test_dead_worker_is_replaced_and_only_its_batch_is_lost(rig: Rig) -> None:
    dead, living = stop_first_worker(rig), rig.parallel.pool.processes[1]
    rig.send(frame_to(rig, rig.b, 20), frame_to(rig, rig.b, 9))
    wait_for_answer(rig)
    os.kill(dead, signal.SIGKILL)
    rig.engine.settle()
    first = session_with(rig, rig.b).sending_counter - 9
    assert rig.counters_to(rig.b) == list(range(first, first + 9))
    assert rig.a.device.statistics.drops == {DropReason.WORKER_DIED: 20}
    assert [topic for topic, _ in rig.complaints] == ["worker died"]
    assert "was killed by signal 9" in rig.complaints[0][1]
    processes = rig.parallel.pool.processes
    assert len(processes) == 2
    assert living in processes
    assert dead not in processes
    rig.send(*(frame_to(rig, rig.b, 20, sequence) for sequence in range(4)))
    rig.engine.settle()
    assert rig.counters_to(rig.b) == list(range(first, first + 89))


def test_answers_of_worker_that_dies_later_are_not_lost() -> None:
    with closing(Rig(1)) as rig:
        rig.send(frame_to(rig, rig.b, 9))
        poll = select.poll()
        poll.register(rig.parallel.pool, select.POLLIN)
        assert poll.poll(DEADLINE), "no worker has answered"
        # A job that the worker has not read makes the kernel report ECONNRESET before the answer.
        worker = stop_first_worker(rig)
        rig.send(frame_to(rig, rig.b, 20))
        os.kill(worker, signal.SIGKILL)
        os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
        rig.engine.settle()
        assert len(rig.counters_to(rig.b)) == 9, "an answer was lost"
        assert rig.a.device.statistics.drops == {DropReason.WORKER_DIED: 20}


def test_received_batch_is_lost_with_worker(rig: Rig) -> None:
    dead = stop_first_worker(rig)
    datagrams = rig.sealed(rig.b, segments_from(rig, rig.b, 20))
    rig.receive(rig.b, datagrams)
    os.kill(dead, signal.SIGKILL)
    rig.engine.settle()
    assert (rig.tun.written, rig.a.device.statistics.drops) == ([], {DropReason.WORKER_DIED: 20})
    assert session_with(rig, rig.b).receiving_counter.is_fresh(Data.parse(datagrams[0]).counter)


def test_worker_that_does_not_answer_is_killed_after_two_seconds(rig: Rig) -> None:
    hung = stop_first_worker(rig)
    rig.send(frame_to(rig, rig.b, 20))
    assert rig.engine.next_deadline() == rig.now + 2 * SECOND
    rig.now += 2 * SECOND
    rig.engine.time_passed()
    rig.engine.settle()
    assert rig.a.device.statistics.drops == {DropReason.WORKER_DIED: 20}
    assert hung not in rig.parallel.pool.processes


def test_engine_does_work_itself_when_no_worker_can_be_started() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    # One descriptor is left, for epoll.
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        rig = Rig(2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with closing(rig):
        assert rig.parallel.pool.processes == []
        rig.send(*(frame_to(rig, rig.b, 20, sequence) for sequence in range(4)))
        assert len(rig.opened_by(rig.b)) == 80
        assert [topic for topic, _ in rig.complaints] == ["worker missing"]
        # A second later it is tried again.
        rig.now += SECOND
        rig.engine.time_passed()
        assert len(rig.parallel.pool.processes) == 2


# The end.


def test_workers_end_with_engine(rig: Rig) -> None:
    descriptors = [os.pidfd_open(worker) for worker in rig.parallel.pool.processes]
    rig.close()
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], 0)[0], "a worker still runs"
        os.close(descriptor)


def test_workers_end_when_main_process_is_killed() -> None:
    code = """
        import sys
        from selftests.support.recorded import Rig
        rig = Rig(3)
        print(*rig.parallel.pool.processes, flush=True)
        sys.stdin.read()
    """
    main = subprocess.Popen(
        [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with main:
        assert main.stdout is not None
        workers = [int(word) for word in main.stdout.readline().split()]
        assert len(workers) == 3
        poll = select.poll()
        descriptors = [os.pidfd_open(worker) for worker in workers]
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        assert not poll.poll(0), "a worker has ended by itself"
        main.kill()
        for descriptor in descriptors:
            assert select.select([descriptor], [], [], DEADLINE / 1000)[0], "a worker outlives the main process"
            os.close(descriptor)


def test_worker_holds_no_descriptor_but_its_socket(rig: Rig) -> None:
    # An answer shows that the worker has left the main process.
    rig.send(*(frame_to(rig, rig.b, 9, sequence) for sequence in range(2)))
    rig.engine.settle()
    for worker in rig.parallel.pool.processes:
        opened = {int(path.name): str(path.readlink()) for path in Path(f"/proc/{worker}/fd").iterdir()}
        others = [target for number, target in opened.items() if number > 2]
        assert len(others) == 1
        assert others[0].startswith("socket:")


# The program.

PROGRAM = """
        import os, select, signal, subprocess, sys
        from pathlib import Path
        from harness.wait import poll_until
        path = Path("/run/wireguard/wg0.sock")
        subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
        def start(*options):
            return subprocess.Popen([sys.executable, "-m", "refwg", "--engine", "batch", *options, "wg0"])
        def wait_for(condition):
            assert poll_until(condition, bool, 60)
        def ask():
            return subprocess.run(["wg", "show", "wg0"], capture_output=True).returncode == 0
        def workers():
            ask()
            comms = {int(path.parent.name): path.read_text() for path in Path("/proc").glob("[0-9]*/comm")}
            return {process for process, name in comms.items() if name == "refwg worker\\n"}
        def interface():
            return Path("/sys/class/net/wg0").exists() or subprocess.run(["ip", "link", "show", "wg0"],
                capture_output=True).returncode == 0
"""


def test_program_replaces_killed_worker_and_ends_with_workers() -> None:
    code = """
        refwg = start("-f", "--workers", "2"); wait_for(path.exists)
        wait_for(lambda: len(workers()) == 2)
        first = workers(); os.kill(min(first), signal.SIGKILL)
        wait_for(lambda: len(workers() - {min(first)}) == 2); print(max(first) in workers())
        status = Path(f"/proc/{max(first)}/status").read_text()
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
        print(ignored >> signal.SIGTERM - 1 & 1, ignored >> signal.SIGINT - 1 & 1)
        ended = [os.pidfd_open(worker) for worker in workers()]; print(len(ended))
        refwg.terminate(); print(refwg.wait(5), path.exists())
        wait_for(lambda: all(select.select([descriptor], [], [], 0)[0] for descriptor in ended))
    """
    assert run_in_sandbox(PROGRAM, code) == "True\n1 1\n2\n0 False\n"


@pytest.mark.parametrize("options", [(), ("--drop-privileges", "root")], ids=["daemon", "dropped"])
def test_workers_of_daemon_end_when_it_is_killed(options: tuple[str, ...]) -> None:
    code = f"""
        print(start("--workers", "2", *{options}).wait(60))
        wait_for(lambda: len(workers()) == 2)
        descriptors = [os.pidfd_open(worker) for worker in workers()]
        status = Path(f"/proc/{{min(workers())}}/status").read_text()
        os.kill(int(status.partition("PPid:")[2].split()[0]), signal.SIGKILL)
        wait_for(lambda: all(select.select([descriptor], [], [], 0)[0] for descriptor in descriptors))
        wait_for(lambda: not interface())
    """
    assert run_in_sandbox(PROGRAM, code) == "0\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--workers", "-1"), "'-1' workers: expected a number from 0 to 32"),
        (("--workers=33",), "'33' workers: expected a number from 0 to 32"),
        (("--workers=two",), "'two' workers: expected a number from 0 to 32"),
        (("--workers=2", "--engine=simple"), "--workers: the simple engine has none"),
    ],
    ids=["negative", "many", "word", "simple"],
)
def test_unusable_number_of_workers_is_usage_error(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*options, "wg0"])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
