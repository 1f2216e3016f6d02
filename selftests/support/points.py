"""List the points of Curve25519 that no handshake may use."""

from __future__ import annotations

from typing import Final

# All encodings of points of small order, from https://cr.yp.to/ecdh.html#validate: 0, 1, the two of order
# 8, p-1, p and p+1. With any private key the shared secret is zero.
LOW_ORDER_POINTS: Final = tuple(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)
