"""This service's settings. The hardening layer's come first; add your own as fields.

A field ``report_folder: Path`` is read from ``SECURE_CELERY_REPORT_FOLDER``. Secrets are paths of files, never values.
"""

from __future__ import annotations

from . import hardening


class Settings(hardening.Settings):
    """Read from the environment; an insecure value ends the start with one sentence."""
