"""This service's tasks: one module each, imported here."""

from . import documents

__all__ = ["documents"]
