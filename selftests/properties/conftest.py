"""Lift hypothesis's limit of 200 ms for each example: a busy machine takes longer."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
