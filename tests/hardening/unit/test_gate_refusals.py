"""The gate: what becomes of a refused message, of its caller, and of everything that comes after it."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from celery.result import AsyncResult
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ...project import claims, codec, envelope, errors
from . import documents
from .desk import (
    FORBIDDEN,
    HEADERS,
    NOW,
    PROBE,
    SECRET,
    TASK,
    Channel,
    Desk,
    changed,
    delivered,
    issued,
    named_as,
)

# --- a genuine signer, through a worker -------------------------------------------------------------------------------


def test_a_retry_keeps_the_name_the_id_and_the_caller(desk: Desk) -> None:
    fields = desk.claims(desk.capture(7, True, headers={"traceparent": "00-1"}))
    desk.service.publish(desk.sign(fields))
    assert desk.service.work() == 2
    first, second = desk.seen
    desk.seen.clear()
    for name in ("id", "task", "origin", "owner", "args", "root_id", "headers", "timelimit"):
        assert second[name] == first[name], name
    assert (first["retries"], second["retries"]) == (0, 1)


def test_a_retry_cannot_be_made_to_send_another_task_with_the_workers_rights(desk: Desk) -> None:
    """A header of the caller's own is sent again by a retry, where ``task`` would name what the worker signs."""
    for headers in ({"task": FORBIDDEN}, {"id": "victim"}, {"retries": 0}):
        fields = changed(desk.claims(desk.capture(7, True)), "task.headers", headers)
        assert desk.refusal(desk.sign(fields))["code"] == "message.shape"


def _signature(task: str, **options: Any) -> dict[str, Any]:
    return {"task": task, "args": [], "kwargs": {}, "options": options, "subtask_type": None, "immutable": False}


@pytest.mark.parametrize(
    "changes",
    [
        *({"embed": {place: [_signature(FORBIDDEN)]}} for place in ("callbacks", "errbacks", "chain")),
        {"embed": {"chord": _signature(FORBIDDEN)}},
        {"embed": {"callbacks": [_signature(PROBE, link=[_signature(FORBIDDEN)])]}},
        {"embed": {"errbacks": [_signature(PROBE, chain=[_signature(FORBIDDEN)])]}},
    ],
    ids=lambda changes: json.dumps(changes["embed"])[:30],
)
def test_a_message_cannot_name_a_task_that_its_signer_may_not_send(desk: Desk, changes: dict[str, Any]) -> None:
    """Stock Celery has the worker sign and send it, with the worker's rights (F9)."""
    assert desk.refusal(desk.sign(desk.claims() | changes))["code"] == "policy.denied"


def test_a_callbacks_own_headers_cannot_rename_it_on_its_way(desk: Desk) -> None:
    """What a worker sends for a message has its origin, and is judged again for it."""
    renamed = _signature(PROBE, headers={"task": FORBIDDEN})
    desk.service.publish(desk.sign(desk.claims() | {"embed": {"callbacks": [renamed]}}))
    assert desk.service.work() == 1
    assert [record["code"] for record in desk.service.quarantined()] == ["policy.denied"]
    assert [request["task"] for request in desk.seen] == [PROBE]
    desk.seen.clear()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "leaf"),
    [
        ("exp", NOW - 600, errors.Expired),
        ("task.name", "nope", errors.UnknownTask),
        ("task.name", FORBIDDEN, errors.NotAllowed),
        ("queue", "x", errors.WrongQueue),
        ("iat", NOW + 600, errors.FromTheFuture),
    ],
)
def test_a_genuine_signers_get_ends_with_the_refusal(
    desk: Desk, path: str, value: object, leaf: type[Exception]
) -> None:
    fields = changed(desk.claims(), path, value)
    desk.refusal(desk.sign(fields))
    with pytest.raises(leaf) as caught:
        AsyncResult(fields["task"]["id"], app=desk.service.client.app).get(timeout=1)
    assert type(caught.value) is leaf


