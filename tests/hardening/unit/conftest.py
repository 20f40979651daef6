"""Properties are tried without a time limit each, since machines differ, and leave no file behind."""

from __future__ import annotations

from hypothesis import settings

from .desk import desk, one_desk

__all__ = ["desk", "one_desk"]

settings.register_profile("hardening", deadline=None, database=None)
settings.load_profile("hardening")
