"""Both ways to configure WireGuard, one set of records: `uapi` for programs, `genl` for the kernel."""
