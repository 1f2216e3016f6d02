"""Check that both codecs of the configuration read what they write, for any configuration."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.control import genl, uapi
from harness.control.records import (
    KEY_SIZE,
    ZERO_KEY,
    AllowedIP,
    DeviceConfig,
    DeviceState,
    Endpoint,
    Key,
    PeerConfig,
    PeerState,
)
from harness.net import netlink

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy


def number(bits: int) -> SearchStrategy[int | None]:
    return st.none() | st.integers(0, (1 << bits) - 1)


def addresses(width: int) -> SearchStrategy[str]:
    family = socket.AF_INET if width == 4 else socket.AF_INET6
    return st.binary(min_size=width, max_size=width).map(lambda raw: socket.inet_ntop(family, raw))


KEYS = st.binary(min_size=KEY_SIZE, max_size=KEY_SIZE).map(Key)
PORTS = st.integers(0, 65535)
ENDPOINTS = st.builds(Endpoint, addresses(4), PORTS) | st.builds(
    Endpoint, addresses(16), PORTS, st.integers(0, (1 << 32) - 1)
)
PREFIXES = st.builds(AllowedIP, st.binary(min_size=4, max_size=4), st.integers(0, 32), st.booleans()) | st.builds(
    AllowedIP, st.binary(min_size=16, max_size=16), st.integers(0, 128), st.booleans()
)
PEERS = st.builds(
    PeerConfig,
    public_key=KEYS,
    preshared_key=st.none() | KEYS,
    endpoint=st.none() | ENDPOINTS,
    persistent_keepalive=number(16),
    allowed_ips=st.lists(PREFIXES, max_size=5).map(tuple),
    protocol_version=number(32),
)
CONFIGS = st.builds(
    DeviceConfig,
    private_key=st.none() | KEYS,
    listen_port=number(16),
    fwmark=number(32),
    peers=st.lists(PEERS, max_size=4, unique_by=lambda peer: peer.public_key).map(tuple),
)


def over_netlink(config: DeviceConfig) -> DeviceState:
    """Decode our requests as a dump, which has the same attributes."""
    requests = [message for data in genl.encode_set("wg0", config, 30) for message in netlink.parse_messages(data)]
    return genl.decode_dump([*requests, netlink.Message(netlink.NLMSG_DONE, 0, 0, bytes(4))])


def over_text(config: DeviceConfig) -> DeviceState:
    """Decode our request as an answer, which has the same lines."""
    lines = uapi.encode_set(config).decode().split()
    return uapi.decode_get([*lines[1:], "errno=0"])


def read_back(config: DeviceConfig) -> DeviceState:
    """The state that a device without other settings reports after this configuration."""
    return DeviceState(
        private_key=config.private_key if config.private_key != ZERO_KEY else None,
        listen_port=config.listen_port or 0,
        fwmark=config.fwmark or 0,
        peers=tuple(
            PeerState(
                public_key=peer.public_key,
                preshared_key=peer.preshared_key if peer.preshared_key != ZERO_KEY else None,
                endpoint=peer.endpoint,
                persistent_keepalive=peer.persistent_keepalive or 0,
                allowed_ips=peer.allowed_ips,
                protocol_version=1 if peer.protocol_version is None else peer.protocol_version,
            )
            for peer in config.peers
        ),
    )


CODECS = pytest.mark.parametrize("codec", [over_netlink, over_text])


@CODECS
@settings(deadline=None)
@given(config=CONFIGS)
def test_encoded_configuration_is_decoded_unchanged(
    codec: Callable[[DeviceConfig], DeviceState], config: DeviceConfig
) -> None:
    assert codec(config) == read_back(config)


@CODECS
def test_130560_allowed_ips_of_one_peer_read_back_in_order(codec: Callable[[DeviceConfig], DeviceState]) -> None:
    pairs = [bytes(pair) for pair in ((a, b) for a in range(1, 256) for b in range(256))]
    prefixes = [AllowedIP(pair + bytes(2), 16) for pair in pairs]
    prefixes += [AllowedIP(b"\xfd" + bytes(13) + pair, 128) for pair in pairs]
    config = DeviceConfig(peers=(PeerConfig(public_key=Key(bytes(range(32))), allowed_ips=tuple(prefixes)),))
    assert len(prefixes) == 130560
    assert codec(config) == read_back(config)


@CODECS
def test_40_peers_of_52_allowed_ips_each_read_back_in_order(codec: Callable[[DeviceConfig], DeviceState]) -> None:
    prefixes = tuple(AllowedIP(bytes((10, 0, host, 0)), 24) for host in range(52))
    peers = tuple(PeerConfig(public_key=Key(bytes([number] * 32)), allowed_ips=prefixes) for number in range(1, 41))
    assert codec(DeviceConfig(peers=peers)) == read_back(DeviceConfig(peers=peers))
