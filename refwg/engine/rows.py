"""Lay out messages of one length in one buffer, as the rows of a matrix of numpy.

The kernel takes and gives such buffers whole (UDP_SEGMENT, UDP_GRO). A row is a data message (5.4.6 of the paper): 16
bytes of header, the padded packet, 16 bytes of tag. Views of rows are made once for each length, because making them
costs more than using them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import numpy as np

from refwg.messages import DATA_HEADER_LENGTH, MINIMUM_DATA_LENGTH, TAG_LENGTH

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Integers = NDArray[np.unsignedinteger]

# UDP_MAX_SEGMENTS of Linux: the most datagrams that one call can take or give.
MAX_ROWS: Final = 128
# The bytes of an arena, and how many of them one read may fill.
ARENA_LENGTH: Final = 2 * 65536
LARGEST_READ: Final = 65536
# Sums of 16-bit words are taken modulo 2^16 - 1, which is ones' complement arithmetic (RFC 1071).
ONES: Final = 0xFFFF
_ONES: Final = np.uint64(ONES)
# Layouts kept. Without a limit, packets of many lengths would keep one for each length.
_LAYOUTS: Final = 64
_NONCE_LENGTH: Final = 12
_COUNTER_OFFSET: Final = 8


class Rows:
    """Messages of one length in a buffer, at most 128.

    matrix: all bytes, one message in a row. plaintexts: for each row a view of the padded packet. ciphertexts: the same
    with the tag, because an encrypted packet takes the place of the packet.
    """

    def __init__(self, memory: memoryview, length: int) -> None:
        """Divide a buffer into messages of `length` bytes."""
        self.length = length
        self.count = min(MAX_ROWS, len(memory) // length)
        self.matrix = np.frombuffer(memory, np.uint8, self.count * length).reshape(self.count, length)
        self._view = memory
        starts = range(DATA_HEADER_LENGTH, self.count * length, length)
        room = length - DATA_HEADER_LENGTH
        self.plaintexts = [self._view[start : start + room - TAG_LENGTH] for start in starts]
        self.ciphertexts = [self._view[start : start + room] for start in starts]
        self._fields: dict[tuple[int, str], Integers] = {}
        self._words: dict[tuple[int, int], Integers] = {}
        self._slices: dict[tuple[int, int], list[memoryview]] = {}
        self.types_and_indices = self.field(-DATA_HEADER_LENGTH, "<u8")
        self.counters = self.field(_COUNTER_OFFSET - DATA_HEADER_LENGTH, "<u8")

    def field(self, offset: int, kind: str) -> Integers:
        """Return the same field of all packets as an array.

        offset: from the start of the packet; negative in the header of the message. kind: numpy's name of the type,
        such as ">u2".
        """
        found = self._fields.get((offset, kind))
        if found is None:
            start = DATA_HEADER_LENGTH + offset
            found = np.ndarray((self.count,), kind, self._view, start, (self.length,))
            self._fields[offset, kind] = found
        return found

    def packets(self, start: int, end: int) -> Bytes:
        """Return these bytes of all packets, as a matrix."""
        return self.matrix[:, DATA_HEADER_LENGTH + start : DATA_HEADER_LENGTH + end]

    def slices(self, start: int, end: int) -> list[memoryview]:
        """Return these bytes of each packet, as views."""
        found = self._slices.get((start, end))
        if found is None:
            if len(self._slices) >= _LAYOUTS:
                self._slices.clear()
            found = [plaintext[start:end] for plaintext in self.plaintexts]
            self._slices[start, end] = found
        return found

    def sums(self, start: int, rows: int, end: int = 0) -> NDArray[np.uint64]:
        """Return for each of the first `rows` packets the sum of its 16-bit words, padding included.

        start, end: the part of the packets; 0: to the end of the padding. start is a multiple of four. The words are
        little-endian, and the sums modulo 2^16 - 1. Words of 32 bits are added: modulo that number it is the same.
        """
        words, rest = divmod((end or self.length - MINIMUM_DATA_LENGTH) - start, 4)
        matrix = self._words.get((start, words))
        if matrix is None:
            matrix = np.ndarray((self.count, words), "<u4", self._view, DATA_HEADER_LENGTH + start, (self.length, 4))
            self._words[start, words] = matrix
        total: NDArray[np.uint64] = np.add.reduce(matrix[:rows], axis=1, dtype=np.uint64)
        for position in range(rest):
            last_bytes = self.field(start + words * 4 + position, "u1")[:rows].astype(np.uint64)
            total += last_bytes << np.uint64(8 * (position % 2))
        total %= _ONES
        return total

    def message(self, row: int, length: int) -> memoryview:
        """Return one message; length: less than that of the row for a last, shorter message."""
        start = row * self.length
        return self._view[start : start + length]

    def messages(self, rows: int, last_length: int) -> memoryview:
        """Return the first `rows` messages, of which the last may be shorter."""
        return self._view[: (rows - 1) * self.length + last_length]


class Arena:
    """A buffer, and its division into rows of the lengths that were last used."""

    def __init__(self, size: int, memory: memoryview | None = None, layouts: int = _LAYOUTS) -> None:
        """Make a buffer, or take `memory` of that size; layouts: the most divisions that are kept."""
        self.memory = memoryview(bytearray(size)) if memory is None else memory
        self._most = layouts
        self._layouts: OrderedDict[int, Rows] = OrderedDict()

    def rows(self, length: int) -> Rows:
        """Return the buffer as messages of this length."""
        found = self._layouts.get(length)
        if found is None:
            found = self._layouts[length] = Rows(self.memory, length)
            if len(self._layouts) > self._most:
                self._layouts.popitem(last=False)
        return found


class Nonces:
    """Nonces of up to 128 messages, as views that stay where they are (5.4.6: four zero bytes, then the counter)."""

    def __init__(self) -> None:
        memory = memoryview(bytearray(MAX_ROWS * _NONCE_LENGTH))
        self.counters: Integers = np.ndarray((MAX_ROWS,), "<u8", memory, 4, (_NONCE_LENGTH,))
        self.views = [memory[start : start + _NONCE_LENGTH] for start in range(0, len(memory), _NONCE_LENGTH)]


def swapped(word: int) -> int:
    """Return a 16-bit word with its bytes exchanged: what a big-endian word adds to a sum of little-endian words."""
    return (word & 0xFF) << 8 | word >> 8


def sum_of_words(data: bytes | bytearray | memoryview) -> int:
    """Return the sum of the big-endian 16-bit words modulo 2^16 - 1; the length is even."""
    return int.from_bytes(data) % ONES
