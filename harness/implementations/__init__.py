"""Programs under test: manifests, the registry, interfaces under test, health checks, key logs."""
