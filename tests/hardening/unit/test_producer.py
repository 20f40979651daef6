"""What the producer hands to the broker beside the envelope, and when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Signature, chain, group
from celery.exceptions import QueueNotFound
from celery.signals import after_task_publish, before_task_publish
from kombu.exceptions import EncodeError

from ...project import errors, producer
from ...service import Service
from . import documents

PREFIX = documents.checksum.name.rpartition(".documents.")[0]


def test_no_broker_is_told_to_drop_what_expires(service: Service) -> None:
    """It would tell nobody. A worker stores for the caller that the task is revoked."""
    service.client.app.tasks[documents.checksum.name].apply_async(("x",), expires=60)
    (message,) = service.deliveries()
    assert "expiration" not in message.properties
    assert service.gate.admit(message).headers["expires"]


NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("countdown", "eta", "sent"),
    [
        (0.1, None, (1, None)),
        (0.999, None, (1, None)),
        (1, None, (1, None)),
        (1.5, None, (1.5, None)),
        (60, None, (60, None)),
        (None, NOW + timedelta(seconds=0.1), (1, None)),
        (None, (NOW + timedelta(seconds=1.1)).isoformat(), (1.1, None)),
        (None, NOW + timedelta(seconds=60), (None, NOW + timedelta(seconds=60))),
        (None, NOW - timedelta(seconds=1), (None, NOW - timedelta(seconds=1))),
        (-1, None, (-1, None)),
        (0, None, (0, None)),
        (None, None, (None, None)),
    ],
)
def test_rabbitmq_is_not_asked_for_a_delay_of_less_than_a_second(countdown: Any, eta: Any, sent: Any) -> None:
    seen = []

    def send_task(name: str, args: Any, kwargs: Any, countdown: Any, eta: Any, **options: Any) -> None:
        seen.append((name, args, countdown, eta, options))

    app: Any = SimpleNamespace(now=lambda: NOW, send_task=send_task)
    producer.delayed_by_seconds(app)("task", (1,), countdown=countdown, eta=eta, queue="slow")
    assert seen == [("task", (1,), *sent, {"queue": "slow"})]


def test_a_receiver_of_a_signal_cannot_change_what_is_signed_afterwards(service: Service) -> None:
    """Signals run before the signature is made: what they set is signed, and what they fail to do is not skipped."""
    seen: list[Any] = []

    def before(headers: dict[str, Any], **_: Any) -> None:
        headers["traceparent"] = "00-1"
        raise RuntimeError("signals fail open")

    def after(body: Any, **_: Any) -> None:
        seen.append(body)

    before_task_publish.connect(before)
    after_task_publish.connect(after)
    try:
        service.send(documents.checksum, "x")
    finally:
        before_task_publish.disconnect(before)
        after_task_publish.disconnect(after)
    (message,) = service.deliveries()
    admitted = service.gate.admit(message)
    message.ack()
    assert admitted.headers["headers"] == {"traceparent": "00-1"}


@pytest.mark.parametrize("option", [{"serializer": "pickle"}, {"serializer": "yaml"}, {"compression": "gzip"}])
def test_no_option_of_a_call_changes_the_format(service: Service, option: dict[str, str]) -> None:
    service.client.app.send_task(documents.checksum.name, ("x",), **option)
    (message,) = service.deliveries()
    assert message.content_type == "application/jose"
    assert service.gate.receive(message) is not None
    message.ack()


def test_a_queue_that_the_topology_has_not_is_refused_at_the_call(service: Service) -> None:
    send, rules = service.client.app.send_task, service.rules
    with pytest.raises(QueueNotFound):
        send(documents.checksum.name, ("x",), queue="made-up")
    for key in ("made-up", rules.quarantine, rules.dead, f"x.{rules.queues[0].broker_name}"):
        with pytest.raises(errors.ConfigurationRefused) as caught:
            send(documents.checksum.name, ("x",), exchange=rules.exchange, routing_key=key)
        assert caught.value.code == "queue.unknown"
    assert list(service.deliveries()) == service.quarantined() == []


def test_a_message_that_is_too_large_is_refused_at_the_call(service: Service) -> None:
    with pytest.raises(errors.TooLarge):
        service.send(documents.checksum, "x" * service.client.app.hardening.settings.message_max_bytes)
    assert list(service.deliveries()) == []


@pytest.mark.parametrize(
    ("options", "leaf"),
    [
        ({"headers": {"trace": {"nested": 1}}}, errors.BadShape),
        ({"headers": {"trace": [1]}}, errors.BadShape),
        ({"task_id": "a\nb"}, errors.BadShape),
        ({"shadow": "x" * 256}, errors.BadShape),
        ({"priority": 256}, errors.BadShape),
        ({"time_limit": -1}, errors.BadShape),
        ({"countdown": 10**8}, errors.DelayTooLong),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.__name__,
)
def test_what_a_gate_would_not_take_is_refused_at_the_call(
    service: Service, options: dict[str, Any], leaf: type[Exception]
) -> None:
    """Its caller would wait for a result for ever: a message without a sound shape has nobody to answer to."""
    with pytest.raises(leaf):
        service.client.app.send_task(documents.checksum.name, ("x",), **options)
    assert list(service.deliveries()) == []


def test_an_argument_without_a_json_form_is_refused_at_the_call(service: Service) -> None:
    with pytest.raises(EncodeError):
        service.send(documents.checksum, object())
    assert list(service.deliveries()) == []


def test_the_arguments_are_in_the_envelope_alone(service: Service) -> None:
    service.send(documents.checksum, "swordfish")
    (message,) = service.deliveries()
    message.ack()
    assert "swordfish" not in str(message.headers) + str(message.properties)
    assert set(message.headers) == {"task", "id"}
    for unsigned in ("reply_to", "correlation_id"):
        assert not message.properties.get(unsigned)


def test_a_group_a_chain_and_a_callback_run_through_the_gate(service: Service) -> None:
    name = f"{PREFIX}.number"

    @service.worker.app.task(name=name, shared=False, ignore_result=False)
    def number(value: int) -> int:
        return value

    app = service.client.app

    def sent(*args: Any) -> Signature:
        return app.signature(name, args=args, ignore_result=False)

    each = group([sent(1), sent(2)], app=app).apply_async()
    assert service.work() == 2
    assert each.join(timeout=1) == [1, 2]
    last = chain(sent(5), sent(), app=app).apply_async(link=sent())
    assert service.work() == 3
    assert last.get(timeout=1) == 5
    assert service.quarantined() == []
