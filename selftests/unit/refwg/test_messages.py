from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from refwg import messages
from refwg.errors import MalformedMessage
from refwg.messages import (
    CookieReply,
    Data,
    Initiation,
    Response,
    has_macs,
    padded_length,
    parse,
    parse_with_macs,
)

if TYPE_CHECKING:
    from refwg.messages import Message

SAMPLES: list[Message] = [
    Initiation(sender_index=1, ephemeral=b"e" * 32, encrypted_static=b"s" * 48, encrypted_timestamp=b"t" * 28),
    Response(sender_index=2, receiver_index=0xFFFFFFFF, ephemeral=b"e" * 32, encrypted_nothing=b"n" * 16),
    CookieReply(receiver_index=0, nonce=b"n" * 24, encrypted_cookie=b"c" * 32),
    Data(receiver_index=3, counter=2**64 - 1, ciphertext=b"d" * 16),
]


@pytest.mark.requirement("MSG-01", "MSG-02", "MSG-03")
@pytest.mark.parametrize(("sample", "kind", "length"), list(zip(SAMPLES, [1, 2, 3, 4], [148, 92, 64, 32], strict=True)))
def test_messages_have_their_exact_length_and_type(sample: Message, kind: int, length: int) -> None:
    assert len(sample.to_bytes()) == length
    assert sample.to_bytes()[:4] == bytes([kind, 0, 0, 0])


@pytest.mark.requirement("MSG-04", "MSG-11")
@pytest.mark.parametrize("sample", SAMPLES)
def test_parse_is_inverse_of_to_bytes(sample: Message) -> None:
    assert parse(sample.to_bytes()) == sample


@pytest.mark.requirement("MSG-05")
def test_integers_are_little_endian() -> None:
    assert SAMPLES[1].to_bytes()[4:12].hex() == "02000000ffffffff"
    assert Data(receiver_index=1, counter=2, ciphertext=bytes(16)).to_bytes()[4:16].hex() == "010000000200000000000000"


@pytest.mark.requirement("MSG-06")
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_reserved_bytes_must_be_zero(sample: Message, offset: int) -> None:
    datagram = bytearray(sample.to_bytes())
    datagram[offset] = 1
    with pytest.raises(MalformedMessage):
        parse(bytes(datagram))
    with pytest.raises(MalformedMessage):
        type(sample).parse(bytes(datagram))


@pytest.mark.requirement("MSG-07", "MSG-08")
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("change", [-1, 1])
def test_message_of_wrong_length_is_malformed(sample: Message, change: int) -> None:
    datagram = sample.to_bytes()
    datagram = (datagram + b"\0")[: len(datagram) + change]
    if isinstance(sample, Data) and change > 0:
        assert isinstance(parse(datagram), Data)
    else:
        with pytest.raises(MalformedMessage):
            parse(datagram)


@pytest.mark.requirement("MSG-09")
@pytest.mark.parametrize("kind", [0, *range(5, 256)])
def test_unknown_message_types_are_malformed(kind: int) -> None:
    for length in (32, 64, 92, 148):
        with pytest.raises(MalformedMessage):
            parse(bytes([kind]).ljust(length, b"\0"))


@pytest.mark.requirement("MSG-10")
@pytest.mark.parametrize("datagram", [b"", b"\1", b"\1\0", b"\4\0\0"])
def test_tiny_datagrams_are_malformed(datagram: bytes) -> None:
    with pytest.raises(MalformedMessage):
        parse(datagram)


@pytest.mark.requirement("MTU-03", "MTU-05", "MTU-06")
@pytest.mark.parametrize(
    ("length", "mtu", "padded"),
    [
        (0, 1420, 0),
        (1, 1420, 16),
        (16, 1420, 16),
        (29, 1420, 32),
        (1403, 1420, 1408),
        (1409, 1420, 1420),
        (1420, 1420, 1420),
        (1297, 1299, 1299),
        (1421, 1420, 1420 + 16),
        (2840, 1420, 2840),
        (1436, 1420, 1436),
        (1421, 0, 1424),
        (5, 7, 7),
    ],
)
def test_padding_goes_to_sixteen_bytes_but_not_beyond_mtu(length: int, mtu: int, padded: int) -> None:
    assert padded_length(length, mtu) == padded


@pytest.mark.requirement("DT-09", "TM-09", "CR-12")
def test_limits_equal_those_of_kernel_driver() -> None:
    assert messages.REJECT_AFTER_MESSAGES == 2**64 - 8130
    assert messages.LAST_MINUTE_REKEY == 165 * messages.SECOND
    assert messages.TIMESTAMP_WHITENING == 2**24
    assert messages.MAX_TIMER_HANDSHAKES == 18
    assert messages.COUNTER_WINDOW_SIZE == 8128


@pytest.mark.parametrize(("kind", "length"), [(1, 148), (2, 92)])
def test_messages_with_macs_are_recognized_by_type_and_length(kind: int, length: int) -> None:
    datagram = bytes([kind, 0, 0, 0]) + bytes(length - 4)
    assert has_macs(datagram)
    assert parse_with_macs(datagram) == parse(datagram)
    for other in (datagram[:-1], datagram + b"\0", b"", b"\1", bytes([kind, 0, 1, 0]) + datagram[4:]):
        assert not has_macs(other)
    assert not has_macs(bytes([3 - kind, 0, 0, 0]) + datagram[4:])
