"""Two small tasks for the tests of the hardening layer, under names that the project's topology lets callers send."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Literal
from uuid import UUID

from celery import shared_task

from ...project import tasks

PREFIX = f"{tasks.__name__}.documents"


@shared_task(name=f"{PREFIX}.checksum", ignore_result=False, time_limit=30, soft_time_limit=20)
def checksum(document: str, algorithm: Literal["sha256", "sha512"] = "sha256") -> str:
    return hashlib.new(algorithm, document.encode()).hexdigest()


@shared_task(name=f"{PREFIX}.record_receipt", max_retries=3, time_limit=30, soft_time_limit=20)
def record_receipt(document_id: UUID, received_at: datetime) -> None: ...
