"""Events, live: a monitor sees what workers report, without arguments, and nothing that others made up."""

from __future__ import annotations

import json
import time
from typing import Any

from celery import Celery

from ...project import envelope
from .remote import SECRET, command, events, listen, publish, signed, the_worker_lives
from .running import TASKS, Running

__all__ = ["the_worker_lives"]


def forged(kind: str, task_id: str) -> dict[str, Any]:
    return {
        **{"type": kind, "uuid": task_id, "name": f"{TASKS}.admin", "hostname": "worker@forged", "pid": 1},
        **{"timestamp": time.time(), "clock": 1, "utcoffset": 0, "freq": 2},
    }


def test_a_monitor_sees_genuine_events_without_arguments_and_no_forged_one(
    running: Running, monitor: Celery, key: str
) -> None:
    workers, client, batch = running.caller("worker"), running.client, running.caller("batch")
    exchange, results = events(workers), []

    def report(app: Celery, node: str, *made: dict[str, Any]) -> bytes:
        fields = {**command(app, ""), "node": node, "events": list(made)}
        for name in ("method", "arguments", "destination", "pattern", "matcher", "ticket"):
            del fields[name]
        return signed(app, fields, envelope.Type.EVENT)

    def act() -> None:
        for kind in ("worker-online", "task-received"):
            made = forged(kind, "forged")
            publish(workers, exchange, "worker.online", json.dumps(made), content_type="application/json")
            publish(workers, exchange, "worker.online", report(client, "client@forged", made))
            publish(workers, exchange, "worker.online", report(batch, "worker@forged", made))
            publish(workers, exchange, "worker.online", report(batch, "batch@odd", {"type": kind, "x": made}))
        results.append(running.task("counted").apply_async((f"{key}.{SECRET}",), queue="slow"))

    with running.batch("-E"):
        state, seen = listen(monitor, lambda seen: any(event["type"] == "task-succeeded" for event in seen), act)
    task = state.tasks[results[0].id]
    assert (task.name, task.state) == (f"{TASKS}.counted", "SUCCESS")
    assert task.worker.hostname.startswith("batch@")
    assert SECRET not in json.dumps(seen)
    assert "forged" not in state.tasks
    assert not any("forged" in name for name in state.workers)


def test_a_worker_whose_events_are_on_beats_and_one_whose_events_are_off_is_silent(
    running: Running, monitor: Celery
) -> None:
    with running.batch("-E"):
        state, _ = listen(monitor, lambda seen: sum(event["type"] == "worker-heartbeat" for event in seen) > 1)
    assert {name.partition("@")[0] for name in state.workers} == {"batch"}
