"""Check that sockets of a kernel interface stay in its birth namespace (one interface)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from harness import ControlError, DeviceConfig, HarnessError, Unsupported, poll_until, twin
from harness.control.genl import GenlControl
from harness.implementations.interface import genetlink

if TYPE_CHECKING:
    from harness import Interface, Lab, Manifest, NetNS

PORT = 7
DEADLINE = 5.0
# The creator of a user namespace has all capabilities in it and in its network namespaces (user_namespaces(7)).
STRANGERS = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo here; exec tail -f /dev/null"]


@pytest.fixture(autouse=True)
def _drivers_only(implementation: Manifest) -> None:
    if implementation.kind != "kernel":
        raise Unsupported(f"{implementation.name} is a program, and its sockets are in the namespace of its process")


@pytest.fixture
def birth(lab: Lab) -> NetNS:
    return lab.node("birth")


@pytest.fixture
def place(lab: Lab) -> NetNS:
    return lab.node("place")


@pytest.fixture
def wg0(lab: Lab, implementation: Manifest, birth: NetNS, place: NetNS) -> Interface:
    return lab.interface("wg0", implementation, birth, place)


@pytest.mark.requirement("NS-08")
def test_interface_is_configured_only_in_its_current_namespace(wg0: Interface) -> None:
    refused = wg0.birth.run(["wg", "show", "wg0"], check=False)
    assert (refused.status, refused.stderr) == (1, "Unable to access interface: No such device\n")
    with twin("the interface is shown in its current namespace"):
        assert wg0.place.run(["wg", "show", "wg0", "listen-port"]).stdout == "0\n"


@pytest.mark.requirement("NS-02")
@pytest.mark.parametrize("sockets", ["birth", "third"], ids=["here", "in-third"])
def test_sockets_are_in_link_netns_or_namespace_of_request(lab: Lab, birth: NetNS, place: NetNS, sockets: str) -> None:
    lab.node("third")
    # ip(8) resolves the namespace id in its own namespace, the kernel in that of the new interface.
    for node in (birth, place):
        node.run(["ip", "netns", "set", "third", "7"])
    link = ["link-netns", "third"] * (sockets == "third")
    birth.run(["ip", "link", "add", "wg1", *link, "netns", "place", "type", "wireguard"])
    control = genetlink(place)
    lab.undo(control.close)
    GenlControl(control).interface("wg1").set(DeviceConfig(listen_port=PORT))
    place.set_link("wg1", up=True)
    listening = {name for name, node in lab.nodes.items() if PORT in node.udp_ports()}
    assert listening == {sockets}
    assert "wg1" not in birth.links()


@pytest.mark.requirement("NS-04")
def test_interface_outlives_birth_namespace_without_carrier(wg0: Interface) -> None:
    wg0.set(DeviceConfig(listen_port=PORT))
    wg0.up()
    assert PORT in wg0.birth.udp_ports()
    assert "NO-CARRIER" not in flags(wg0)
    wg0.birth.close()
    # The kernel destroys a namespace asynchronously.
    assert "NO-CARRIER" in poll_until(lambda: flags(wg0), lambda names: "NO-CARRIER" in names, DEADLINE)
    for change in (DeviceConfig(listen_port=PORT + 1), DeviceConfig(fwmark=PORT)):
        with pytest.raises(ControlError) as refusal:
            wg0.set(change)
        assert refusal.value.errno == errno.EPERM
    wg0.place.set_link("wg0", up=False)
    with pytest.raises(HarnessError, match="Machine is not on the network"):
        wg0.place.set_link("wg0", up=True)
    assert wg0.get().listen_port == PORT


def flags(wg0: Interface) -> list[str]:
    (shown,) = wg0.place.run_json(["ip", "-j", "link", "show", "wg0"])
    names: list[str] = shown["flags"]
    return names


@pytest.mark.requirement("NS-05")
def test_port_and_fwmark_need_cap_net_admin_in_birth_namespace(lab: Lab, wg0: Interface) -> None:
    strangers = wg0.place.spawn(STRANGERS, log=lab.directory / "strangers.log")
    lab.undo(strangers.close)
    lab.undo(strangers.kill)
    strangers.says("^here$")
    wg0.place.run(["ip", "link", "set", "wg0", "netns", str(strangers.pid)])
    as_strangers = ["nsenter", "-t", str(strangers.pid), "--user", "--net"]
    with twin("strangers change a setting that does not concern the birth namespace"):
        key = str(lab.key("own"))
        wg0.place.run([*as_strangers, "wg", "set", "wg0", "private-key", "/dev/stdin"], stdin=key)
        shown = wg0.place.run([*as_strangers, "wg", "show", "wg0", "private-key"]).stdout
        assert shown == f"{key}\n"
    for setting in ("listen-port", "fwmark"):
        refused = wg0.place.run([*as_strangers, "wg", "set", "wg0", setting, "7"], check=False)
        assert (refused.status, refused.stderr) == (1, "Unable to modify interface: Operation not permitted\n")
