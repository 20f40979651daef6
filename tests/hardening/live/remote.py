"""Remote control and events by hand: what the tests of both share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from kombu import Exchange

from ...project import codec, control, envelope
from .running import SOON, Running

SECRET = "swordfish"


@pytest.fixture(autouse=True)
def the_worker_lives(running: Running) -> Iterator[None]:
    """Whatever a test sends, the pool `worker` stays the same process and serves."""
    running.alive()
    process = running.worker.pid
    yield
    assert running.task("add").delay(1, 2).get(timeout=SOON) == 3
    assert running.worker.alive()
    assert running.worker.pid == process


def nodes(app: Celery, timeout: float = 3, **options: Any) -> set[str]:
    """Return who answers, until nobody has for ``timeout`` seconds."""
    return set(app.control.inspect(timeout=timeout, **options).ping() or ())


def publish(app: Celery, exchange: Exchange, key: str, body: bytes | str, **properties: Any) -> None:
    """Publish anything, as whoever has the account's rights."""
    with app.connection_for_write() as connection, connection.Producer() as producer:
        options = {"content_type": envelope.CONTENT_TYPE, "content_encoding": "utf-8", **properties}
        producer.publish(body, exchange=exchange.name, routing_key=key, declare=[exchange], **options)


def commands(app: Celery) -> Exchange:
    exchange: Exchange = app.control.mailbox.exchange
    return exchange


def command(app: Celery, method: str, **arguments: Any) -> dict[str, Any]:
    """Return the claims of a command, as this signer makes them."""
    identity = app.hardening.signer.identity
    now = int(time.time())
    return {
        **{"iss": str(identity), "aud": identity.audience, "iat": now, "exp": now + control.Claims.lifetime},
        **{"jti": uuid4().hex, "method": method, "arguments": arguments},
        **{"destination": None, "pattern": None, "matcher": None, "ticket": None},
    }


def signed(app: Celery, fields: dict[str, Any], kind: envelope.Type = envelope.Type.CONTROL) -> bytes:
    token: bytes = app.hardening.signer.sign(kind, codec.encode(fields))
    return token


def events(app: Celery) -> Exchange:
    exchange: Exchange = app.hardening.broker.broadcast("events", "topic")
    return exchange


def listen(
    app: Celery, until: Callable[[list[dict[str, Any]]], Any], act: Callable[[], Any] = lambda: None
) -> tuple[Any, list[dict[str, Any]]]:
    """Capture events as Flower does until the condition holds; ``act`` once the queue is there."""
    state, seen = app.events.State(), []

    def handle(event: dict[str, Any]) -> None:
        seen.append(event)
        state.event(event)

    deadline = time.monotonic() + SOON
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": handle})
        with receiver.consumer_context(wakeup=False) as (connected, _, _):
            act()
            while not until(seen) and time.monotonic() < deadline:
                try:
                    connected.drain_events(timeout=0.2)
                except TimeoutError:
                    continue
    assert until(seen)
    return state, seen
