from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refwg import ip
from refwg.errors import MalformedMessage
from refwg.messages import padded_length, parse
from selftests.support.strategies import messages

if TYPE_CHECKING:
    from refwg.messages import Message


@pytest.mark.requirement("MSG-01", "MSG-02", "MSG-04")
@given(messages)
def test_message_is_equal_after_encoding_and_parsing(message: Message) -> None:
    assert parse(message.to_bytes()) == message


@pytest.mark.requirement("MSG-15", "ROB-01")
@given(st.one_of(st.binary(max_size=200), messages.map(lambda message: message.to_bytes()[:-1])))
def test_parsed_datagram_is_encoded_to_same_bytes(datagram: bytes) -> None:
    try:
        message = parse(datagram)
    except MalformedMessage:
        return
    assert message.to_bytes() == datagram


@pytest.mark.requirement("MTU-03", "MTU-05")
@given(st.integers(0, 70_000), st.integers(0, 10_000))
def test_padding_is_short_and_keeps_last_unit_within_mtu(length: int, mtu: int) -> None:
    padding = padded_length(length, mtu) - length
    assert 0 <= padding < 16
    assert not mtu or (length % mtu or (mtu if length == mtu else 0)) + padding <= mtu


@pytest.mark.requirement("ROB-02")
@given(st.binary(max_size=80), st.integers(0, 3))
def test_packet_functions_accept_any_bytes_with_ip_version(data: bytes, mark: int) -> None:
    if not ip.version(data):
        return
    assert len(ip.source(data)) == len(ip.destination(data)) in {4, 16}
    assert len(ip.decapsulate_ecn(data, mark)) == len(data)
    ip.udp_ports(data)
    ip.unreachable(data)
