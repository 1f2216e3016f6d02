"""What passes on a link: capture it, decode WireGuard's messages in it, change it by a fault script."""
