"""The quarantine: every refused message is there, whole, signed and once, before it is acknowledged."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ...project import codec, envelope, errors, quarantine
from ...service import Service
from .desk import Channel, delivered


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    return Service(tmp_path_factory.mktemp("quarantine"))


def _record(service: Service, message: Any) -> dict[str, Any]:
    assert service.gate.receive(message) is None
    (record,) = service.quarantined()
    return record


def test_a_record_holds_all_that_the_broker_delivered(service: Service) -> None:
    channel, body = Channel(), b"\x00\xffbody"
    record = _record(
        service,
        delivered(
            body,
            channel,
            {"exchange": "e", "routing_key": "r", "redelivered": True},
            content_type="application/x",
            content_encoding="binary",
            application_headers={"task": "t", "n": [1, {"a": None}]},
        ),
    )
    assert base64.b64decode(record["body"]) == body
    assert record["sha256"] == hashlib.sha256(body).hexdigest()
    assert record["size"] == len(body)
    assert record["headers"] == "{'task': 't', 'n': [1, {'a': None}]}"
    assert record["delivery"] == {"exchange": "e", "routing_key": "r", "redelivered": "True"}
    assert (record["content_type"], record["content_encoding"]) == ("application/x", "binary")
    assert (record["code"], record["detail"]) == ("message.unsigned", "")
    assert record["iss"] == str(service.worker.identity)
    assert channel.fate == ["acknowledged"]


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("text \u00e9", "text \u00e9".encode()),
        ("\ud800\udcff", b"\xed\xa0\x80\xed\xb3\xbf"),
        (None, b"None"),
        (memoryview(b"view"), b"view"),
        (bytearray(b"array"), b"array"),
        ([1, 2], b"[1, 2]"),
        (7, b"7"),
        ({"a": object}, b"{'a': <class 'object'>}"),
        (b"", b""),
    ],
    ids=repr,
)
def test_a_body_of_any_kind_is_kept(service: Service, body: object, kept: bytes) -> None:
    channel = Channel()
    record = _record(service, delivered(body, channel))
    assert base64.b64decode(record["body"]) == kept
    assert channel.fate == ["acknowledged"]


def test_headers_and_properties_of_any_kind_are_kept_as_text(service: Service) -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    for headers in ({b"\xff": b"\xff"}, {"\n": "\x1b[2J"}, {1: 2}, {"x": "\ud800"}, {"x": "y" * 100_000}):
        record = _record(service, delivered(b"x", application_headers=headers, content_type="\n" * 1000))
        assert record["headers"].isascii()
        assert "\n" not in record["headers"]
        assert len(record["headers"]) <= 4096
        assert len(record["content_type"]) <= 255
    assert _record(service, delivered(b"x", application_headers={"x": nested}))["headers"] == "(nested too deep)"
    assert base64.b64decode(_record(service, delivered(nested))["body"]) == b"(nested too deep)"


@pytest.mark.parametrize("times", [1, 2, 3, 8])
def test_a_record_of_a_large_message_can_be_read_again(service: Service, times: int) -> None:
    limit = service.worker.app.hardening.settings.message_max_bytes
    body = bytes(range(256)) * (limit // 256) * times
    record = _record(service, delivered(body, content_type="text/plain"))
    assert base64.b64decode(record["body"]) == body[:limit]
    assert record["size"] == len(body)
    assert record["sha256"] == hashlib.sha256(body).hexdigest()


def test_the_largest_genuine_message_is_kept_whole(tmp_path: Path) -> None:
    """Otherwise it could never be released."""
    service = Service(tmp_path, message_max_bytes=3 * 1024 * 1024)
    body = service.client.signer.sign(envelope.Type.TASK, b"x" * (3 * 1024 * 1024 * 3 // 4 - 2000))
    record = _record(service, delivered(body, content_type=envelope.CONTENT_TYPE))
    assert base64.b64decode(record["body"]) == body


def test_a_record_is_signed_by_the_worker_and_is_nothing_else(service: Service) -> None:
    service.gate.receive(delivered(b"x"))
    (message,) = service.deliveries(service.rules.quarantine)
    message.ack()
    verifier = service.client.app.hardening.verifier
    verified = verifier.verify(envelope.Type.QUARANTINE, message.body)
    assert verified.signer.identity == service.worker.identity
    assert codec.decode(verified.payload)["code"] == "message.unsigned"
    for other in (envelope.Type.TASK, envelope.Type.RESULT):
        with pytest.raises(errors.WrongType):
            verifier.verify(other, message.body)


def test_a_quarantined_message_put_back_as_a_task_is_refused_again(service: Service) -> None:
    service.gate.receive(delivered(b"x"))
    (message,) = service.deliveries(service.rules.quarantine)
    message.ack()
    assert _record(service, delivered(message.body, content_type=envelope.CONTENT_TYPE))["code"] == "message.type"


def test_the_original_is_acknowledged_only_after_its_record_was_stored(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = Channel()
    publish, fates = quarantine.Quarantine._publish, []

    def noted(self: quarantine.Quarantine, record: dict[str, Any]) -> None:
        fates.append(list(channel.fate))
        publish(self, record)
        fates.append(list(channel.fate))

    monkeypatch.setattr(quarantine.Quarantine, "_publish", noted)
    _record(service, delivered(b"x", channel))
    assert fates == [[], []]
    assert channel.fate == ["acknowledged"]


@pytest.mark.parametrize("stored", [True, False])
def test_a_message_that_celery_has_acknowledged_already_is_not_acknowledged_twice(
    service: Service, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    channel = Channel()
    message = delivered(b"x", channel)
    message.ack()
    if not stored:
        monkeypatch.setattr(quarantine.Quarantine, "_publish", _broken)
    service.gate._quarantine.store(message, errors.NotHandled())
    assert channel.fate == ["acknowledged"]
    assert len(service.quarantined()) == stored


def _broken(*_: Any, **__: Any) -> None:
    raise ConnectionResetError("swordfish")


def test_what_cannot_be_stored_is_rejected_to_the_dead_letters_and_never_requeued(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    channel = Channel()
    monkeypatch.setattr(quarantine.Quarantine, "_publish", _broken)
    with caplog.at_level(logging.DEBUG):
        assert service.gate.receive(delivered(b"x", channel)) is None
    assert channel.fate == ["rejected"]
    events = [json.loads(record.getMessage()) for record in caplog.records if record.name == "secure_celery.audit"]
    assert [event["event"] for event in events] == ["message.refused", "quarantine.failed"]
    assert events[1] == {"event": "quarantine.failed", "code": "message.unsigned", "error": "ConnectionResetError"}
    assert "swordfish" not in caplog.text


def test_a_backend_that_is_away_does_not_stop_the_quarantine(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service.client.app.send_task("nope", ignore_result=False)
    (message,) = service.deliveries()
    monkeypatch.setattr(type(service.worker.app.backend), "store_refusal", _broken)
    with caplog.at_level(logging.DEBUG):
        record = _record(service, message)
    assert record["code"] == "task.unknown"
    assert "caller.not-told" in caplog.text
    assert "swordfish" not in caplog.text
