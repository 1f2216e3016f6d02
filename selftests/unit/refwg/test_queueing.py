from __future__ import annotations

import pytest

from refwg.messages import SECOND
from refwg.queueing import HandshakeQueue, LastUnderLoad, StagedQueue


@pytest.mark.requirement("Q-01", "Q-02")
def test_staged_queue_keeps_newest_129_single_packets() -> None:
    queue: StagedQueue[int] = StagedQueue()
    dropped = sum(queue.stage([packet]) for packet in range(300))
    assert dropped == 171
    assert queue.take() == list(range(171, 300))


@pytest.mark.requirement("Q-11")
def test_staged_batch_exceeds_limit_until_next_packet() -> None:
    queue: StagedQueue[int] = StagedQueue()
    assert queue.stage(range(200)) == 0
    assert queue.stage([200]) == 72
    assert len(queue) == 129


@pytest.mark.requirement("Q-03", "Q-12")
def test_restaged_packets_keep_their_place() -> None:
    queue: StagedQueue[int] = StagedQueue()
    queue.stage([1, 2])
    taken = queue.take()
    queue.stage([3])
    queue.restage(taken)
    assert queue.take() == [1, 2, 3]


@pytest.mark.requirement("DOS-07")
def test_handshake_queue_refuses_message_4097() -> None:
    queue: HandshakeQueue[int] = HandshakeQueue(LastUnderLoad())
    assert [queue.put(number) for number in range(4097)].count(False) == 1
    queue.clear()
    assert len(queue) == 0


@pytest.mark.requirement("DOS-01", "DOS-02")
@pytest.mark.parametrize(
    ("waiting", "pause", "is_under_load"),
    [(511, 0, False), (512, 0, True), (512, SECOND - 1, True), (512, SECOND, False)],
)
def test_load_starts_at_512_messages_and_lasts_one_second(waiting: int, pause: int, is_under_load: bool) -> None:
    queue: HandshakeQueue[int] = HandshakeQueue(LastUnderLoad())
    for number in range(waiting):
        queue.put(number)
    assert queue.is_under_load(7) is (waiting >= 512)
    queue.clear()
    assert queue.is_under_load(7 + pause) is is_under_load


def test_handshake_message_counts_in_queue_until_done() -> None:
    queue: HandshakeQueue[str] = HandshakeQueue(LastUnderLoad())
    queue.put("first")
    assert queue.next_message() == "first"
    assert len(queue) == 1
    queue.done()
    assert len(queue) == 0


@pytest.mark.requirement("DOS-04", "DOS-07")
def test_full_queue_has_room_for_proven_sender() -> None:
    queue: HandshakeQueue[str] = HandshakeQueue(LastUnderLoad())
    while queue.put("forged"):
        pass
    assert queue.put("proven", is_proven=True)
    assert queue.next_message() == "proven"
    queue.done()
    assert [queue.put("proven", is_proven=True) for _ in range(4097)].count(False) == 1
    assert len(queue) == 2 * 4096
    queue.clear()
    assert len(queue) == 0


@pytest.mark.requirement("DOS-03", "DOS-04")
def test_both_kinds_of_messages_are_processed_in_turn() -> None:
    queue: HandshakeQueue[str] = HandshakeQueue(LastUnderLoad())
    for name in ("p1", "p2", "f1", "f2", "f3"):
        queue.put(name, is_proven=name.startswith("p"))
    order = []
    while queue:
        order.append(queue.next_message())
        queue.done()
    assert order == ["p1", "f1", "p2", "f2", "f3"]


@pytest.mark.requirement("DOS-09")
def test_load_is_shared_by_queues_with_same_last_under_load() -> None:
    last_under_load = LastUnderLoad()
    flooded: HandshakeQueue[int] = HandshakeQueue(last_under_load)
    idle: HandshakeQueue[int] = HandshakeQueue(last_under_load)
    for number in range(512):
        flooded.put(number)
    assert not idle.is_under_load(7)
    assert flooded.is_under_load(7)
    assert idle.is_under_load(7 + SECOND - 1)
    assert not idle.is_under_load(7 + SECOND)
