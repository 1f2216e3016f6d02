"""Move packets between interface, core and sockets."""
