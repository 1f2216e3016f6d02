"""Check that malformed requests are refused with the right errno (one interface)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from harness import ControlError, DeviceConfig, PeerConfig, ProgramInterface, Unsupported

if TYPE_CHECKING:
    from harness import Interface, Lab, Manifest


@pytest.fixture
def wg0(lab: Lab, implementation: Manifest) -> Interface:
    return lab.interface("wg0", implementation, lab.node("ns0"))


@pytest.mark.requirement("CFG-10")
@pytest.mark.parametrize("version", [0, 2])
def test_protocol_version_other_than_1_is_refused(lab: Lab, wg0: Interface, version: int) -> None:
    alice = lab.key("alice").public()
    with pytest.raises(ControlError) as refusal:
        wg0.set(DeviceConfig(peers=(PeerConfig(public_key=alice, protocol_version=version),)))
    assert refusal.value.errno == (errno.EPFNOSUPPORT if wg0.manifest.kind == "kernel" else errno.EINVAL)
    wg0.set(DeviceConfig(peers=(PeerConfig(public_key=alice, protocol_version=1),)))
    assert wg0.peer(alice).protocol_version == 1


@pytest.mark.requirement("CFG-46")
def test_uapi_line_without_equals_sign_is_refused_with_eproto(wg0: Interface) -> None:
    if not isinstance(wg0, ProgramInterface):
        raise Unsupported("the kernel is not configured over UAPI")
    with wg0.connect() as connection:
        connection.settimeout(5)
        connection.sendall(b"set=1\nnokey\n\n")
        # wg(8) expects a negative errno, as wireguard-go sends; for a positive one it prints "Unknown error".
        assert connection.recv(100).replace(b"-", b"") == f"errno={errno.EPROTO}\n\n".encode()
    wg0.set(DeviceConfig(listen_port=7))
    assert wg0.get().listen_port == 7
