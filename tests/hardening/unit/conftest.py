"""Properties are tried without a time limit each, since machines differ, and leave no file behind."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("hardening", deadline=None, database=None)
settings.load_profile("hardening")
