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
    DROPPED = "quarantine.dropped"
    RELEASED = "quarantine.released"
    CALLER_NOT_TOLD = "caller.not-told"
    ERRBACK_FAILED = "errback.failed"
    RESULT_REFUSED = "result.refused"
    CREDENTIALS_LOADED = "credentials.loaded"
    CREDENTIALS_REFUSED = "credentials.refused"
    CREDENTIALS_EXPIRING = "credentials.expiring"
    POLICY_LOADED = "policy.loaded"
    POLICY_REFUSED = "policy.refused"
    REPLAY_STORE_AWAY = "replay.store-away"
    REPLAY_STORE_BACK = "replay.store-back"
    CONTROLLED = "control.accepted"
    CONTROL_REFUSED = "control.refused"
    REPLY_REFUSED = "reply.refused"
    EVENT_REFUSED = "event.refused"
    LOGIN_REFUSED = "login.refused"


_LEVEL = dict.fromkeys((Event.STARTED, Event.CREDENTIALS_LOADED, Event.POLICY_LOADED, Event.CONTROLLED), logging.INFO)
_LEVEL[Event.QUARANTINE_FAILED] = logging.ERROR


def record(event: Event, **fields: object) -> None:
    """Log ``event`` with ``fields`` as one line of JSON; the fields are also on the record as ``audit``."""
    entry: dict[str, object] = {"event": event.value}
    for name, value in fields.items():
        entry[name] = value if isinstance(value, int | float | bool | None) else str(value)[:FIELD_MAX]
    logger.log(_LEVEL.get(event, logging.WARNING), json.dumps(entry), extra={"audit": entry})
