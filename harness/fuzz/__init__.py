"""Fuzz a device: cases of hostile steps, a peer that plays them, and what a correct device may do.

Beside `scripted`, the one folder of harness that imports refwg: `in_process` runs refwg's device without sockets.
docs/fuzzing.md explains it.
"""
