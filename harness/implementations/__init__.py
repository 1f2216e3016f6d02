"""Find, start and watch the programs under test: manifests, interfaces, health checks."""
