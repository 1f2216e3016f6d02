"""Check an interface whose name is a pattern: the kernel chooses the number."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from harness import DeviceConfig, HarnessError, Unsupported, twin

if TYPE_CHECKING:
    from harness import Interface, Lab, Manifest, NetNS

PATTERN = "wg%d"


@pytest.mark.bug("IB-78")
def test_name_pattern_gets_first_free_number(lab: Lab, implementation: Manifest) -> None:
    if implementation.kind == "kernel":
        raise Unsupported("the driver has no command that takes a name")
    node = lab.node("ns0")
    with twin("the program starts with a name that is no pattern"):
        lab.interface("wg1", implementation, node)
    patterned = replace(
        implementation, command=tuple(word.replace("{interface}", PATTERN) for word in implementation.command)
    )
    for name in ("wg0", "wg2"):
        made = start(lab, patterned, node, name)
        made.set(DeviceConfig(private_key=lab.key(name)))
        assert made.wg("show", "interfaces").stdout.split() == [name], f"wg(8) does not list {name}"
        assert made.get().private_key in {lab.key(name), None}
    assert {"wg0", "wg1", "wg2"} <= set(node.links()), f"the links are {sorted(node.links())}"


def start(lab: Lab, patterned: Manifest, node: NetNS, name: str) -> Interface:
    """Start the program with the pattern; its control socket must have the name that the kernel gives."""
    try:
        return lab.interface(name, patterned, node)
    except HarnessError as error:
        pytest.fail(
            f"started as {PATTERN}, {patterned.name} did not serve {name}.sock: {error}; links {sorted(node.links())}"
        )
