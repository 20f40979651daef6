"""A message that was captured and published again runs once; one that has not run, runs. Effects are counted exactly.

The copies are published with a client's own account, as whoever has that and has seen a message can.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from kombu import Producer

from stack.worker import Worker

from ...project import Settings, envelope, tls
from ...project import replay as guard
from . import brokers
from .everything import within
from .running import SOON, Running
from .test_reliability import children, healthy

__all__ = ["healthy"]


def send(running: Running, name: str, *args: Any, queue: str = "default", **options: Any) -> bytes:
    """Send a task as a client does, and keep what was on the wire."""
    bodies: list[Any] = []
    publish = Producer._publish

    def watched(self: Producer, body: Any, *rest: Any, **others: Any) -> Any:
        bodies.append(body)
        return publish(self, body, *rest, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Producer, "_publish", watched)
        running.task(name).apply_async(args, queue=queue, **options)
    (body,) = bodies
    return body if isinstance(body, bytes) else body.encode()


def replay(running: Running, body: bytes, times: int = 10, queue: str = "default") -> None:
    """Publish it again."""
    broker = running.client.hardening.broker
    with running.client.connection_for_write() as connection:
        producer = connection.Producer()
        for _ in range(times):
            producer.publish(
                body,
                exchange=broker.exchange,
                routing_key=f"everything.{queue}",
                content_type=envelope.CONTENT_TYPE,
                content_encoding="utf-8",
                delivery_mode=2,
            )


@contextmanager
def colleagues(running: Running, count: int, *options: str) -> Iterator[list[Worker]]:
    """Run more workers of the pool ``worker`` for a while."""
    with ExitStack() as stack:
        workers = []
        for number in range(count):
            environment = {**running.stack.environment("worker"), "EFFECTS": str(running.effects)}
            workers.append(running.stack.start_worker(env=environment, name=f"worker-{number + 2}", options=options))
            stack.callback(workers[-1].stop)
        yield workers


def held(running: Running) -> int:
    """Return how many messages lie in the queue or with workers of the pool ``worker``."""
    length = running.length("default")
    if brokers.NAME == "redis":
        length += int(running.stack.redis_broker("HLEN", "everything:worker:unacked"))
    return length


def settled(running: Running) -> None:
    """Wait until every message has been dealt with."""
    assert within(2 * SOON, lambda: held(running) == 0)


def refused(running: Running) -> int:
    """Return how many messages lie in the quarantine."""
    return running.waiting("quarantine")


def replay_keys(running: Running) -> dict[str, tuple[str, int]]:
    """Return what the store knows of messages and workers: value and seconds left, by key."""
    keys = [key for key in running.stack.redis("KEYS", "everything:replay:*").splitlines() if key]
    return {key: (running.stack.redis("GET", key), int(running.stack.redis("TTL", key))) for key in keys}


# --- copies -----------------------------------------------------------------------------------------------------------


def test_of_a_thousand_copies_at_once_for_many_workers_one_runs(running: Running, key: str) -> None:
    before = refused(running)
    with colleagues(running, 2):
        body = send(running, "effect", key)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: replay(running, body, 250), range(4)))
        settled(running)
    assert running.count(key) == 1
    assert within(SOON, lambda: refused(running) - before == 1000)


def test_copies_of_a_task_that_runs_or_has_run_do_not(running: Running, key: str) -> None:
    with colleagues(running, 1):
        body = send(running, "held", key)
        assert running.happens(f"{key}.started")
        replay(running, body)
        running.task("effect").delay(f"{key}.other")  # nobody stands still for them
        assert running.happens(f"{key}.other")
        running.go(key)
        settled(running)
        replay(running, body)
        settled(running)
    assert (running.count(f"{key}.started"), running.count(f"{key}.ended")) == (1, 1)


def test_copies_do_not_run_after_the_workers_were_started_again(running: Running, key: str) -> None:
    body = send(running, "effect", key)
    settled(running)
    running.worker.stop()
    replay(running, body)
    running.alive()
    settled(running)
    assert running.count(key) == 1


def test_copies_of_a_task_that_waits_for_its_time_do_not_run(running: Running, key: str) -> None:
    body = send(running, "effect", key, countdown=2)
    with colleagues(running, 1):
        replay(running, body)  # at RabbitMQ these overtake the one that waits
        assert running.happens(key)
        settled(running)
    assert running.count(key) == 1


def test_a_retry_is_no_copy_and_its_copies_do_not_run(running: Running, key: str) -> None:
    body = send(running, "again", key, 0)
    assert running.happens(key, 2)
    replay(running, body)
    settled(running)
    assert running.count(key) == 2


# --- what was not run, runs -------------------------------------------------------------------------------------------


def test_a_killed_worker_s_task_runs_again_and_its_copies_do_not(running: Running, key: str) -> None:
    body = send(running, "held", key)
    assert running.happens(f"{key}.started")
    replay(running, body, 20)
    running.worker.process.kill()
    replay(running, body, 20)
    with colleagues(running, 1):
        running.alive()
        assert running.happens(f"{key}.started", 2)
        replay(running, body, 20)
        running.go(key)
        settled(running)
    assert (running.count(f"{key}.started"), running.count(f"{key}.ended")) == (2, 1)


def test_a_killed_process_s_task_runs_again_and_its_copies_do_not(running: Running, key: str) -> None:
    body = send(running, "held", key)
    assert running.happens(f"{key}.started")
    for child in children(running.worker.pid):
        os.kill(child, signal.SIGKILL)
    replay(running, body, 20)
    assert running.happens(f"{key}.started", 2)
    replay(running, body, 20)
    running.go(key)
    settled(running)
    assert (running.count(f"{key}.started"), running.count(f"{key}.ended")) == (2, 1)


def test_copies_that_come_again_with_the_original_run_one_at_a_time(running: Running, key: str) -> None:
    """A worker that stands still is given copies, and killed: all it had is redelivered, as RabbitMQ says."""
    body = send(running, "held", key)
    assert running.happens(f"{key}.started")
    os.kill(running.worker.pid, signal.SIGSTOP)
    replay(running, body)
    running.worker.process.kill()
    with colleagues(running, 2):
        assert running.happens(f"{key}.started", 2)
        running.go(key)
        settled(running)
    assert (running.count(f"{key}.started"), running.count(f"{key}.ended")) == (2, 1)


def test_a_lost_connection_loses_nothing_and_repeats_only_what_was_cut_short(running: Running, key: str) -> None:
    running.worker.stop()
    with colleagues(running, 1, "--prefetch-multiplier", "4"):  # so that it holds more than it runs
        bodies = [send(running, "held", f"{key}.{half}") for half in ("left", "right")]
        waiting = {f"{key}.{number}" for number in range(20)}
        for half in ("left", "right"):
            assert running.happens(f"{key}.{half}.started")
        for name in sorted(waiting):
            send(running, "effect", name)
        running.broker.disconnect("worker")
        for half in ("left", "right"):
            assert running.happens(f"{key}.{half}.started", 2)
            running.go(f"{key}.{half}")
        settled(running)
        for body in bodies:
            replay(running, body)
        settled(running)
    assert {running.count(name) for name in waiting} == {1}
    for half in ("left", "right"):
        assert (running.count(f"{key}.{half}.started"), running.count(f"{key}.{half}.ended")) == (2, 1)


def test_what_a_worker_leaves_when_it_ends_runs_at_once(running: Running, key: str) -> None:
    """A lease that is given back need not end first."""
    send(running, "held", f"{key}.left")
    send(running, "held", f"{key}.right")
    for half in ("left", "right"):
        assert running.happens(f"{key}.{half}.started")
        running.go(f"{key}.{half}")
    running.worker.stop()
    names = {key.removeprefix("everything:replay:") for key in replay_keys(running)}
    assert not any(name.startswith("worker:") for name in names)


# --- the store --------------------------------------------------------------------------------------------------------


def test_while_the_store_is_away_messages_wait_and_then_each_runs_once(running: Running, key: str) -> None:
    names = {f"{key}.{number}" for number in range(30)}
    pid, before = running.worker.pid, refused(running)
    with running.stack.without("redis"):
        for name in sorted(names):
            running.task("effect").apply_async((name,))
        body = send(running, "effect", f"{key}.copied")
        replay(running, body, 20)
        log = running.worker.log
        assert within(SOON, lambda: "replay.store-away" in log.read_text())
        deadline = time.monotonic() + 3
        assert not within(deadline - time.monotonic(), lambda: names & running.effect_names())
    assert within(SOON, lambda: names <= running.effect_names())
    settled(running)
    assert {running.count(name) for name in {*names, f"{key}.copied"}} == {1}
    assert within(SOON, lambda: refused(running) - before == 20)  # RabbitMQ counts with a delay
    assert (running.worker.pid, running.worker.alive()) == (pid, True)


def test_a_store_that_forgot_is_told_again_what_runs(running: Running, key: str) -> None:
    body = send(running, "held", key)
    assert running.happens(f"{key}.started")
    with colleagues(running, 1):
        with running.stack.without("redis"):
            pass  # it keeps nothing on disk
        assert within(SOON, lambda: any(":worker:" not in name for name in replay_keys(running)))
        replay(running, body)
        running.go(key)
        settled(running)
    assert (running.count(f"{key}.started"), running.count(f"{key}.ended")) == (1, 1)


def test_what_the_store_knows_of_a_message_goes_when_the_message_has_expired(running: Running, key: str) -> None:
    known = replay_keys(running).keys()
    send(running, "effect", key)
    assert running.happens(key)
    settings = running.client.hardening.settings
    (new,) = [value for name, value in replay_keys(running).items() if name not in known and ":worker:" not in name]
    assert new[0] == "done"
    known_for = settings.message_max_age + guard.late(settings)
    assert known_for < new[1] <= known_for + 2 * settings.clock_skew + 60
    assert all(left > 0 for _, left in replay_keys(running).values())


def test_a_claim_is_one_round_trip_whatever_the_store_knows(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = running.stack.environment("worker")
    settings = Settings(**{name.removeprefix("SECURE_CELERY_").lower(): value for name, value in environment.items()})
    store = settings.open_replay_store(settings.read_topology().replays)
    sent: list[Any] = []
    send_packed = tls.VerifiedSSLConnection.send_packed_command

    def counted(self: Any, command: Any, *rest: Any, **options: Any) -> Any:
        sent.append(command)
        return send_packed(self, command, *rest, **options)

    assert store.renew("one", 60) is False
    monkeypatch.setattr(tls.VerifiedSSLConnection, "send_packed_command", counted)
    answers = [store.claim("m", "one", 60), store.claim("m", "one", 60), store.claim("m", "two", 60)]
    assert len(sent) == 3
    store.done("m", 60)
    answers.append(store.claim("m", "two", 60))
    assert len(sent) == 5
    assert answers == [guard.OURS, guard.OURS, guard.HELD, guard.DONE]
