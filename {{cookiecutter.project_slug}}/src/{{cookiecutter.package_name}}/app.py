"""The Celery application: settings, then hardening, then tasks."""

from __future__ import annotations

from celery import Celery

from .hardening import ConfigurationRefused, harden
from .settings import Settings

app = Celery(__package__, include=[f"{__package__}.tasks"])
try:
    harden(app, Settings())
except ConfigurationRefused as refusal:
    raise SystemExit(f"Refused to start. {refusal}") from None
