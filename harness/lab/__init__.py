"""What one test builds: nodes, topologies, a configured tunnel, and the traffic that it must carry."""
