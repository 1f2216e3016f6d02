"""Guests: boot a kernel in QEMU, run a command in it, bring back status and files."""