def test_a_caller_who_wants_no_result_gets_none_for_a_refusal(desk: Desk) -> None:
    fields = changed(desk.claims(desk.capture(ignore_result=True)), "task.name", "nope")
    desk.refusal(desk.sign(fields))
    assert AsyncResult(fields["task"]["id"], app=desk.service.client.app).state == "PENDING"


def test_a_refusal_for_another_application_stores_no_result(desk: Desk) -> None:
    fields = desk.claims() | {"aud": "spiffe://x/y/z"}
    desk.refusal(desk.sign(fields))
    assert AsyncResult(fields["task"]["id"], app=desk.service.client.app).state == "PENDING"


def test_a_signer_cannot_fail_anothers_task_by_being_refused(desk: Desk) -> None:
    victim = desk.service.client.app.send_task(PROBE, (1,), ignore_result=False)
    (genuine,) = desk.service.deliveries()
    beat = named_as(desk, "beat")
    fields = desk.claims(genuine) | {"iss": beat, "owner": beat}
    fields["task"] |= {"name": FORBIDDEN}
    for origin in (beat, str(desk.service.client.identity)):
        desk.refusal(issued(desk, beat).sign(TASK, codec.encode(fields | {"origin": origin})))
        assert victim.state == "PENDING"
    genuine.ack()
    desk.run(genuine.body)
    assert victim.get(timeout=1) == 1


@pytest.mark.parametrize("owner", ["x", "spiffe://", "client"])
def test_a_worker_cannot_name_an_owner_who_is_no_identity(desk: Desk, owner: str) -> None:
    """Whatever is stored for such a message raises, long after the gate."""
    worker = desk.service.worker
    body = desk.sign({**desk.claims(), "iss": str(worker.identity), "owner": owner}, worker)
    assert desk.refusal(body)["code"] == "signer.identity"


def test_a_defect_of_the_gate_refuses_the_message_and_goes_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    body = desk.capture().body

    def defect(*_: Any) -> None:
        raise RuntimeError(SECRET)

    with monkeypatch.context() as patch:
        patch.setattr(claims.TaskClaims, "parse", defect)
        record = desk.refusal(body)
    assert (record["code"], record["detail"]) == ("gate.failed", "RuntimeError")
    desk.run(body)


# --- what a log shows -------------------------------------------------------------------------------------------------


