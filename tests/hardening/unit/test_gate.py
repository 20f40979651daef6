"""The gate: nothing that was not signed reaches Celery, or has an effect on what was."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from ...project import envelope
from .desk import (
    FORBIDDEN,
    HEADERS,
    PROBE,
    PROTOCOL_2,
    Desk,
    delivered,
)


def test_a_genuine_message_runs(desk: Desk) -> None:
    message = desk.capture(7)
    request = desk.run(message.body)
    assert request["args"] == [7]
    assert request["task"] == PROBE
    assert request["id"] == message.headers["id"]
    assert request["origin"] == str(desk.service.client.identity)


# --- unsigned ---------------------------------------------------------------------------------------------------------

PROTOCOL_1 = {"task": PROBE, "id": "1", "args": [], "kwargs": {}}


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        pytest.param(json.dumps(PROTOCOL_2).encode(), "application/json", id="JSON"),
        pytest.param(json.dumps(PROTOCOL_1).encode(), "application/json", id="protocol 1"),
        pytest.param(pickle.dumps(PROTOCOL_2), "application/x-python-serialize", id="pickle"),
        pytest.param(pickle.dumps(PROTOCOL_2), "application/data", id="stock auth"),
        pytest.param(b"[[], {}, {}]", "application/x-yaml", id="YAML"),
        pytest.param(b"\x93\x90\x80\x80", "application/x-msgpack", id="msgpack"),
        pytest.param(b"", "application/text", id="empty text"),
        pytest.param(b"x", "text/plain", id="text"),
        pytest.param(json.dumps(PROTOCOL_2).encode(), "application/jose", id="JSON as an envelope"),
        pytest.param(pickle.dumps(PROTOCOL_2), "application/jose", id="pickle as an envelope"),
        pytest.param(b"", "application/jose", id="empty envelope"),
        pytest.param(b"[[], {}, {}]", "application/data", id="raw"),
        pytest.param(b"[[], {}, {}]", "x" * 250, id="unknown type"),
    ],
)
def test_an_unsigned_message_is_refused_whatever_it_says_it_is(desk: Desk, body: bytes, content_type: str) -> None:
    headers = {"task": PROBE, "id": "1", "lang": "py"}
    record = desk.refusal(body, content_type=content_type, headers=headers)
    assert record["code"] == "message.unsigned"
    assert record["content_type"] == content_type


def test_a_genuine_envelope_under_another_content_type_is_refused(desk: Desk) -> None:
    body = desk.capture().body
    assert desk.refusal(body, content_type="application/json")["code"] == "message.unsigned"


def test_an_unsigned_message_cannot_fail_the_task_whose_id_it_has(desk: Desk) -> None:
    """Stock Celery marks the id of an unknown task as failed, whoever sent it (F8)."""
    victim = desk.service.client.app.send_task(PROBE, (1,), ignore_result=False)
    (genuine,) = desk.service.deliveries()
    desk.refusal(b"[[], {}, {}]", content_type="application/json", headers={"task": "nope", "id": victim.id})
    assert victim.state == "PENDING"
    genuine.ack()
    desk.run(genuine.body)
    assert victim.get(timeout=1) == 1


# --- what was not signed has no effect --------------------------------------------------------------------------------

PROPERTIES: dict[str, Any] = {
    "reply_to": "victim",
    "correlation_id": "victim",
    "priority": 9,
    "delivery_mode": 1,
    "message_id": "victim",
    "type": FORBIDDEN,
    "app_id": "victim",
    "user_id": "victim",
    "timestamp": 1,
    "content_encoding": "punycode",
}
#: What a request knows of its delivery and its worker; everything else comes from the message.
_OF_THE_WORKER = {"delivery_info"}


def _request(desk: Desk, message: Any) -> dict[str, Any]:
    assert desk.service.receive(message)
    request = desk.seen.pop()
    return {name: value for name, value in request.items() if name not in _OF_THE_WORKER}


@pytest.mark.parametrize("name", HEADERS)
def test_an_unsigned_header_has_no_effect(desk: Desk, name: str) -> None:
    genuine = desk.capture(7)
    expected = _request(desk, delivered(genuine.body, content_type=envelope.CONTENT_TYPE))
    headers = {"task": PROBE, "id": genuine.headers["id"], name: HEADERS[name]}
    forged = delivered(desk.fresh(genuine), content_type=envelope.CONTENT_TYPE, application_headers=headers)
    assert _request(desk, forged) == expected


@pytest.mark.parametrize("name", PROPERTIES)
def test_an_unsigned_property_has_no_effect(desk: Desk, name: str) -> None:
    genuine = desk.capture(7)
    expected = _request(desk, delivered(genuine.body, content_type=envelope.CONTENT_TYPE))
    forged = delivered(desk.fresh(genuine), content_type=envelope.CONTENT_TYPE, **{name: PROPERTIES[name]})
    assert _request(desk, forged) == expected


@pytest.mark.parametrize("headers", [None, {}, {"task": None}, {"task": {}}, {"id": []}, {1: 2}, {b"\xff": b"\xff"}])
def test_a_genuine_body_needs_no_headers_at_all(desk: Desk, headers: Any) -> None:
    message = delivered(desk.capture(7).body, content_type=envelope.CONTENT_TYPE, application_headers=headers)
    assert _request(desk, message)["args"] == [7]


def test_of_the_delivery_only_the_brokers_redelivered_flag_is_believed(desk: Desk) -> None:
    body = desk.capture().body
    forged = {"exchange": "x", "routing_key": "victim", "priority": 9, "is_eager": True, "redelivered": "yes"}
    desk.service.receive(delivered(body, delivery_info=forged, content_type=envelope.CONTENT_TYPE))
    rules = desk.service.rules
    assert desk.seen.pop()["delivery_info"] == {
        "exchange": rules.exchange,
        "routing_key": rules.queues[0].broker_name,
        "priority": None,
        "redelivered": True,
    }


def test_celery_is_given_nothing_that_it_would_decode(desk: Desk) -> None:
    admitted = desk.service.gate.admit(delivered(desk.capture(7).body, content_type=envelope.CONTENT_TYPE))
    assert admitted.content_type is None
    assert admitted.content_encoding is None
    args, kwargs, embed = admitted.payload
    assert (args, kwargs) == ([7], {})
    assert embed.keys() == {"callbacks", "errbacks", "chain", "chord"}


@pytest.mark.parametrize("key", ["id", "delivery_info", "group", "task", "origin", "owner", "utc", "x"])
def test_a_signed_fifth_key_of_the_embedded_canvas_is_refused(desk: Desk, key: str) -> None:
    """Celery's tracer would spread it over the request (F21)."""
    fields = desk.claims()
    fields["embed"][key] = "victim"
    assert desk.refusal(desk.sign(fields))["code"] == "message.shape"
