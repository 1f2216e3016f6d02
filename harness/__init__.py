"""Export what a test writer imports: `from harness import Tunnel, Drop, twin, wait_for`.

Each name is loaded when it is first used. Everything else is imported from where it lies:
`from harness.wire.frames import segments`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from harness.control.records import ZERO_KEY as ZERO_KEY
    from harness.control.records import AllowedIP as AllowedIP
    from harness.control.records import DeviceConfig as DeviceConfig
    from harness.control.records import DeviceState as DeviceState
    from harness.control.records import Endpoint as Endpoint
    from harness.control.records import Key as Key
    from harness.control.records import PeerConfig as PeerConfig
    from harness.control.records import PeerState as PeerState
    from harness.control.records import allowed_ips as allowed_ips
    from harness.errors import ControlError as ControlError
    from harness.errors import DeadlineExceeded as DeadlineExceeded
    from harness.errors import HarnessError as HarnessError
    from harness.errors import ProgramFailed as ProgramFailed
    from harness.errors import Unavailable as Unavailable
    from harness.errors import Unsupported as Unsupported
    from harness.errors import UsageError as UsageError
    from harness.implementations.interface import Interface as Interface
    from harness.implementations.interface import ProgramInterface as ProgramInterface
    from harness.implementations.manifest import Manifest as Manifest
    from harness.implementations.registry import Registry as Registry
    from harness.lab.devices import Device as Device
    from harness.lab.devices import PolicyRule as PolicyRule
    from harness.lab.devices import Queue as Queue
    from harness.lab.lab import Lab as Lab
    from harness.lab.target import Target as Target
    from harness.lab.timer_slack import slack as slack
    from harness.lab.topology import DIRECT as DIRECT
    from harness.lab.topology import LINK_LOCAL as LINK_LOCAL
    from harness.lab.topology import LOOPBACK as LOOPBACK
    from harness.lab.topology import NAT as NAT
    from harness.lab.topology import WIRED as WIRED
    from harness.lab.topology import End as End
    from harness.lab.topology import Route as Route
    from harness.lab.topology import Topology as Topology
    from harness.lab.trafficset import effort as effort
    from harness.lab.trafficset import must_carry_everything as must_carry_everything
    from harness.lab.trafficset import must_stream_udp as must_stream_udp
    from harness.lab.trafficset import volume as volume
    from harness.lab.tunnel import INNER as INNER
    from harness.lab.tunnel import OUTER as OUTER
    from harness.lab.tunnel import V4_OF_A as V4_OF_A
    from harness.lab.tunnel import V4_OF_B as V4_OF_B
    from harness.lab.tunnel import V6_OF_A as V6_OF_A
    from harness.lab.tunnel import V6_OF_B as V6_OF_B
    from harness.lab.tunnel import Plan as Plan
    from harness.lab.tunnel import Tunnel as Tunnel
    from harness.net.netns import NetNS as NetNS
    from harness.net.veth import Veth as Veth
    from harness.net.veth import add_veth as add_veth
    from harness.net.veth import offloads as offloads
    from harness.net.veth import set_offloads as set_offloads
    from harness.plugin.options import Pair as Pair
    from harness.plugin.verdicts import differs as differs
    from harness.plugin.verdicts import not_reached as not_reached
    from harness.plugin.verdicts import twin as twin
    from harness.sandbox.process import stopped as stopped
    from harness.scripted.inside import NotDelivered as NotDelivered
    from harness.scripted.intents import LOW_ORDER_POINTS as LOW_ORDER_POINTS
    from harness.scripted.intents import CookieReply as CookieReply
    from harness.scripted.intents import Data as Data
    from harness.scripted.intents import Initiation as Initiation
    from harness.scripted.intents import Keepalive as Keepalive
    from harness.scripted.intents import Response as Response
    from harness.scripted.packets import ip_packet as ip_packet
    from harness.scripted.packets import udp_packet as udp_packet
    from harness.scripted.peer import ScriptedPeer as ScriptedPeer
    from harness.scripted.peer import Unexpected as Unexpected
    from harness.scripted.peer import later as later
    from harness.scripted.peer_socket import PeerSocket as PeerSocket
    from harness.scripted.session import Session as Session
    from harness.traffic.icmp_errors import error_for as error_for
    from harness.traffic.ping import Pings as Pings
    from harness.traffic.ping import flood as flood
    from harness.traffic.ping import must_ping as must_ping
    from harness.traffic.ping import ping as ping
    from harness.traffic.tcp import tcp_stream as tcp_stream
    from harness.traffic.tcp import tcp_streams as tcp_streams
    from harness.traffic.udp import Arrivals as Arrivals
    from harness.traffic.udp import UdpStream as UdpStream
    from harness.traffic.udp import udp_message as udp_message
    from harness.traffic.udp import udp_receiver as udp_receiver
    from harness.wait import Datagram as Datagram
    from harness.wait import FileSays as FileSays
    from harness.wait import let_pass as let_pass
    from harness.wait import poll_until as poll_until
    from harness.wait import scaled as scaled
    from harness.wait import wait_for as wait_for
    from harness.wire.capture import Capture as Capture
    from harness.wire.messages import COOKIE_REPLY as COOKIE_REPLY
    from harness.wire.messages import DATA as DATA
    from harness.wire.messages import INITIATION as INITIATION
    from harness.wire.messages import RESPONSE as RESPONSE
    from harness.wire.messages import Message as Message
    from harness.wire.script import Delay as Delay
    from harness.wire.script import Drop as Drop
    from harness.wire.script import Duplicate as Duplicate
    from harness.wire.script import Flip as Flip
    from harness.wire.script import Hold as Hold
    from harness.wire.script import Replay as Replay
    from harness.wire.script import Rule as Rule
    from harness.wire.script import Script as Script
    from harness.wire.wire import Sighting as Sighting
    from harness.wire.wire import Wire as Wire

# Each name and the module that defines it. Nothing in `harness` imports from here.
NAMES: Final = {
    "AllowedIP": "harness.control.records",
    "Arrivals": "harness.traffic.udp",
    "COOKIE_REPLY": "harness.wire.messages",
    "Capture": "harness.wire.capture",
    "ControlError": "harness.errors",
    "CookieReply": "harness.scripted.intents",
    "DATA": "harness.wire.messages",
    "DIRECT": "harness.lab.topology",
    "Data": "harness.scripted.intents",
    "Datagram": "harness.wait",
    "DeadlineExceeded": "harness.errors",
    "Delay": "harness.wire.script",
    "Device": "harness.lab.devices",
    "DeviceConfig": "harness.control.records",
    "DeviceState": "harness.control.records",
    "Drop": "harness.wire.script",
    "Duplicate": "harness.wire.script",
    "End": "harness.lab.topology",
    "Endpoint": "harness.control.records",
    "FileSays": "harness.wait",
    "Flip": "harness.wire.script",
    "HarnessError": "harness.errors",
    "Hold": "harness.wire.script",
    "INITIATION": "harness.wire.messages",
    "INNER": "harness.lab.tunnel",
    "Initiation": "harness.scripted.intents",
    "Interface": "harness.implementations.interface",
    "Keepalive": "harness.scripted.intents",
    "Key": "harness.control.records",
    "LINK_LOCAL": "harness.lab.topology",
    "LOOPBACK": "harness.lab.topology",
    "LOW_ORDER_POINTS": "harness.scripted.intents",
    "Lab": "harness.lab.lab",
    "Manifest": "harness.implementations.manifest",
    "Message": "harness.wire.messages",
    "NAT": "harness.lab.topology",
    "NetNS": "harness.net.netns",
    "NotDelivered": "harness.scripted.inside",
    "OUTER": "harness.lab.tunnel",
    "Pair": "harness.plugin.options",
    "PeerConfig": "harness.control.records",
    "PeerSocket": "harness.scripted.peer_socket",
    "PeerState": "harness.control.records",
    "Pings": "harness.traffic.ping",
    "Plan": "harness.lab.tunnel",
    "PolicyRule": "harness.lab.devices",
    "ProgramFailed": "harness.errors",
    "ProgramInterface": "harness.implementations.interface",
    "Queue": "harness.lab.devices",
    "RESPONSE": "harness.wire.messages",
    "Registry": "harness.implementations.registry",
    "Replay": "harness.wire.script",
    "Response": "harness.scripted.intents",
    "Route": "harness.lab.topology",
    "Rule": "harness.wire.script",
    "Script": "harness.wire.script",
    "ScriptedPeer": "harness.scripted.peer",
    "Session": "harness.scripted.session",
    "Sighting": "harness.wire.wire",
    "Target": "harness.lab.target",
    "Topology": "harness.lab.topology",
    "Tunnel": "harness.lab.tunnel",
    "UdpStream": "harness.traffic.udp",
    "Unavailable": "harness.errors",
    "Unexpected": "harness.scripted.peer",
    "Unsupported": "harness.errors",
    "UsageError": "harness.errors",
    "V4_OF_A": "harness.lab.tunnel",
    "V4_OF_B": "harness.lab.tunnel",
    "V6_OF_A": "harness.lab.tunnel",
    "V6_OF_B": "harness.lab.tunnel",
    "Veth": "harness.net.veth",
    "WIRED": "harness.lab.topology",
    "Wire": "harness.wire.wire",
    "ZERO_KEY": "harness.control.records",
    "add_veth": "harness.net.veth",
    "allowed_ips": "harness.control.records",
    "differs": "harness.plugin.verdicts",
    "effort": "harness.lab.trafficset",
    "error_for": "harness.traffic.icmp_errors",
    "flood": "harness.traffic.ping",
    "ip_packet": "harness.scripted.packets",
    "later": "harness.scripted.peer",
    "let_pass": "harness.wait",
    "must_carry_everything": "harness.lab.trafficset",
    "must_ping": "harness.traffic.ping",
    "must_stream_udp": "harness.lab.trafficset",
    "offloads": "harness.net.veth",
    "ping": "harness.traffic.ping",
    "poll_until": "harness.wait",
    "scaled": "harness.wait",
    "set_offloads": "harness.net.veth",
    "slack": "harness.lab.timer_slack",
    "stopped": "harness.sandbox.process",
    "tcp_stream": "harness.traffic.tcp",
    "tcp_streams": "harness.traffic.tcp",
    "not_reached": "harness.plugin.verdicts",
    "twin": "harness.plugin.verdicts",
    "udp_message": "harness.traffic.udp",
    "udp_packet": "harness.scripted.packets",
    "udp_receiver": "harness.traffic.udp",
    "volume": "harness.lab.trafficset",
    "wait_for": "harness.wait",
}


def __getattr__(name: str) -> Any:
    """Import the module that defines a name of NAMES; PEP 562."""
    if name not in NAMES:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    value = getattr(import_module(NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES])
