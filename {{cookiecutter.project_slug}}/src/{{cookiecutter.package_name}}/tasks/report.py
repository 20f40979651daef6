"""Report what was uploaded on a day. Beat sends it each night (see ``app.py``); nobody waits, so no result is stored.

Safe to run twice: each day's report is written once, and as a whole.
"""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta

from celery import Task, shared_task

from ..hardening.files import replace_file


@shared_task(
    bind=True,
    autoretry_for=(OSError,),  # a disk that is full or away
    max_retries=3,
    retry_backoff=60,  # seconds
    time_limit=120,
    soft_time_limit=100,
)
def report(self: Task, day: date | None = None) -> None:
    """Write ``report-YYYY-MM-DD.json``; the day is yesterday, in UTC, if none is given."""
    settings = self.app.hardening.settings
    day = day or datetime.now(UTC).date() - timedelta(days=1)
    target = settings.output_folder / f"report-{day}.json"
    if target.exists():
        return
    objects = [path.lstat() for path in settings.upload_folder.iterdir() if path.is_file() and not path.is_symlink()]
    sizes = [found.st_size for found in objects if datetime.fromtimestamp(found.st_mtime, UTC).date() == day]
    content = {"day": str(day), "uploads": len(sizes), "bytes": sum(sizes)}
    replace_file(target, json.dumps(content).encode())
