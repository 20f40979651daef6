"""Audit events: one line each, whatever their fields hold."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ...project import audit


def _recorded(caplog: pytest.LogCaptureFixture, event: audit.Event, **fields: object) -> logging.LogRecord:
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger=audit.logger.name):
        audit.record(event, **fields)
    (record,) = caplog.records
    return record


def test_an_event_is_json_and_its_fields_are_on_the_record(caplog: pytest.LogCaptureFixture) -> None:
    record = _recorded(caplog, audit.Event.MESSAGE_REFUSED, code="message.unsigned", id=None, size=3)
    assert record.audit == {"event": "message.refused", "code": "message.unsigned", "id": None, "size": 3}
    assert json.loads(record.getMessage()) == record.audit


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (audit.Event.STARTED, logging.INFO),
        (audit.Event.MESSAGE_REFUSED, logging.WARNING),
        (audit.Event.RESULT_REFUSED, logging.WARNING),
        (audit.Event.QUARANTINE_FAILED, logging.ERROR),
    ],
)
def test_an_event_has_the_level_that_it_deserves(
    caplog: pytest.LogCaptureFixture, event: audit.Event, level: int
) -> None:
    assert _recorded(caplog, event).levelno == level


_FIELD = st.none() | st.booleans() | st.integers() | st.text(st.characters()) | st.binary() | st.lists(st.text())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.from_regex(r"[a-df-z]{1,5}", fullmatch=True), _FIELD, max_size=4))
def test_no_field_can_start_a_line_or_hide_one(caplog: pytest.LogCaptureFixture, fields: dict[str, Any]) -> None:
    line = _recorded(caplog, audit.Event.MESSAGE_REFUSED, **fields).getMessage()
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line).keys() == {"event", *fields}


@pytest.mark.parametrize("length", [audit.FIELD_MAX, audit.FIELD_MAX + 1, 10**6])
def test_a_long_field_is_cut(caplog: pytest.LogCaptureFixture, length: int) -> None:
    record = _recorded(caplog, audit.Event.MESSAGE_REFUSED, id="x" * length)
    assert record.audit["id"] == "x" * audit.FIELD_MAX
