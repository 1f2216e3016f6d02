"""Boot a kernel in QEMU, run a command in this guest, bring back status and files."""
