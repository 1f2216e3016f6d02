"""Play WireGuard peers whose every message, field and step the test chooses.

The one folder of harness that imports refwg: its modules without I/O for messages, handshake, cookies and primitives.
docs/scripted-peer.md teaches it.
"""
