"""Audit events: one structured log record per security decision.

Guards against: decisions that leave no trace, and log lines that an attacker can shape.
Rests on: fields being identifiers, codes and numbers. Bodies, arguments and results are never passed in; every string
is cut and JSON-escaped, so a newline in a task id stays one line.
Controls: LOG-1, AUT-5.
"""

from __future__ import annotations

import json
import logging
from enum import StrEnum

logger = logging.getLogger("secure_celery.audit")

#: Longest string kept in a field, in characters.
FIELD_MAX = 256


class Event(StrEnum):
    """Stable names of the events; they are what alerts match on."""

    STARTED = "hardening.started"
    WEAKENED = "hardening.weakened"
    MESSAGE_REFUSED = "message.refused"
    QUARANTINE_FAILED = "quarantine.failed"
    CALLER_NOT_TOLD = "caller.not-told"
    ERRBACK_FAILED = "errback.failed"
    RESULT_REFUSED = "result.refused"


_LEVEL = {Event.STARTED: logging.INFO, Event.QUARANTINE_FAILED: logging.ERROR}


def record(event: Event, **fields: object) -> None:
    """Log ``event`` with ``fields`` as one line of JSON; the fields are also on the record as ``audit``."""
    entry: dict[str, object] = {"event": event.value}
    for name, value in fields.items():
        entry[name] = value if isinstance(value, int | float | bool | None) else str(value)[:FIELD_MAX]
    logger.log(_LEVEL.get(event, logging.WARNING), json.dumps(entry), extra={"audit": entry})
