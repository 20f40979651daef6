"""Properties are tried without a time limit each, since machines differ, and leave no file behind."""

from __future__ import annotations

from hypothesis import settings

from .desk import desk, one_desk
from .room import one_room, room
from .store import one_store, store

__all__ = ["desk", "one_desk", "one_room", "one_store", "room", "store"]

settings.register_profile("hardening", deadline=None, database=None)
settings.load_profile("hardening")
