"""Namespaces of a run's own: the launcher, threads in namespaces, and programs started there."""
