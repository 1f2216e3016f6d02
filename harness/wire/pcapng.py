"""Write captures as pcapng files, with comments and keys for Wireshark; read them again.

Each end has an interface block; times are in nanoseconds. Source: draft-ietf-opsawg-pcapng, sections 4.1 (section
header), 4.2 (interface), 4.3 (packet), 4.6 (statistics) and 4.7 (decryption secrets).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_SECTION, _INTERFACE, _STATISTICS, _PACKET, _SECRETS = 0x0A0D0D0A, 1, 5, 6, 10
_MAGIC: Final = 0x1A2B3C4D
_ETHERNET: Final = 1
_WIREGUARD_KEY_LOG: Final = 0x57474B4C  # WGKL
_WHOLE_SECTION: Final = 0xFFFF_FFFF_FFFF_FFFF
# Option codes; a code has another meaning in another block.
_END, _COMMENT = 0, 1  # all blocks
_APPLICATION: Final = 4  # section: shb_userappl
_NAME, _DESCRIPTION, _RESOLUTION = 2, 3, 9  # interface: if_name, if_description, if_tsresol
_FLAGS: Final = 2  # packet: epb_flags
_MISSED: Final = 5  # statistics: isb_ifdrop
_NANOSECONDS: Final = 9
_INBOUND, _OUTBOUND = 1, 2
_DIRECTION: Final = 3  # mask of epb_flags


@dataclass(frozen=True, slots=True)
class End:
    """An interface that was captured. missed: number of frames that the capture lost."""

    name: str
    description: str = ""
    missed: int = 0


@dataclass(frozen=True, slots=True)
class Packet:
    """A frame that passed an end. end: index in the list of ends; time: ns of wall time; comment: for Wireshark."""

    end: int
    time: int
    frame: bytes = field(repr=False)
    is_outbound: bool
    comment: str = ""


def save(path: Path, ends: Sequence[End], packets: Iterable[Packet], *, keys: str = "", comment: str = "") -> None:
    """Write a pcapng file.

    keys: text in Wireshark's key log format for WireGuard; it is stored before the packets, where Wireshark needs it.
    comment: of the whole file. Raises OSError.
    """
    latest = 0
    with path.open("wb") as file:
        file.write(_section(comment))
        file.writelines(_interface(end) for end in ends)
        if keys:
            file.write(_secrets(keys.encode()))
        for packet in packets:
            latest = max(latest, packet.time)
            file.write(_packet(packet))
        file.writelines(_statistics(number, end, latest) for number, end in enumerate(ends))


def load(path: Path) -> tuple[int, list[Packet]]:
    """Read a file that `save` has written; returns the number of its ends, and the packets without their comments.

    Raises ValueError for a file that is cut off, or that is not such a file; OSError.
    """
    data = path.read_bytes()
    ends, packets, offset = 0, [], 0
    while offset < len(data):
        kind, size = _read_header(data, offset)
        if kind == _INTERFACE:
            ends += 1
        elif kind == _PACKET:
            packets.append(_read_packet(data[offset + 8 : offset + size - 4]))
        offset += size
    return ends, packets


def _read_header(data: bytes, offset: int) -> tuple[int, int]:
    """Return type and length of the block at this offset."""
    if offset + 12 > len(data):
        raise ValueError(f"block at byte {offset} is cut off")
    kind, size = struct.unpack_from("<II", data, offset)
    if size < 12 or size % 4 or offset + size > len(data):  # noqa: PLR2004 - the type, and the length twice
        raise ValueError(f"block at byte {offset} has length {size}")
    return kind, size


def _read_packet(body: bytes) -> Packet:
    end, high, low, size, _ = struct.unpack_from("<IIIII", body)
    frame = body[20 : 20 + size]
    is_outbound, offset = False, 20 + len(_padded(frame))
    while offset + 4 <= len(body):
        code, length = struct.unpack_from("<HH", body, offset)
        if code == _FLAGS:
            is_outbound = body[offset + 4] & _DIRECTION == _OUTBOUND
        offset += 4 + length + -length % 4
    return Packet(end, high << 32 | low, frame, is_outbound)


def _section(comment: str) -> bytes:
    options = [(_COMMENT, comment.encode()), (_APPLICATION, b"wg-interop")]
    return _block(_SECTION, struct.pack("<IHHQ", _MAGIC, 1, 0, _WHOLE_SECTION), options)


def _interface(end: End) -> bytes:
    options = [
        (_NAME, end.name.encode()),
        (_DESCRIPTION, end.description.encode()),
        (_RESOLUTION, bytes([_NANOSECONDS])),
    ]
    return _block(_INTERFACE, struct.pack("<HHI", _ETHERNET, 0, 0), options)


def _secrets(keys: bytes) -> bytes:
    return _block(_SECRETS, struct.pack("<II", _WIREGUARD_KEY_LOG, len(keys)) + _padded(keys), [])


def _packet(packet: Packet) -> bytes:
    size = len(packet.frame)
    fixed = struct.pack("<IIIII", packet.end, packet.time >> 32, packet.time & 0xFFFF_FFFF, size, size)
    flags = struct.pack("<I", _OUTBOUND if packet.is_outbound else _INBOUND)
    return _block(_PACKET, fixed + _padded(packet.frame), [(_COMMENT, packet.comment.encode()), (_FLAGS, flags)])


def _statistics(number: int, end: End, time: int) -> bytes:
    fixed = struct.pack("<III", number, time >> 32, time & 0xFFFF_FFFF)
    return _block(_STATISTICS, fixed, [(_MISSED, struct.pack("<Q", end.missed))])


def _block(kind: int, body: bytes, options: Sequence[tuple[int, bytes]]) -> bytes:
    # Empty options are left out.
    used = [(code, value) for code, value in options if value]
    body += b"".join(struct.pack("<HH", code, len(value)) + _padded(value) for code, value in used)
    if used:
        body += struct.pack("<HH", _END, 0)
    size = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + size + body + size


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
