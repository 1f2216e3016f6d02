"""Fetch and build the programs under test into the cache, with the standard library only."""
