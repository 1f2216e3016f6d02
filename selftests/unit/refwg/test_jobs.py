from __future__ import annotations

import pytest

from refwg.engine.jobs import Answer, Areas, Job, Kind
from refwg.engine.join import Flow, Run
from refwg.engine.rows import ARENA_LENGTH
from refwg.engine.virtio import LARGEST_FRAME


def test_job_record_keeps_largest_values() -> None:
    job = Job(Kind.CUT, 99, 128, 65535, 65535, (1 << 32) - 1, (1 << 64) - 1, 65, LARGEST_FRAME, bytes(range(32)))
    assert Job.parse(job.to_bytes()) == job


@pytest.mark.parametrize(
    "answer",
    [
        Answer(3, [], None, []),
        Answer(3, [0, 127], None, []),
        Answer(3, [], [1420] * 127 + [65535], [Run(0, 127, Flow(6, 17, 40, 48)), Run(127, 128)]),
        Answer(3, [], [20], [Run(0, 1)]),
    ],
    ids=["sealed", "failed", "superframe", "single"],
)
def test_answer_record_keeps_all_values(answer: Answer) -> None:
    assert Answer.parse(answer.to_bytes()) == answer


def test_areas_do_not_overlap() -> None:
    memory = memoryview(bytearray(Areas.size(3, 4)))
    areas = Areas(memory, 3, 4)
    buffers = [*areas.frames, *(arena.memory for arena in areas.arenas)]
    assert [len(buffer) for buffer in buffers] == [LARGEST_FRAME] * 3 + [ARENA_LENGTH] * 4
    for number, buffer in enumerate(buffers, 1):
        buffer[:] = bytes([number]) * len(buffer)
    assert [set(bytes(buffer)) for buffer in buffers] == [{number} for number in range(1, 8)]
