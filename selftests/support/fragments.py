"""Cut a frame into IP fragments as a sender does, by code that is not the wire's."""

from __future__ import annotations

import struct
from itertools import pairwise

from refwg.ip import internet_checksum

ETHERNET, IPV4_HEADER, IPV6_HEADER, FRAGMENT_HEADER = 14, 20, 40, 44


def fragments(frame: bytes, *cuts: int, identification: int = 7) -> list[bytes]:
    """Cut the data of an IPv4 or IPv6 packet without options at these offsets, each a multiple of 8."""
    size = len(frame) - ETHERNET - (IPV4_HEADER if frame[ETHERNET] >> 4 == 4 else IPV6_HEADER)
    bounds = [0, *sorted({*cuts}), size]
    return [piece(frame, start, stop, identification) for start, stop in pairwise(bounds)]


def piece(frame: bytes, start: int, stop: int, identification: int = 7, *, more: bool | None = None) -> bytes:
    """Return the fragment with the data from start to stop; more: its flag, None for the right one."""
    packet = frame[ETHERNET:]
    if packet[0] >> 4 == 4:
        data = packet[IPV4_HEADER:]
        flag = (stop < len(data)) if more is None else more
        place = struct.pack(">HHH", IPV4_HEADER + stop - start, identification, flag << 13 | start // 8)
        header = packet[:2] + place + packet[8:10] + bytes(2) + packet[12:IPV4_HEADER]
        summed = header[:10] + internet_checksum(header).to_bytes(2) + header[12:]
        return frame[:ETHERNET] + summed + data[start:stop]
    data = packet[IPV6_HEADER:]
    flag = (stop < len(data)) if more is None else more
    header = packet[:4] + struct.pack(">HB", 8 + stop - start, FRAGMENT_HEADER) + packet[7:IPV6_HEADER]
    place = struct.pack(">BBHI", packet[6], 0, start | flag, identification)
    return frame[:ETHERNET] + header + place + data[start:stop]
