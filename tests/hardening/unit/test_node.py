"""A worker's end of remote control: what it does with what arrives, under which name, and what it tells."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state as worker_state
from celery.worker.control import Panel

from ...project import audit, control
from .room import Room, arrives


@pytest.fixture
def heard(room: Room, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[Any], None], list[Any]]:
    """Give what a node does with a message, and the bodies it hands on."""
    taken: dict[str, Any] = {}
    bodies: list[Any] = []

    def consumer(*_: Any, on_message: Any, **__: Any) -> Any:
        taken["on_message"] = on_message
        return SimpleNamespace(consume=lambda: None)

    monkeypatch.setattr(control, "Consumer", consumer)
    room.node.listen(callback=lambda body, _: bodies.append(body))
    return taken["on_message"], bodies


def test_only_what_may_be_done_is_handed_on(
    room: Room, heard: tuple[Callable[[Any], None], list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    receive, bodies = heard
    for body in (b"", b"{}", "x.y.z", None):
        receive(arrives(body))
    receive(room.message(room.fields("client"), "client"))
    assert bodies == []
    receive(room.message(room.fields()))
    assert [body["method"] for body in bodies] == ["ping"]
    assert {record.audit["event"] for record in caplog.records} == {"control.refused"}  # type: ignore[attr-defined]


def test_a_defect_refuses_too(
    room: Room, heard: tuple[Callable[[Any], None], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    receive, bodies = heard
    monkeypatch.setattr(control, "verify", lambda *_: 1 / 0)
    receive(room.message(room.fields()))
    assert bodies == []


def test_an_end_that_was_ordered_is_not_swallowed(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    body = room.admitted(method="shutdown", ticket=None)
    with pytest.raises(SystemExit):
        room.node.handle_message(body)


@pytest.mark.parametrize(("method", "traces"), [("ping", 0), ("rate_limit", 1)])
def test_a_change_leaves_a_trace(room: Room, method: str, traces: int, caplog: pytest.LogCaptureFixture) -> None:
    body = room.admitted(method=method, ticket=None, arguments={"task_name": "x", "rate_limit": "1/s"})
    with caplog.at_level(logging.INFO, logger=audit.logger.name):
        room.node.handle_message(body)
    found = [record.audit for record in caplog.records if record.name == audit.logger.name]  # type: ignore[attr-defined]
    assert found == [{"event": "control.accepted", "method": method, "signer": body["iss"]}] * traces


@pytest.mark.parametrize(
    ("hostname", "name"),
    [
        ("worker@host", "worker@host"),
        ("worker.1@host", "worker.1@host"),
        ("celery@host", "worker.celery@host"),
        ("worker2@host", "worker.worker2@host"),
        ("batch@host", "worker.batch@host"),
        ("x@worker", "worker.x@worker"),
        ("x@worker.y", "worker.x@worker.y"),
    ],
)
def test_a_node_is_called_after_its_pool(room: Room, hostname: str, name: str) -> None:
    own = room.service.worker.identity
    assert control.node_name(own, hostname) == name
    assert control.node_name(own, name) == name


def test_addresses_of_the_broker_are_not_among_the_statistics(room: Room) -> None:
    told = {"pid": 1, "broker": {"hostname": "secret"}}
    controller = SimpleNamespace(stats=lambda: dict(told))
    state = SimpleNamespace(consumer=SimpleNamespace(controller=controller))
    assert Panel.data["stats"](state) == told
    assert room.node.handlers["stats"](state) == {"pid": 1, "broker": {}}


class Waiting:
    """What remote control sees of a request."""

    def __init__(self, id: str, fun: Any = None) -> None:
        self.id, self.ended, self._eta_timer_entry = id, [], self
        self.fun, self.cancelled, self.looked_at = fun, 0, 0

    def cancel(self) -> None:
        self.cancelled += 1

    def __call__(self) -> None:
        self.looked_at += 1

    def terminate(self, pool: Any, signal: Any) -> None:
        self.ended.append(signal)


@pytest.mark.parametrize("method", ["revoke", "terminate"])
def test_revoking_ends_what_waits_now_and_terminates_what_runs(room: Room, method: str) -> None:
    consumer = SimpleNamespace(apply_eta_task=object(), pool=None)
    later, mine, limited, other = (Waiting(id, consumer.apply_eta_task) for id in ("x", "x", "x", "y"))
    limited.fun = object()
    running = Waiting("x")
    worker_state.scheduled_requests.update((later, mine, limited, other))
    worker_state.active_requests.add(running)
    try:
        room.node.handlers[method](SimpleNamespace(consumer=consumer), task_id=["x"], signal="KILL")
        assert "x" in worker_state.revoked
        assert "y" not in worker_state.revoked
    finally:
        worker_state.reset_state()
    # Two callers' tasks of one id are two requests, and both end.
    assert [(each.cancelled, each.looked_at) for each in (later, mine)] == [(1, 1), (1, 1)]
    assert (limited.looked_at, other.looked_at) == (0, 0)
    assert running.ended == (["KILL"] if method == "terminate" else [])
    assert other.ended == []
