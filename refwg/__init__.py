"""A readable userspace WireGuard."""
