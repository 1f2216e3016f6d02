"""Build what one test uses: nodes, topologies, a configured tunnel, traffic for it."""
