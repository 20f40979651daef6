"""Two small tasks that show the habits: annotated arguments, bounded retries, a result only where somebody reads it."""

from __future__ import annotations

import hashlib
import logging
from datetime import datetime
from typing import Literal
from uuid import UUID

from celery import shared_task

logger = logging.getLogger(__name__)


@shared_task(ignore_result=False, time_limit=30, soft_time_limit=20)
def checksum(document: str, algorithm: Literal["sha256", "sha512"] = "sha256") -> str:
    """Return the document's checksum. Someone waits for it, so the result is kept (signed, and for a while)."""
    return hashlib.new(algorithm, document.encode()).hexdigest()


@shared_task(max_retries=3, time_limit=30, soft_time_limit=20)
def record_receipt(document_id: UUID, received_at: datetime) -> None:
    """Note that a document arrived. Nobody waits for it, so nothing is stored."""
    logger.info("document %s received at %s", document_id, received_at.isoformat())
