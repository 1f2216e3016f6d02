"""Implement WireGuard as a userspace program that is easy to read."""
