"""Encrypt and decrypt the messages in rows, and read the lengths of their packets.

Does what encrypt_packet in send.c and decrypt_packet in receive.c do; section 5.4.6 of the paper. Sessions, counters
and peers are the caller's, so that this can run in another process. No input or output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from refwg import ip
from refwg.engine.rows import MAX_ROWS
from refwg.messages import DATA_HEADER_LENGTH, MINIMUM_DATA_LENGTH, MessageType

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.crypto import Aead
    from refwg.engine.rows import Nonces, Rows

_NUMBERS: Final = np.arange(MAX_ROWS, dtype=np.uint64)
_IPV4: Final = 4
# By IP version: ones for version and traffic class, and for the source address, which is there.
_HEAD_MASKS: Final = {
    4: (np.frombuffer(b"\xf0\xff" + bytes(10) + b"\xff" * 4, np.uint8), 16),
    6: (np.frombuffer(b"\xff\xf0" + bytes(6) + b"\xff" * 16, np.uint8), 24),
}


class Messages(NamedTuple):
    """Messages in the first `number` rows; last_length: of the last, which may be shorter than its row."""

    rows: Rows
    number: int
    last_length: int

    @property
    def padded(self) -> list[int]:
        """The lengths of the padded packets in them."""
        lengths = [self.rows.length - MINIMUM_DATA_LENGTH] * self.number
        lengths[-1] = self.last_length - MINIMUM_DATA_LENGTH
        return lengths

    def parts(self) -> tuple[list[memoryview], list[memoryview]]:
        """Return the padded packets, and the same with their tags."""
        plaintexts, ciphertexts = self.rows.plaintexts[: self.number], self.rows.ciphertexts[: self.number]
        if self.last_length != self.rows.length:
            ciphertexts[-1] = ciphertexts[-1][: self.last_length - DATA_HEADER_LENGTH]
            plaintexts[-1] = plaintexts[-1][: self.last_length - MINIMUM_DATA_LENGTH]
        return plaintexts, ciphertexts


def seal(messages: Messages, aead: Aead, remote_index: int, first_counter: int, nonces: Nonces) -> None:
    """Encrypt the padded packets where they are, and write the headers of the messages."""
    rows, count, _ = messages
    rows.types_and_indices[:count] = MessageType.DATA | remote_index << 32
    # 5.4.6: consecutive counters, each of them the nonce of its packet
    np.add(_NUMBERS[:count], np.uint64(first_counter), out=nonces.counters[:count])
    rows.counters[:count] = nonces.counters[:count]
    plaintexts, ciphertexts = messages.parts()
    aead.seal_each(nonces.views, plaintexts, ciphertexts)


def open_all(messages: Messages, aead: Aead, nonces: Nonces) -> list[int]:
    """Decrypt messages where they are; returns the rows of those whose tags do not verify."""
    nonces.counters[: messages.number] = messages.rows.counters[: messages.number]
    plaintexts, ciphertexts = messages.parts()
    return aead.open_each(nonces.views, ciphertexts, plaintexts)


def openers(messages: Messages, aead: Aead, nonces: Nonces) -> list[Callable[[], bool]]:
    """Return for each message a function that decrypts it where it is, and returns whether its tag verifies."""
    nonces.counters[: messages.number] = messages.rows.counters[: messages.number]

    def opener(nonce: memoryview, ciphertext: memoryview, plaintext: memoryview) -> Callable[[], bool]:
        return lambda: not aead.open_each([nonce], [ciphertext], [plaintext])

    plaintexts, ciphertexts = messages.parts()
    return list(map(opener, nonces.views, ciphertexts, plaintexts))


def is_run(counters: list[int]) -> bool:
    """Return True if each counter is one more than that before it."""
    return counters == list(range(counters[0], counters[0] + len(counters)))


def packet_lengths(messages: Messages) -> list[int] | None:
    """Return the lengths of the packets in decrypted messages, if they differ in nothing that decides about delivery.

    That is version, traffic class and source, and that each length fits. None: each must be looked at. What is behind
    the packets is cleared.
    """
    rows, count, _ = messages
    head = bytes(rows.plaintexts[0][: ip.IPV6_HEADER_LENGTH])
    version = ip.version(head)
    if not version:
        return None
    mask, end = _HEAD_MASKS[version]
    heads = rows.packets(0, end)[:count]
    if np.count_nonzero((heads ^ heads[0]) & mask):
        return None
    lengths: list[int] = rows.field(2 if version == _IPV4 else 4, ">u2")[:count].tolist()
    if version != _IPV4:
        lengths = [length + ip.IPV6_HEADER_LENGTH for length in lengths]
    padded = messages.padded
    if min(lengths) < ip.IPV4_HEADER_LENGTH or max(lengths) > padded[0] or lengths[-1] > padded[-1]:
        return None
    _clear_padding(rows, lengths)
    return lengths


def _clear_padding(rows: Rows, lengths: list[int]) -> None:
    """Write zeros behind the packets: checksums of whole rows must not count what a peer has put there.

    Behind a shorter last message there are also its tag, and what an earlier batch has left.
    """
    end, last = rows.length - MINIMUM_DATA_LENGTH, len(lengths) - 1
    if lengths[:last].count(lengths[0]) == last:
        if lengths[0] < end:
            rows.packets(lengths[0], end)[:last] = 0
    else:
        for row, length in enumerate(lengths):
            rows.packets(length, end)[row] = 0
    rows.packets(lengths[last], end)[last] = 0
