"""Ways to move packets between the interface, the core and the sockets; all of them with the same results."""
