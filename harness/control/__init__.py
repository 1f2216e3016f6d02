"""Configure WireGuard by one set of records: `uapi` for programs, `genl` for the kernel."""
