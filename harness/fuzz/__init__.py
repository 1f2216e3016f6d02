"""Fuzz a device by cases of hostile steps, and judge what it does.

Beside `scripted`, the one folder of harness that imports refwg: `in_process` runs refwg's device without sockets.
docs/fuzzing.md explains it.
"""
