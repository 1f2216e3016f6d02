"""Read and write the virtio header in front of each packet of a TUN interface.

The kernel puts it there if the interface has IFF_VNET_HDR. The layout is `struct virtio_net_hdr` of
linux/virtio_net.h, in the byte order of the host. A packet with a segment size is a superframe: packets of one flow
that the kernel handles as one, and that are cut at the very end, or by us.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

_LAYOUT: Final = Struct("=BBHHHH")
HEADER_LENGTH: Final = _LAYOUT.size
# The longest superframe with its header.
LARGEST_FRAME: Final = HEADER_LENGTH + 65535 + 40
# The header of a packet that needs nothing done.
PLAIN_HEADER: Final = bytes(HEADER_LENGTH)
# The checksum field holds the sum of the pseudo header only.
NEEDS_CHECKSUM: Final = 1
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
# A flag beside the type: the first segment carries CWR (RFC 3168), the others must not.
GSO_ECN: Final = 0x80


class VirtioHeader(NamedTuple):
    """What the kernel says of a packet, or we of one for the kernel.

    flags: NEEDS_CHECKSUM or 0. gso_type: GSO_NONE for a packet, else the kind of superframe, perhaps with GSO_ECN.
    header_length: bytes of IP and TCP or UDP headers; the kernel's value is a hint and is not used. gso_size: bytes of
    payload in each segment but the last. checksum_start: where the TCP or UDP header begins in the packet.
    checksum_offset: where its checksum field is, from there.
    """

    flags: int
    gso_type: int
    header_length: int
    gso_size: int
    checksum_start: int
    checksum_offset: int

    def to_bytes(self) -> bytes:
        """Return the ten bytes that stand in front of the packet."""
        return _LAYOUT.pack(*self)


def parse(frame: bytes | bytearray | memoryview) -> VirtioHeader:
    """Read the header at the start of a frame of at least ten bytes."""
    return VirtioHeader._make(_LAYOUT.unpack_from(frame))
