"""Check that unused namespaces are freed, wherever their interfaces are (`none`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import DeviceConfig, wait_for
from harness.net.nsid import NsidEvents

if TYPE_CHECKING:
    from harness import Lab, Manifest


@pytest.mark.scenario("N40")
@pytest.mark.requirement("NS-06")
def test_namespaces_with_crossed_interfaces_are_freed(lab: Lab, implementation: Manifest) -> None:
    watcher, ns1, ns2 = lab.node("ns0"), lab.node("ns1"), lab.node("ns2")
    crossed = [
        lab.interface("wg1", implementation, birth=ns1, place=ns2),
        lab.interface("wg2", implementation, birth=ns2, place=ns1),
    ]
    for number, iface in enumerate(crossed, 1):
        iface.set(DeviceConfig(private_key=lab.key(f"key{number}"), listen_port=number))
        iface.up(f"192.168.241.{number}/24")
    # There may be more ports: boringtun keeps its first socket.
    assert (ns1.udp_ports() & {1, 2}, ns2.udp_ports() & {1, 2}) == ({1}, {2})
    with NsidEvents(watcher, ns1, ns2) as events:
        ns1.close()
        ns2.close()
        assert events.look() is None, "the test proved nothing: no interface held the namespaces"
        # Programs, or the sockets to the driver, hold the namespaces; nothing else may.
        for iface in crossed:
            lab.end(iface)
        wait_for(events, 2.0, "both namespaces to vanish")
