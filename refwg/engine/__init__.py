"""Move packets between interface, core and sockets; all engines give the same results."""
