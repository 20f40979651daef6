"""Events: they wait for nobody and tell nothing of callers, and a monitor is shown genuine ones alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kombu.exceptions import EncodeError

from ...project import control, intake
from .room import HOUR, NODE, Room, Type, arrives


class Producer:
    """A producer that keeps what it is given, or fails."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, dict[str, Any]]] = []
        self.fails = False

    def publish(self, body: Any, **options: Any) -> None:
        if self.fails:
            raise ConnectionError
        self.sent.append((body, options))


def dispatcher(room: Room, role: str = "worker", **options: Any) -> Any:
    app = room.party(role).app
    return app.events.Dispatcher(app.connection_for_write(), hostname="celery@test", enabled=False, **options)


def received(room: Room, *messages: Any, handler: Any = None) -> list[Any]:
    """Give messages to a monitor's receiver; return the events that its handler got."""
    seen: list[Any] = []
    app = room.party("monitor").app
    receiver = app.events.Receiver(app.connection_for_read(), handlers={"*": handler or seen.append})
    for message in messages:
        receiver._receive_signed(message)
    return seen


def report(room: Room, *events: Any, role: str = "worker", node: str = NODE) -> Any:
    return room.message({**room.registered(role), "node": node, "events": [*events]}, role, Type.EVENT)


HEARTBEAT = {"type": "worker-heartbeat", "hostname": "worker@forged", "freq": 2, "clock": 1}


def test_an_event_arrives_signed_with_its_workers_name_and_without_what_callers_wrote(room: Room) -> None:
    producer, hidden = Producer(), dict.fromkeys(("args", "kwargs", "result", "exception", "traceback"), "swordfish")
    events = [{"type": "task-succeeded", "uuid": "x", "hostname": "y", **hidden}, {"type": "task-started", "uuid": "x"}]
    dispatcher(room)._publish(events, producer, "task.multi")
    ((body, options),) = producer.sent
    assert (options["exchange"], options["routing_key"]) == (room.service.rules.celery("events"), "task.multi")
    assert options["confirm_timeout"] == 0
    assert "serializer" not in options
    first, second = received(room, arrives(body))
    assert (first["type"], first["uuid"], first["hostname"]) == ("task-succeeded", "x", "worker.celery@test")
    assert second["type"] == "task-started"
    assert "swordfish" not in str(first)
    assert events[0]["args"] == "swordfish"  # the caller's own is left alone


@pytest.mark.parametrize("role", ["client", "beat", "monitor", "operator"])
def test_only_workers_report(room: Room, role: str) -> None:
    with pytest.raises(PermissionError):
        dispatcher(room, role)._publish(HEARTBEAT, Producer(), "worker.heartbeat")
    assert received(room, report(room, HEARTBEAT, role=role, node=f"{role}@test")) == []


def test_events_that_cannot_be_sent_wait_and_do_not_pile_up(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "WAITING", 3)
    producer, made = Producer(), dispatcher(room)
    producer.fails = True
    for number in range(5):
        made._publish({**HEARTBEAT, "n": number}, producer, "worker.heartbeat")
    assert [event["n"] for event, _ in made._outbound_buffer] == [2, 3, 4]
    with pytest.raises(ConnectionError):
        dispatcher(room, buffer_while_offline=False)._publish(HEARTBEAT, producer, "worker.heartbeat")
    with pytest.raises(EncodeError):
        made._publish({**HEARTBEAT, "x": object()}, producer, "worker.heartbeat")


def test_a_genuine_event_is_shown_under_its_signers_name(room: Room) -> None:
    (event,) = received(room, report(room, HEARTBEAT))
    assert (event["type"], event["hostname"]) == ("worker-heartbeat", NODE)


def test_a_forged_event_is_not_shown(room: Room) -> None:
    unsigned = arrives(json.dumps(HEARTBEAT), content_type="application/json")
    body = room.registered("worker")
    for forged in (
        unsigned,
        arrives(b"\xff"),
        report(room, HEARTBEAT, node="batch@test"),
        report(room, HEARTBEAT, node="worker2@test"),
        room.message({**body, "node": NODE, "events": [HEARTBEAT]}, "worker", Type.REPLY),
        room.message({**body, "node": NODE, "events": [HEARTBEAT], "iat": body["iat"] - HOUR}, "worker", Type.EVENT),
    ):
        assert received(room, forged) == []


@pytest.mark.parametrize("odd", [{}, {"type": 1}, {"type": "task-x"}, {**HEARTBEAT, "clock": "x"}, {"type": []}])
def test_a_worker_that_was_taken_over_cannot_end_a_monitor(room: Room, odd: dict[str, Any]) -> None:
    state = room.party("monitor").app.events.State()
    received(room, report(room, odd), report(room, HEARTBEAT), handler=state.event)
    assert set(state.workers) <= {NODE}
    received(room, report(room, HEARTBEAT), handler=lambda _: 1 / 0)


def test_what_nobody_waits_for_is_published_without_waiting_for_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    channel: Any = object.__new__(intake.AmqpTransport.Connection.Channel)
    sent: list[Any] = []
    monkeypatch.setattr(channel, "_basic_publish", lambda *args, **kwargs: sent.append(kwargs), raising=False)
    channel.basic_publish_confirm("message", exchange="x", confirm_timeout=0)
    assert sent == [{"exchange": "x", "confirm_timeout": 0}]
