"""Capture what passes on a link, decode it, and change it by a fault script."""
