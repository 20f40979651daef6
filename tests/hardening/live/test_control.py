"""Remote control, live: what operators and monitors can do to workers, and nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
from amqp.exceptions import AMQPError
from celery import Celery
from celery.exceptions import TaskRevokedError
from kombu import Exchange

from ...project import control, envelope
from .everything import within
from .remote import SECRET, command, commands, events, listen, nodes, publish, signed, the_worker_lives
from .running import ROOT, SOON, TASKS, Running

__all__ = ["the_worker_lives"]


def processes(operator: Celery) -> int:
    """How many processes the pool `worker` has: what `pool_grow` changes."""
    [stats] = operator.control.inspect(timeout=SOON, limit=1).stats().values()
    return len(stats["pool"]["processes"])


# -- what operators and monitors do -----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["operator", "monitor"])
def test_who_watches_sees_the_workers_and_no_argument(running: Running, key: str, role: str) -> None:
    watcher = running.caller(role)
    result = running.task("held").delay(f"{key}{SECRET}")
    assert running.happens(f"{key}{SECRET}.started")
    seen = watcher.control.inspect(timeout=SOON, limit=1)
    [active] = seen.active().values()
    described = json.dumps([active, seen.query_task(result.id), seen.stats(), seen.registered(), seen.reserved()])
    running.go(f"{key}{SECRET}")
    assert result.get(timeout=SOON)
    assert result.id in described
    assert f"{TASKS}.held" in described
    assert SECRET not in described
    assert str(watcher.conf.broker_url) not in described


@pytest.mark.parametrize("arguments", [("status",), ("inspect", "active"), ("control", "pool_restart")])
@pytest.mark.parametrize("role", ["operator", "monitor", "client"])
def test_the_command_line_works_for_the_role_that_may(running: Running, role: str, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", f"{TASKS}:app", *arguments, "--timeout", "3"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": "src", **running.stack.environment(role)},
        capture_output=True,
        text=True,
        check=False,
    )
    may = role == "operator" or (role == "monitor" and arguments[0] != "control")
    assert (done.returncode == 0) == may, done.stderr
    assert ("worker@" in done.stdout) == may
    assert ("may not give the command" in done.stderr) != may


def test_a_revoked_task_does_not_run_and_its_caller_is_told(running: Running, operator: Celery, key: str) -> None:
    task = running.task("counted")
    waiting = task.apply_async((key,), countdown=3)
    after = task.apply_async((f"{key}.after",), countdown=3)
    operator.control.revoke(waiting.id)
    with pytest.raises(TaskRevokedError):
        waiting.get(timeout=SOON)
    assert after.get(timeout=SOON) == f"{key}.after"
    assert running.count(key) == 0


@pytest.mark.broker("redis")  # RabbitMQ keeps it, and no worker knows of it
def test_a_task_that_waits_in_a_worker_ends_at_once_when_revoked(running: Running, operator: Celery, key: str) -> None:
    waiting = running.task("counted").apply_async((key,), countdown=600)
    within(SOON, lambda: waiting.id in str(operator.control.inspect(timeout=SOON, limit=1).scheduled()))
    operator.control.revoke(waiting.id)
    with pytest.raises(TaskRevokedError):
        waiting.get(timeout=SOON)
    seen = operator.control.inspect(timeout=SOON, limit=1)
    assert waiting.id not in json.dumps([seen.reserved(), seen.active()])


def test_a_task_that_comes_after_its_id_was_revoked_does_not_run(running: Running, operator: Celery, key: str) -> None:
    operator.control.revoke(key)
    assert within(SOON, lambda: key in str(operator.control.inspect(timeout=SOON, limit=1).revoked()))
    with pytest.raises(TaskRevokedError):
        running.task("counted").apply_async((key,), task_id=key).get(timeout=SOON)
    assert running.count(key) == 0


def test_a_running_task_is_terminated_and_its_caller_is_told(running: Running, operator: Celery, key: str) -> None:
    result = running.task("held").delay(key)
    assert running.happens(f"{key}.started")
    operator.control.revoke(result.id, terminate=True, signal="SIGKILL")
    with pytest.raises(TaskRevokedError, match="terminated"):
        result.get(timeout=SOON)
    running.go(key)
    assert running.task("add").delay(1, 2).get(timeout=SOON) == 3
    assert running.count(f"{key}.ended") == 0


def test_a_command_reaches_the_nodes_it_names_and_no_other(running: Running, operator: Celery) -> None:
    with running.batch():
        everyone = nodes(operator)
        [batch] = [node for node in everyone if node.startswith("batch")]
        assert len(everyone) == 2
        assert nodes(operator, destination=[batch]) == {batch}
        assert nodes(operator, pattern="batch*", matcher="glob") == {batch}
        operator.control.shutdown(destination=[batch])
        assert within(SOON, lambda: nodes(operator) == everyone - {batch})


def test_worker_and_askers_find_each_other_again_after_they_were_cut_off(
    running: Running, operator: Celery, monitor: Celery
) -> None:
    def answered(app: Celery) -> set[str] | None:
        with suppress(AMQPError, OSError):  # RabbitMQ cuts off everybody
            return nodes(app, limit=1)
        return None

    running.broker.disconnect("worker")
    for app in (operator, monitor):
        assert within(SOON, partial(answered, app))


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_worker_of_another_kind_of_pool_listens_and_reports(
    running: Running, operator: Celery, monitor: Celery, pool: str
) -> None:
    with running.batch("--pool", pool, "-E"):
        assert within(SOON, lambda: nodes(operator, pattern="batch*", matcher="glob", limit=1))
        listen(monitor, lambda seen: any(event["type"] == "worker-heartbeat" for event in seen))


# -- who may not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["monitor", "client"])
def test_who_may_not_is_told_at_once(running: Running, role: str) -> None:
    with pytest.raises(PermissionError, match="may not give the command 'shutdown'"):
        running.caller(role).control.shutdown()


def by_role(role: str) -> Callable[[Running], bytes]:
    def make(running: Running) -> bytes:
        app = running.caller(role)
        return signed(app, command(app, "shutdown"))

    return make


def changed(**fields: Any) -> Callable[[Running], bytes]:
    def make(running: Running) -> bytes:
        app = running.caller("operator")
        return signed(app, {**command(app, "shutdown"), **fields})

    return make


def as_type(kind: envelope.Type) -> Callable[[Running], bytes]:
    def make(running: Running) -> bytes:
        app = running.caller("operator")
        return signed(app, command(app, "shutdown"), kind)

    return make


def altered(running: Running) -> bytes:
    app = running.caller("operator")
    header, _, signature = signed(app, command(app, "ping")).split(b".")
    payload = signed(app, command(app, "shutdown")).split(b".")[1]
    return b".".join((header, payload, signature))


AN_HOUR_AGO = int(time.time()) - 3600
STOPS: dict[str, Callable[[Running], bytes]] = {
    **{f"signed by {role}": by_role(role) for role in ("client", "shop", "worker", "batch", "monitor")},
    "altered": altered,
    "a task": as_type(envelope.Type.TASK),
    "a result": as_type(envelope.Type.RESULT),
    "an event": as_type(envelope.Type.EVENT),
    "of another environment": changed(aud="spiffe://everything.test/production/everything"),
    "in another's name": changed(iss="spiffe://everything.test/development/everything/client"),
    "an hour old": changed(iat=AN_HOUR_AGO, exp=AN_HOUR_AGO + control.Claims.lifetime),
    "an hour old, valid for ever": changed(iat=AN_HOUR_AGO, exp=AN_HOUR_AGO * 2),
    "of tomorrow": changed(iat=AN_HOUR_AGO + 86_400, exp=AN_HOUR_AGO + 86_460),
    "with a claim too much": changed(revoked=True),
    "unknown": changed(method="no_such_command"),
    "Celery's, but not offered": changed(method="conf"),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_command_that_nobody_may_give_does_nothing(running: Running, monitor: Celery, name: str) -> None:
    """Published by an account that may write to the exchange: the worker alone stands between."""
    publish(monitor, commands(monitor), "", STOPS[name](running))
    assert len(nodes(monitor, SOON, limit=1)) == 1  # the worker has taken what came before


@pytest.mark.parametrize("content_type", ["application/json", "application/data", envelope.CONTENT_TYPE])
def test_an_unsigned_command_does_nothing(running: Running, monitor: Celery, content_type: str) -> None:
    unsigned = json.dumps({"method": "shutdown", "arguments": {}, "destination": None, "pattern": None})
    publish(monitor, commands(monitor), "", unsigned, content_type=content_type)
    assert len(nodes(monitor, SOON, limit=1)) == 1


def test_a_genuine_command_of_that_shape_stops_a_worker(running: Running, operator: Celery) -> None:
    """The commands above fail for what is wrong with each, and not because they are made by hand."""
    with running.batch() as worker:
        [batch] = nodes(operator) - nodes(operator, pattern="worker*", matcher="glob")
        publish(operator, commands(operator), "", changed(destination=[batch])(running))
        assert within(SOON, lambda: not worker.alive())


def test_a_command_that_is_played_again_does_nothing(running: Running, monitor: Celery, operator: Celery) -> None:
    before = processes(operator)
    token = signed(operator, {**command(operator, "pool_grow", n=1), "pattern": "worker*", "matcher": "glob"})
    for _ in range(3):
        publish(monitor, commands(monitor), "", token)
    try:
        assert within(SOON, lambda: processes(operator) > before)
        assert processes(operator) == before + 1
    finally:
        operator.control.pool_shrink(1)


def test_a_command_that_stopped_one_worker_does_not_stop_the_next(running: Running, operator: Celery) -> None:
    token = changed(pattern="batch*", matcher="glob", iat=int(time.time()) - 2)(running)
    with running.batch() as worker:
        publish(operator, commands(operator), "", token)
        assert any(node.startswith("batch") for node in nodes(operator))
        assert worker.alive()


# -- garbage ----------------------------------------------------------------------------------------------------------

GARBAGE: list[tuple[bytes | str, dict[str, Any]]] = [
    (b"\xff\x00", {}),
    ("", {}),
    ("a.b.c", {}),
    ("[1]", {"content_type": "application/json"}),
    ("{}", {"content_type": "application/json"}),
    ("[" * 50_000, {"content_type": "application/json"}),
    (b"\x80\x04.", {"content_type": "application/x-python-serialize", "content_encoding": "binary"}),
    ("x", {"content_type": "application/text", "content_encoding": "punycode"}),
    ("x", {"headers": {"compression": "application/x-gzip"}}),
    ("x" * 2_000_000, {}),
]


@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_garbage_ends_no_worker_and_breaks_no_one_who_asks_or_listens(
    running: Running, operator: Celery, monitor: Celery, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    body, properties = GARBAGE[number]
    worker = running.caller("worker")
    publish(monitor, commands(monitor), "", body, **properties)
    with flood(worker, worker.control.mailbox.reply_exchange, "operator", body, properties):
        assert len(nodes(operator, SOON, limit=1)) == 1
        within(SOON, lambda: nodes(operator, limit=1) and "reply.refused" in caplog.text)
    assert "reply.refused" in caplog.text  # it did come to who asked
    with flood(worker, events(worker), "worker.heartbeat", body, properties):
        listen(monitor, lambda seen: "event.refused" in caplog.text)
    assert "event.refused" in caplog.text


@contextmanager
def flood(app: Celery, exchange: Exchange, key: str, body: Any, properties: dict[str, Any]) -> Iterator[None]:
    """Publish one thing again and again while the block runs."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(0.05):
            publish(app, exchange, key, body, **properties)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.broker("redis")
@pytest.mark.parametrize("item", [b"garbage", b"[1]", b"\xff", b'{"__type__":"uuid","__value__":1}', b"[" * 50_000])
def test_what_is_pushed_past_kombu_ends_no_worker(running: Running, monitor: Celery, item: bytes) -> None:
    with monitor.connection_for_write() as connection:
        connection.default_channel.client.publish("/.everything.celery.control", item)
    assert len(nodes(monitor, SOON, limit=1)) == 1
