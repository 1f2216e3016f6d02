"""Build a tunnel to measure in: two namespaces, and a veth pair between them.

The veth pair has the kernel's default offloads, and nothing captures or delays its packets.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import V4_OF_B, End, Lab, Topology, Tunnel, add_veth
from selftests.support.floods import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Manifest, NetNS

DEVICE: Final = "veth0"
ADDRESS_OF_A, ADDRESS_OF_B = "10.0.0.1", "10.0.0.2"
VETH: Final = Topology(
    name="bench",
    drawing="""\
   ns1 (A)             ns2 (B)
  +----------+        +----------+
  | wg0      |        |      wg0 |
  | veth0    |--------|    veth0 |
  | 10.0.0.1 |        | 10.0.0.2 |
  +----------+        +----------+
""",
    nodes=("ns1", "ns2"),
    links=((End("ns1", DEVICE, (f"{ADDRESS_OF_A}/24",)), End("ns2", DEVICE, (f"{ADDRESS_OF_B}/24",))),),
    endpoint_of_a=f"{ADDRESS_OF_A}:1",
    endpoint_of_b=f"{ADDRESS_OF_B}:2",
)


@contextmanager
def laboratory() -> Iterator[Lab]:
    """Make a lab in a temporary directory; when the block ends, all that was made in it is undone."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        lab = Lab(Path(directory))
        try:
            yield lab
        finally:
            lab.close()


def connected(lab: Lab) -> dict[str, NetNS]:
    """Build both nodes and the veth pair. Topology.build would capture the packets, which costs time."""
    nodes = {name: lab.node(name) for name in VETH.nodes}
    for a, b in VETH.links:
        add_veth(nodes[a.node], a.device, nodes[b.node], b.device)
        for end in (a, b):
            nodes[end.node].add_address(end.device, *end.addresses)
    return nodes


@contextmanager
def tunnel(manifest: Manifest) -> Iterator[Tunnel]:
    """Make a tunnel whose ends both run this implementation, and wait until it carries packets."""
    program = quiet(manifest)
    with laboratory() as lab:
        pair = Tunnel(lab, VETH, program, program, nodes=connected(lab))
        pair.must_ping("ns1", V4_OF_B)
        yield pair
