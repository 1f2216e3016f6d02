"""Cut and join superframes with refwg's code, as its batch engine does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from refwg.engine.cut import Superframe
from refwg.engine.join import Joiner
from refwg.engine.rows import Arena
from refwg.engine.virtio import HEADER_LENGTH, parse
from refwg.messages import MINIMUM_DATA_LENGTH, padded_length
from selftests.support import flows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refwg.engine.join import Run
    from refwg.engine.rows import Rows

EVERYTHING = {"tcp4": True, "tcp6": True, "udp4": True, "udp6": True}


def laid_out(packets: Sequence[bytes], length: int = 0) -> Rows:
    """Lay packets into rows, with zeros behind; length: of the padded packets, default: as long as the longest."""
    rows = Arena(1 << 17).rows((length or max(map(len, packets))) + MINIMUM_DATA_LENGTH)
    rows.matrix[:] = 0
    for row, packet in enumerate(packets):
        rows.plaintexts[row][: len(packet)] = packet
    return rows


def superframe_of(frame: bytes) -> Superframe:
    """Read a superframe as a kernel passes it."""
    return Superframe(np.frombuffer(frame, np.uint8)[HEADER_LENGTH:], parse(frame))


def cut(frame: bytes, mtu: int = 1420, step: int = 64) -> list[bytes]:
    """Cut a superframe as the engine does, some packets at a time, into rows that were used before."""
    superframe = superframe_of(frame)
    rows = Arena(1 << 17).rows(padded_length(superframe.packet_length, mtu) + MINIMUM_DATA_LENGTH)
    packets = []
    for first in range(0, superframe.count, step):
        rows.matrix[:] = 0xEE
        count = min(step, superframe.count - first)
        superframe.fill(rows, first, count)
        for row in range(count):
            is_last = first + row == superframe.count - 1
            length = superframe.last_length if is_last else superframe.packet_length
            padding = bytes(rows.plaintexts[row][length:])
            assert not any(padding), "padding is not zero"
            packets.append(bytes(rows.plaintexts[row][:length]))
    return packets


def joined(packets: Sequence[bytes], length: int = 0, **kinds: bool) -> list[Run]:
    """Return the packets that a joiner would deliver together; kinds: that the interface does not take."""
    joiner = Joiner(**(EVERYTHING | kinds))
    return joiner.runs(laid_out(packets, length), [len(packet) for packet in packets])


def delivered(packets: Sequence[bytes]) -> list[list[bytes]]:
    """Return the packets of each superframe or packet that is delivered, cut by the other opinion."""
    joiner, rows = Joiner(**EVERYTHING), laid_out(packets)
    lengths = [len(packet) for packet in packets]
    frames = []
    for run in joiner.runs(rows, lengths):
        if run.end == run.first + 1 or run.flow is None:
            frames.append(bytes(HEADER_LENGTH) + packets[run.first])
            continue
        virtio, header = joiner.headers(rows, run, run.flow, lengths)
        payload = b"".join(packets[row][run.flow.header_length :] for row in range(run.first, run.end))
        frames.append(virtio.to_bytes() + header + payload)
    return [flows.cut(frame) for frame in frames]
