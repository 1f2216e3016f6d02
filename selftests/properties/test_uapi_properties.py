from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refwg.device import Device
from refwg.uapi import Conversation
from selftests.support.pair import FakeSockets, SeededEnvironment
from selftests.support.strategies import endpoints, keys, prefixes

peers = st.dictionaries(
    keys,
    st.fixed_dictionaries(
        {
            "preshared_key": keys.map(bytes.hex),
            "endpoint": endpoints,
            "persistent_keepalive_interval": st.integers(0, 65535).map(str),
        }
    ),
    max_size=4,
)
allowed_ips = st.lists(prefixes, max_size=5)


def conversation() -> Conversation:
    sockets = FakeSockets()
    return Conversation(Device(SeededEnvironment(1, lambda: 0), sockets, now=0), sockets)


@pytest.mark.requirement("CFG-43", "CFG-44", "CFG-51")
@given(st.integers(1, 65535), st.integers(1, 2**32 - 1), peers, allowed_ips)
def test_settings_survive_get_and_set_on_second_device(
    port: int, fwmark: int, peers: dict[bytes, dict[str, str]], prefixes: list[object]
) -> None:
    lines = [f"listen_port={port}", f"fwmark={fwmark}"]
    for key, settings in peers.items():
        lines += [f"public_key={key.hex()}", *(f"{name}={value}" for name, value in settings.items())]
        lines += [f"allowed_ip={prefix}" for prefix in prefixes]
    first, second = conversation(), conversation()
    assert first.feed("\n".join(["set=1", *lines, "", ""]).encode(), 0).reply == b"errno=0\n\n"
    state = first.feed(b"get=1\n\n", 0).reply
    assert all(line in state.decode().splitlines() for line in lines if not line.startswith("allowed_ip"))
    settable = [line for line in state.decode().splitlines()[:-2] if not line.startswith(("last_", "tx_", "rx_"))]
    assert second.feed("\n".join(["set=1", *settable, "", ""]).encode(), 0).reply == b"errno=0\n\n"
    assert second.feed(b"get=1\n\n", 0).reply == state


@pytest.mark.requirement("CFG-45", "CFG-53")
@given(
    st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([b"set=1\n", b"get=1\n", b"\n", b"=", b"public_key="])))
)
def test_conversation_survives_arbitrary_bytes(pieces: list[bytes]) -> None:
    talk = conversation()
    for piece in pieces:
        answer = talk.feed(piece, 0)
        assert not answer.reply or b"errno=" in answer.reply
        if answer.is_over:
            break


@pytest.mark.requirement("CFG-52", "CFG-45")
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "private_key",
                    "listen_port",
                    "fwmark",
                    "replace_peers",
                    "public_key",
                    "remove",
                    "update_only",
                    "preshared_key",
                    "endpoint",
                    "persistent_keepalive_interval",
                    "allowed_ip",
                    "replace_allowed_ips",
                ]
            ),
            st.one_of(st.text(max_size=70), keys.map(bytes.hex), st.sampled_from(["true", "0", "1.2.3.4:5", "::/0"])),
        )
    )
)
def test_every_set_is_answered_by_one_errno(settings: list[tuple[str, str]]) -> None:
    lines = [f"{key}={value}".replace("\n", "") for key, value in settings]
    answer = conversation().feed("\n".join(["set=1", *lines, "", ""]).encode(), 0)
    assert answer.reply in {b"errno=0\n\n", b"errno=-22\n\n", b"errno=-98\n\n"}
