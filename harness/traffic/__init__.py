"""What a test sends and receives: pings, UDP datagrams and streams, TCP streams, ICMP errors."""
