"""Describe a batch to encrypt or decrypt as a short record, and do what it says.

The driver's counterpart are wg_packet_encrypt_worker in send.c and wg_packet_decrypt_worker in receive.c. One side, the
engine, lays a batch into an area of the memory and sends the record to a worker. The worker's answer is a record as
well. It has everything that can be computed without sessions and peers. No input or output.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from refwg.crypto import Aead
from refwg.engine.cut import Superframe
from refwg.engine.join import Flow, Run
from refwg.engine.rows import ARENA_LENGTH, Arena, Nonces
from refwg.engine.sealing import Messages, open_all, packet_lengths, seal
from refwg.engine.virtio import HEADER_LENGTH, LARGEST_FRAME, parse

if TYPE_CHECKING:
    from refwg.engine.join import Joiner

# Multiples of the page size.
_FRAME_ROOM: Final = -(-LARGEST_FRAME // 4096) * 4096
# Divisions of an area into rows that are kept. There are many areas, and each division takes some ten kilobytes.
_LAYOUTS: Final = 8
_JOB: Final = Struct("=BHHIIIQHI32s")
_ANSWER: Final = Struct("=HHHH")


class Kind(IntEnum):
    """What is to be done: cut a superframe and encrypt the packets, encrypt packets in rows, or decrypt messages."""

    CUT = 1
    SEAL = 2
    OPEN = 3


class Job(NamedTuple):
    """A batch; its memory is not touched by others until the answer has come.

    arena: the number of the area with the rows. packets: how many, in rows of `length` bytes. last_length: of the last
    message. remote_index, first_counter: for the headers, if it is to be encrypted. frame: the number of the area with
    the superframe that is to be cut. frame_length: of it, with its virtio header.
    """

    kind: Kind
    arena: int
    packets: int
    length: int
    last_length: int
    remote_index: int
    first_counter: int
    frame: int
    frame_length: int
    key: bytes

    def to_bytes(self) -> bytes:
        """Return the record."""
        return _JOB.pack(*self)

    @classmethod
    def parse(cls, record: bytes) -> Job:
        """Read a record."""
        kind, *rest = _JOB.unpack(record)
        return cls(Kind(kind), *rest)


class Answer(NamedTuple):
    """What became of a batch.

    arena: as in the job. failed: the rows of messages whose tags do not verify. lengths: those of the packets in
    decrypted messages; None: each must be looked at. runs: the packets as superframes, if there are lengths.
    """

    arena: int
    failed: list[int]
    lengths: list[int] | None
    runs: list[Run]

    def to_bytes(self) -> bytes:
        """Return the record."""
        if not self.failed and not self.lengths:
            return _ANSWER.pack(self.arena, 0, 0, 0)
        numbers = [*self.failed, *(self.lengths or ())]
        for first, end, flow in self.runs:
            numbers += (first, end, *(flow or (0, 0, 0, 0)))
        head = _ANSWER.pack(self.arena, len(self.failed), len(self.lengths or ()), len(self.runs))
        return head + np.array(numbers, np.uint16).tobytes()

    @classmethod
    def parse(cls, record: bytes) -> Answer:
        """Read a record."""
        arena, failed, lengths, runs = _ANSWER.unpack_from(record)
        if not failed and not lengths:
            return cls(arena, [], None, [])
        numbers: list[int] = np.frombuffer(record, np.uint16, offset=_ANSWER.size).tolist()
        rest = numbers[failed + lengths :]
        fields = [rest[start : start + 6] for start in range(0, 6 * runs, 6)]
        return cls(
            arena,
            numbers[:failed],
            numbers[failed : failed + lengths] if lengths else None,
            [Run(first, end, Flow(*flow) if flow[0] else None) for first, end, *flow in fields],
        )


class Areas:
    """Memory divided into areas: `frames` areas for superframes, then `arenas` areas for rows."""

    def __init__(self, memory: memoryview, frames: int, arenas: int) -> None:
        self.frames = [memory[start : start + LARGEST_FRAME] for start in range(0, frames * _FRAME_ROOM, _FRAME_ROOM)]
        starts = range(frames * _FRAME_ROOM, self.size(frames, arenas), ARENA_LENGTH)
        self.arenas = [Arena(ARENA_LENGTH, memory[start : start + ARENA_LENGTH], _LAYOUTS) for start in starts]

    @staticmethod
    def size(frames: int, arenas: int) -> int:
        """Return how many bytes of memory are needed."""
        return frames * _FRAME_ROOM + arenas * ARENA_LENGTH


class Workbench:
    """Does jobs; each worker has one of its own.

    areas: in the shared memory. joiner: finds the superframes among decrypted packets.
    """

    def __init__(self, areas: Areas, joiner: Joiner) -> None:
        self._areas = areas
        self._joiner = joiner
        self._nonces = Nonces()

    def do(self, record: bytes) -> bytes:
        """Do a job and return the answer. The key is not kept."""
        job = Job.parse(record)
        rows = self._areas.arenas[job.arena].rows(job.length)
        messages, aead = Messages(rows, job.packets, job.last_length), Aead(job.key)
        if job.kind is Kind.OPEN:
            failed = open_all(messages, aead, self._nonces)
            lengths = packet_lengths(messages) if not failed else None
            runs = self._joiner.runs(rows, lengths) if lengths else []
            return Answer(job.arena, failed, lengths, runs).to_bytes()
        if job.kind is Kind.CUT:
            frame = self._areas.frames[job.frame]
            packet = np.frombuffer(frame[HEADER_LENGTH : job.frame_length], np.uint8)
            Superframe(packet, parse(frame)).fill(rows, 0, job.packets)
        seal(messages, aead, job.remote_index, job.first_counter, self._nonces)
        return Answer(job.arena, [], None, []).to_bytes()
