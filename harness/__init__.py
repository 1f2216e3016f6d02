"""WireGuard integration tests: network namespaces, implementations, evidence, verdicts."""
