"""The Celery application: settings, then hardening, then tasks."""

from __future__ import annotations

from celery import Celery
from celery.schedules import crontab

from .hardening import ConfigurationRefused, harden
from .settings import Settings

app = Celery(__package__, include=[f"{__package__}.tasks"])
app.conf.beat_schedule = {
    "nightly report": {
        "task": f"{__package__}.tasks.report.report",
        "schedule": crontab(hour="2", minute="30"),  # UTC
        "options": {"expires": 12 * 3600},  # seconds: a worker that was away does not make up for old nights at noon
    },
}
try:
    settings = Settings()
    app.conf.worker_send_task_events = settings.events
    harden(app, settings)
except ConfigurationRefused as refusal:
    raise SystemExit(f"Refused to start. {refusal}") from None
