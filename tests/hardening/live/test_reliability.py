"""Nothing is lost: processes, workers, broker and backend are killed in the middle of work, and every task runs.

At least once is the promise: a task whose worker is killed runs again, so effects are counted by task.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from amqp.exceptions import ChannelError
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError

from ...project import intake
from .everything import within
from .running import SOON, Running

MANY = 200


@pytest.fixture(autouse=True)
def healthy(running: Running) -> Iterator[None]:
    """Leave the pool ``worker`` serving, whatever the test did to it."""
    yield
    running.alive()
    assert running.task("add").delay(1, 2).get(timeout=SOON) == 3


def send(running: Running, key: str, count: int = MANY, **options: object) -> set[str]:
    """Send tasks that each have an effect of their own; return the effects' names."""
    names = {f"{key}.{number}" for number in range(count)}
    for name in sorted(names):
        running.task("effect").apply_async((name,), **options)
    return names


def all_happened(running: Running, names: set[str]) -> bool:
    return bool(within(SOON, lambda: names <= running.effect_names()))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# -- workers ----------------------------------------------------------------------------------------------------------


def test_a_worker_that_shall_end_ends_its_task_first_and_leaves_the_rest(running: Running, key: str) -> None:
    held = running.task("held").delay(key)
    assert running.happens(f"{key}.started")
    os.kill(running.worker.pid, signal.SIGTERM)
    assert within(SOON, lambda: "Warm shutdown" in running.worker.log.read_text())
    names = send(running, f"{key}.rest", 20)
    running.go(key)
    assert held.get(timeout=SOON) == key
    assert within(SOON, lambda: not running.worker.alive())
    running.alive()
    assert all_happened(running, names)
    assert running.count(f"{key}.ended") == 1