def _events(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [record.getMessage() for record in caplog.records if record.name == "secure_celery.audit"]
    assert all("\n" not in line and "\r" not in line and line.isascii() for line in lines)
    return [json.loads(line) for line in lines]


def test_a_refusal_is_one_event_that_names_the_signer_and_shows_nothing_of_the_body(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    fields = changed(desk.claims(), "task.name", FORBIDDEN) | {"args": [SECRET], "kwargs": {SECRET: SECRET}}
    fields["task"] |= {"shadow": SECRET, "headers": {SECRET: SECRET}}
    with caplog.at_level(logging.DEBUG):
        desk.refusal(desk.sign(fields), headers={"x": SECRET}, reply_to=SECRET)
    assert SECRET not in caplog.text
    (event,) = _events(caplog)
    assert event["event"] == "message.refused"
    assert event["code"] == "policy.denied"
    assert event["signer"] == str(desk.service.client.identity)
    assert (event["task"], event["id"]) == (FORBIDDEN, fields["task"]["id"])


def test_an_unsigned_refusal_names_nobody(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        desk.refusal(b"x", headers={"task": SECRET, "id": SECRET})
    assert SECRET not in caplog.text
    (event,) = _events(caplog)
    assert (event["signer"], event["task"], event["id"]) == (None, None, None)


@pytest.mark.parametrize("injected", ["\n{}", "\r\n", "\x1b[2J", "\u2028", "\x85"])
@pytest.mark.parametrize(
    "path", ["task.name", "task.id", "iss", "queue", "task.shadow", "embed.x", "x", "task.headers"]
)
def test_a_signer_cannot_start_a_new_log_line(
    desk: Desk, caplog: pytest.LogCaptureFixture, path: str, injected: str
) -> None:
    value: Any = {f"a{injected}": 1} if path == "task.headers" else f"a{injected}b"
    fields = changed(desk.claims(), path + (injected if path.endswith("x") else ""), value)
    with caplog.at_level(logging.DEBUG):
        desk.refusal(desk.sign(fields))
    assert len(_events(caplog)) == 1
    assert injected not in caplog.text


def test_a_genuine_run_shows_no_argument(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    fields = changed(desk.claims(), "task.name", documents.checksum.name) | {"args": [SECRET]}
    with caplog.at_level(logging.DEBUG):
        desk.service.publish(desk.sign(fields))
        assert desk.service.work() == 1
    assert SECRET not in caplog.text


# --- anything at all --------------------------------------------------------------------------------------------------

_KEY = st.text(max_size=9) | st.binary(max_size=3)
_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.binary(max_size=20)
    | st.datetimes(),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=9) | st.binary(max_size=3), values, max_size=3)
    ),
    max_leaves=8,
)
_NAMES = st.sampled_from([*HEADERS, "compression", "a"]) | st.text(max_size=5) | st.binary(max_size=5)
_BODY = (
    st.none()
    | st.binary(max_size=200)
    | st.text(max_size=200)
    | st.binary(max_size=50).map(memoryview)
    | st.binary(max_size=50).map(bytearray)
    | st.just(b"e30.e30.e30")
)
_ANY = st.one_of(st.none(), st.integers(), st.text(st.characters(), max_size=20), st.just(envelope.CONTENT_TYPE))
_FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@_FUZZ
@given(
    body=_BODY,
    headers=st.dictionaries(_NAMES, _VALUE, max_size=5),
    properties=st.fixed_dictionaries(
        {}, optional={"content_type": _ANY, "content_encoding": _ANY, "priority": _VALUE, "reply_to": _VALUE}
    ),
    delivery_info=st.dictionaries(st.sampled_from(["exchange", "routing_key", "redelivered"]), _VALUE, max_size=3),
)
def test_no_message_without_a_key_is_admitted_raises_or_is_lost(
    desk: Desk, body: Any, headers: Any, properties: Any, delivery_info: Any
) -> None:
    channel = Channel()
    message = delivered(body, channel, delivery_info, application_headers=headers, **properties)
    assert desk.service.gate.receive(message) is None
    assert channel.fate == ["acknowledged"]
    (record,) = desk.service.quarantined()
    assert record["code"] in {"message.unsigned", "message.malformed", "message.compressed"}


@_FUZZ
@given(
    path=st.sampled_from(
        [
            *("iss", "aud", "iat", "exp", "jti", "origin", "owner", "queue", "args", "kwargs", "embed", "task", "x"),
            *(f"task.{name}" for name in claims.Task.model_fields),
            *(f"embed.{name}" for name in claims.Embed.model_fields),
        ]
    ),
    value=_VALUE.filter(lambda value: _has_json(value)),
)
def test_no_claim_that_a_genuine_signer_may_make_raises(desk: Desk, path: str, value: Any) -> None:
    genuine = {**_GENUINE.setdefault(id(desk.service), desk.claims()), "jti": claims.new_id()}
    channel = Channel()
    message = delivered(
        desk.sign(changed(genuine, path, value)), channel, {"redelivered": False}, content_type=envelope.CONTENT_TYPE
    )
    admitted = desk.service.gate.receive(message)
    if admitted is None:
        assert channel.fate == ["acknowledged"]
        (record,) = desk.service.quarantined()
        assert record["code"] != "gate.failed"
    else:
        assert channel.fate == []


_GENUINE: dict[int, dict[str, Any]] = {}


def _has_json(value: Any) -> bool:
    try:
        codec.encode(value)
    except Exception:
        return False
    return True


def test_the_genuine_message_after_all_that_still_runs(desk: Desk) -> None:
    assert desk.run(desk.capture(7).body)["args"] == [7]
