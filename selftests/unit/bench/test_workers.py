from __future__ import annotations

from contextlib import closing

import pytest

from bench.workers import PACKETS, CheckedSockets, CheckedTun, Measured, OutOfOrder, Recording, measure, ratios
from selftests.support.recorded import MSS, Rig, superframe


def test_measurement_covers_both_directions() -> None:
    results = measure([0, 2], rounds=1, superframes=4)
    assert set(ratios(results)) == {"send_2_over_0", "receive_2_over_0"}
    for by_number in results.values():
        assert all(value.rate > 0 and value.main > 0 for values in by_number.values() for value in values)
        assert (by_number[0][0].workers, by_number[2][0].workers > 0) == (0, True)


def test_lost_batch_fails_measurement() -> None:
    recording = Recording(2)
    del recording.batches[3]
    with pytest.raises(OutOfOrder, match="delivered sequence number"):
        recording.receive(0)


def test_counter_gap_fails_measurement() -> None:
    sockets = CheckedSockets()
    sockets.next_counter = 7
    with closing(Rig(0, udp=sockets)) as rig:
        frame = superframe(rig.a.inner[4], rig.b.inner[4], bytes(PACKETS * MSS))
        with pytest.raises(OutOfOrder, match="sent counter 1, expected 7"):
            rig.send(frame)


def test_packets_not_joined_fail_measurement() -> None:
    with pytest.raises(OutOfOrder, match="segment size 0"):
        CheckedTun().write_parts([bytes(10), bytes(40), b"payload"])


def test_bound_is_that_of_busiest_part() -> None:
    measured = Measured(rate=1, main=1, workers=4)
    assert [measured.bound(workers, cores) for workers, cores in ((1, 4), (2, 2), (2, 4), (8, 8))] == [
        250_000,
        400_000,
        500_000,
        1_000_000,
    ]
