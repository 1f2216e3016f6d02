"""Measure how long the lab and a shell script take to set up topology `nat`."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import NAT, Lab, Tunnel

if TYPE_CHECKING:
    from harness import Manifest

# Makes the same nodes, links, rules and interfaces as harness.NAT.
_MAKE: Final = r"""
set -e
for n in ns0 ns1 ns2; do ip netns add $n; ip -n $n link set lo up; done
ip -n ns1 link add vethc type veth peer name vethrc netns ns0
ip -n ns0 link add vethrs type veth peer name veths netns ns2
ip -n ns1 addr add 192.168.1.100/24 dev vethc; ip -n ns1 link set vethc up
ip -n ns0 addr add 192.168.1.1/24 dev vethrc; ip -n ns0 link set vethrc up
ip -n ns0 addr add 10.0.0.1/24 dev vethrs; ip -n ns0 link set vethrs up
ip -n ns2 addr add 10.0.0.100/24 dev veths; ip -n ns2 link set veths up
ip -n ns1 route add default via 192.168.1.1
ip netns exec ns0 sysctl -qw net.ipv4.ip_forward=1 net.netfilter.nf_conntrack_udp_timeout=2 \
    net.netfilter.nf_conntrack_udp_timeout_stream=2
ip netns exec ns0 nft -f "$RULES"
for n in 1 2; do
    LOG_LEVEL=error ip netns exec ns$n "$PROGRAM" wg$n >/dev/null 2>&1
    ip -n ns$n addr add 192.168.241.$n/24 dev wg$n
    ip -n ns$n addr add fd00::$n/112 dev wg$n
    ip -n ns$n link set wg$n up
done
wg set wg1 private-key "$KEYS/1" listen-port 1 peer "$(cat "$KEYS/2.pub")" preshared-key "$KEYS/psk" \
    endpoint 10.0.0.100:2 allowed-ips 192.168.241.2/32,fd00::2/128
wg set wg2 private-key "$KEYS/2" listen-port 2 peer "$(cat "$KEYS/1.pub")" preshared-key "$KEYS/psk" \
    allowed-ips 192.168.241.1/32,fd00::1/128
"""
_UNMAKE: Final = r"""
for n in 1 2; do ip -n ns$n link del wg$n; done
for n in ns0 ns1 ns2; do ip netns del $n; done
"""


def by_lab(manifest: Manifest) -> float:
    """Return the seconds that the lab takes until the tunnel is configured and up."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        started = time.perf_counter()
        try:
            Tunnel(lab, NAT, manifest, manifest)
            return time.perf_counter() - started
        finally:
            lab.close()


def by_shell(manifest: Manifest) -> float:
    """Return the seconds that a shell script takes to make the same with `ip`, `nft` and `wg`."""
    with tempfile.TemporaryDirectory() as directory:
        keys = Path(directory)
        lab = Lab(keys)
        for name, key in [("1", lab.key("key1")), ("2", lab.key("key2"))]:
            (keys / name).write_text(f"{key}\n")
            (keys / f"{name}.pub").write_text(f"{key.public()}\n")
        (keys / "psk").write_text(f"{lab.key('psk')}\n")
        (keys / "rules").write_text(NAT.firewall["ns0"])
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PROGRAM": str(manifest.find_program())}
        env |= {"KEYS": directory, "RULES": str(keys / "rules")}
        started = time.perf_counter()
        try:
            subprocess.run(["sh", "-c", _MAKE], check=True, env=env, capture_output=True)
            return time.perf_counter() - started
        finally:
            subprocess.run(["sh", "-c", _UNMAKE], check=False, env=env, capture_output=True)
