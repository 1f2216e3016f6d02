"""Send and receive a test's traffic: pings, UDP datagrams, TCP streams, ICMP errors."""