def in_the_middle(running: Running, key: str) -> set[str]:
    """Send 200 tasks, and wait until both processes of the pool are busy half-way; return what is to happen."""
    first = send(running, f"{key}.first", MANY // 2)
    for half in ("left", "right"):
        running.task("held").delay(f"{key}.{half}")
    rest = send(running, f"{key}.rest", MANY // 2)
    assert running.happens(f"{key}.left.started")
    assert running.happens(f"{key}.right.started")
    assert not rest & running.effect_names()
    return first | rest | {f"{key}.left.ended", f"{key}.right.ended"}


def go_on(running: Running, key: str) -> None:
    for half in ("left", "right"):
        running.go(f"{key}.{half}")


def test_killed_pool_processes_lose_nothing(running: Running, key: str) -> None:
    names = in_the_middle(running, key)
    for child in children(running.worker.pid):
        os.kill(child, signal.SIGKILL)
    go_on(running, key)
    assert all_happened(running, names)
    assert running.worker.alive()
    assert running.count(f"{key}.left.started") == 2


def test_a_killed_worker_loses_nothing(running: Running, key: str) -> None:
    names = in_the_middle(running, key)
    running.worker.process.kill()
    go_on(running, key)
    running.alive()
    assert all_happened(running, names)
    assert running.count(f"{key}.left.started") == 2


@pytest.mark.parametrize("how", ["die", "leave"])
def test_a_task_that_kills_its_process_ends_in_the_dead_letters(running: Running, key: str, how: str) -> None:
    with running.batch() as worker:
        dead = running.waiting("dead")
        running.task(how).apply_async((key,), queue="slow")
        assert within(SOON, lambda: running.waiting("dead") == dead + 1)
        assert running.count(key) == 3  # the queue's delivery limit of 2 is about deliveries after the first
        assert running.task("add").apply_async((1, 2), queue="slow").get(timeout=SOON) == 3
        assert worker.alive()


# -- broker -----------------------------------------------------------------------------------------------------------


def test_tasks_that_wait_an_hour_do_not_keep_others_waiting(running: Running) -> None:
    for _ in range(1000):
        running.task("effect").apply_async(("never",), countdown=3600)
    assert running.task("add").delay(1, 2).get(timeout=SOON) == 3
    assert running.length("default") == 0


def test_a_killed_broker_loses_nothing(running: Running, key: str) -> None:
    names = in_the_middle(running, key) | send(running, f"{key}.later", 5, countdown=2)
    with running.stack.without(running.broker.server):
        with pytest.raises(OperationalError, match="refused"):
            running.task("add").delay(1, 2)
        assert running.worker.alive()
    go_on(running, key)
    names |= send(running, f"{key}.after", 5)
    assert all_happened(running, names)


@pytest.mark.broker("rabbitmq")  # Redis makes a list for any name that the account may push to
def test_a_message_that_cannot_be_routed_is_no_silent_loss(running: Running) -> None:
    definitions = running.stack.folder / "rabbitmq/definitions.json"
    running.stack.rabbitmqctl("delete_queue", "-p", "everything", "everything.slow")
    try:
        for _ in range(2):  # what the broker says of the first must not count for the second
            with pytest.raises(ChannelError, match="NO_ROUTE"):
                running.task("add").apply_async((1, 2), queue="slow")
    finally:
        running.stack.rabbitmqctl("import_definitions", str(definitions))
    assert running.task("add").delay(1, 2).get(timeout=SOON) == 3


def test_a_broker_that_is_short_of_memory_keeps_no_caller_waiting(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "CONFIRM_TIMEOUT", 1)
    with running.broker.short_of_memory(), pytest.raises(OperationalError, match=running.broker.no_memory):
        running.task("add").delay(1, 2)
    assert running.task("add").delay(1, 2).get(timeout=SOON) == 3


def test_a_replaced_certificate_is_used_for_the_next_connection(running: Running) -> None:
    caller = running.caller("client")
    assert running.task("add", caller).delay(1, 2).get(timeout=SOON) == 3
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=5)
    running.stack.pki.tls.client("everything.client", (ends - timedelta(days=1), ends))
    running.broker.disconnect("client")
    running.stack.redis("CLIENT", "KILL", "USER", "everything.client")
    assert running.task("add", caller).delay(1, 2).get(timeout=SOON) == 3
    assert running.broker.sees_certificate(ends)


# -- backend ----------------------------------------------------------------------------------------------------------


def test_without_the_backend_tasks_run_callers_hear_of_it_and_results_wait(running: Running, key: str) -> None:
    with running.batch(SECURE_CELERY_REPLAY_ON_OUTAGE="accept"):  # the store of replays is on the same server
        result = running.task("held").apply_async((key,), queue="slow")
        assert running.happens(f"{key}.started")
        with running.stack.without("redis"):
            running.task("effect").apply_async((f"{key}.ignored",), queue="slow")
            assert running.happens(f"{key}.ignored")
            with pytest.raises((ConnectionError, RuntimeError), match=r"refused|result store"):
                result.get(timeout=SOON)
            with pytest.raises((ConnectionError, RuntimeError), match=r"refused|result store"):
                running.task("add", running.caller("client")).delay(1, 2)
            running.go(key)
            assert running.happens(f"{key}.ended")
        assert running.client.AsyncResult(result.id).get(timeout=2 * SOON) == key


@pytest.mark.parametrize("who", ["celery", "redis-py"])
def test_a_result_that_is_published_during_a_reconnection_ends_the_wait(
    running: Running, key: str, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery asks for what it missed before it subscribes again, redis-py not at all."""
    held = running.task("held").delay(key)
    backend = running.client.backend
    consumer, look, pubsub = backend.result_consumer, backend.result_consumer.on_wait_for_pending, backend.client.pubsub

    def finish(**options: object) -> object:
        running.go(key)
        assert within(SOON, lambda: running.client.AsyncResult(held.id).state == "SUCCESS")
        return pubsub(**options)

    def lose(*args: object, **options: object) -> None:
        look(*args, **options)
        if who == "celery":
            monkeypatch.setattr(backend.client, "pubsub", finish)  # what it does between asking and subscribing
            running.stack.redis("CLIENT", "KILL", "TYPE", "pubsub")
        else:
            consumer._pubsub.connection.disconnect()
            finish()
            consumer.consume_from(str(uuid4()))

    monkeypatch.setattr(consumer, "on_wait_for_pending", lose)
    assert held.get(timeout=SOON) == key
