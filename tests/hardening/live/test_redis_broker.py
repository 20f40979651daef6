"""A broker where a message is whatever somebody pushed onto a list: what a sender's account can do to a worker.

All of it with the rights of `client`, which may push to the queue and do nothing else, but where another worker's hands
are needed. What is checked is the effect: the worker lives, the next honest task runs, nothing else does.
"""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from stack.backend import ADMINISTRATOR

from .everything import within
from .running import SOON, Running

pytestmark = pytest.mark.broker("redis")

QUEUE = "everything.default"
HELD, INDEX = "everything:worker:unacked", "everything:worker:unacked_index"


def push(running: Running, *items: bytes | dict[str, Any]) -> None:
    with running.client.connection_for_write() as connection:
        for item in items:
            raw = item if isinstance(item, bytes) else json.dumps(item).encode()
            connection.default_channel.client.lpush(QUEUE, raw)


def captured(running: Running, task: str, *arguments: Any) -> dict[str, Any]:
    """Return an honest message as it would lie in the queue, without sending it."""
    caught: list[dict[str, Any]] = []
    with running.client.producer_pool.acquire(block=True) as producer:
        channel = producer.channel
        channel._put = lambda queue, message, **_: caught.append(message)
        try:
            running.task(task).apply_async(arguments, producer=producer)
        finally:
            del channel._put
    [message] = caught
    return json.loads(json.dumps(message))


def serves(running: Running) -> bool:
    return running.task("add").delay(1, 2).get(timeout=SOON) == 3 and running.worker.alive()


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "a word": b"garbage",
    "a list": b"[1]",
    "a number": b"7",
    "null": b"null",
    "an empty object": b"{}",
    "bytes": b"\xff\xfe\x00",
    "a body that is a number": b'{"body": 1, "properties": {"body_encoding": "base64", "delivery_tag": "1"}}',
    "headers that are a list": b'{"body": "x", "properties": {"delivery_tag": "1"}, "headers": [1]}',
    "properties that are a list": b'{"body": "x", "properties": [1], "headers": {}}',
    "no properties": b'{"body": "x", "headers": {}}',
    "a body that is no base64": b'{"body": "!!", "properties": {"body_encoding": "base64"}, "headers": {}}',
    "a lone surrogate": b'{"body": "\\ud800", "properties": {}, "headers": {}}',
    "a content type that is a list": b'{"body": "x", "content-type": [1], "properties": {}, "headers": {}}',
    "a compression": b'{"body": "x", "properties": {}, "headers": {"compression": "gzip"}}',
    "deep": b"[" * 100_000,
    "a long number": b"9" * 100_000,
    "not a number": b'{"body": "x", "properties": {"priority": NaN, "deliveries": 1e999}, "headers": {}}',
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_quarantined_and_the_worker_lives(running: Running, kind: str) -> None:
    before = running.length("quarantine")
    push(running, GARBAGE[kind])
    assert serves(running)
    assert within(SOON, lambda: running.length("quarantine") == before + 1)


@pytest.mark.parametrize("kind", ["a word", "a list", "headers that are a list", "a body that is a number"])
def test_the_same_garbage_ends_a_worker_of_stock_celery(running: Running, kind: str) -> None:
    own = running.stack.environment("worker")
    port = urlsplit(own["SECURE_CELERY_BROKER_URL"]).port
    password = (running.stack.folder / f"redis-broker/{ADMINISTRATOR}.password").read_text(encoding="utf-8")
    environment = {**own, "STOCK_BROKER": f"rediss://{ADMINISTRATOR}:{password}@127.0.0.1:{port}/0"}
    worker = running.stack.start_worker(f"{__package__}.stock:app", environment, "stock")
    try:
        running.stack.redis_broker("LPUSH", "stock", GARBAGE[kind].decode())
        assert within(SOON, lambda: not worker.alive())
    finally:
        worker.stop()


def test_a_message_is_what_was_signed_whatever_is_written_around_it(running: Running, key: str) -> None:
    message = captured(running, "effect", key)
    message["headers"].update(redelivered=True, task="celery.backend_cleanup", id="7", eta="2999-01-01T00:00:00Z")
    message["properties"].update(
        delivery_tag="chosen", delivery_info={"exchange": "x", "routing_key": "everything.dead", "redelivered": True}
    )
    push(running, message)
    assert running.happens(key)
    assert serves(running)
    assert running.count(key) == 1


def test_a_chosen_tag_acknowledges_nobody_elses_message(running: Running, key: str) -> None:
    held = running.task("held").delay(key)
    assert running.happens(f"{key}.started")
    [tag] = running.stack.redis_broker("HKEYS", HELD).splitlines()
    forged = captured(running, "effect", f"{key}.forged")
    forged["properties"]["delivery_tag"] = tag
    push(running, forged)
    assert running.happens(f"{key}.forged")
    assert serves(running)
    assert running.stack.redis_broker("HKEYS", HELD).splitlines() == [tag]
    running.go(key)
    assert held.get(timeout=SOON) == key
    assert within(SOON, lambda: not running.stack.redis_broker("HKEYS", HELD))


def test_a_retry_goes_where_its_signature_says(running: Running, key: str) -> None:
    dead, slow = running.length("dead"), running.length("slow")
    message = captured(running, "again", key, 0)
    message["properties"]["delivery_info"] = {"exchange": "", "routing_key": "everything.slow"}
    push(running, message)
    assert running.happens(key, 2)
    assert (running.length("dead"), running.length("slow")) == (dead, slow)


@pytest.mark.parametrize("deliveries", [-7, 0, 10**9, True, "1", None, [1]])
def test_a_chosen_count_of_deliveries_ends_no_honest_task(running: Running, key: str, deliveries: Any) -> None:
    message = captured(running, "effect", key)
    message["properties"]["deliveries"] = deliveries
    push(running, message)
    assert running.happens(key)
    assert serves(running)


ENTRIES = {
    "a word": "garbage",
    "a number": "7",
    "too few": "[1]",
    "no message": '["x", "", "everything.default"]',
    "no properties": '[{}, "", "everything.default"]',
    "a count that is none": '[{"properties": {"deliveries": "x"}}, "", "everything.default"]',
    "a key that is a list": '[{"properties": {"deliveries": 1}}, "", ["everything.default"]]',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_broken_entry_of_another_worker_is_dropped(running: Running, kind: str) -> None:
    running.stack.redis_broker("HSET", HELD, "broken", ENTRIES[kind])
    running.stack.redis_broker("ZADD", INDEX, "1", "broken")
    assert within(SOON, lambda: "broken" not in running.stack.redis_broker("ZRANGE", INDEX, "0", "-1"))
    assert "broken" not in running.stack.redis_broker("HKEYS", HELD)
    assert serves(running)


def test_an_entry_for_a_queue_of_others_ends_in_the_dead_letters(running: Running) -> None:
    dead = running.length("dead")
    entry = [{"properties": {"deliveries": 1}, "body": base64.b64encode(b"x").decode()}, "", "other.default"]
    running.stack.redis_broker("HSET", HELD, "foreign", json.dumps(entry))
    running.stack.redis_broker("ZADD", INDEX, "1", "foreign")
    assert within(SOON, lambda: running.length("dead") == dead + 1)
    assert not int(running.stack.redis_broker("EXISTS", "other.default"))
    assert serves(running)


def test_a_worker_that_lives_keeps_its_message_longer_than_the_timeout(running: Running, key: str) -> None:
    held = running.task("held").delay(key)
    assert running.happens(f"{key}.started")
    [tag] = running.stack.redis_broker("HKEYS", HELD).splitlines()
    began = float(running.stack.redis_broker("ZSCORE", INDEX, tag))
    assert within(SOON, lambda: float(running.stack.redis_broker("ZSCORE", INDEX, tag)) > began + 8)  # timeout: 6
    running.go(key)
    assert held.get(timeout=SOON) == key
    assert running.count(f"{key}.started") == 1


def test_a_broker_that_was_killed_has_forgotten_nothing(running: Running, key: str) -> None:
    """Transactions too: what was acknowledged or given up stays so."""

    def state() -> list[str]:
        held = sorted(running.stack.redis_broker("HKEYS", "everything:batch:unacked").split())
        lists = (running.stack.redis_broker("LRANGE", f"everything.{name}", "0", "-1") for name in ("dead", "slow"))
        return [*held, running.stack.redis_broker("ZRANGE", "everything:batch:unacked_index", "0", "-1"), *lists]

    with running.batch():
        dead = running.length("dead")
        running.task("die").apply_async((key,), queue="slow")
        assert within(SOON, lambda: running.length("dead") == dead + 1)
    running.task("effect").apply_async((f"{key}.waits",), queue="slow")
    before = state()
    with running.stack.without("redis-broker"):
        pass
    assert state() == before
    with running.batch():
        assert running.happens(f"{key}.waits")
    assert running.count(key) == 3


def test_what_is_taken_from_a_broker_without_memory_runs(running: Running, key: str) -> None:
    running.worker.stop()
    push(running, b"garbage")
    names = [f"{key}.{number}" for number in range(20)]
    for name in names:
        running.task("effect").delay(name)
    with running.broker.short_of_memory():
        running.alive()
        assert all(running.happens(name) for name in names)
        assert within(SOON, lambda: not running.stack.redis_broker("HKEYS", HELD))
    assert serves(running)
    assert all(running.count(name) == 1 for name in names)


def test_a_worker_that_ends_gives_back_what_waited_without_counting_it(running: Running, key: str) -> None:
    later = running.task("counted").apply_async((key,), countdown=15)
    for _ in range(2):
        assert within(SOON, lambda: later.id in running.worker.log.read_text())
        running.worker.stop()
        [raw] = running.stack.redis_broker("LRANGE", QUEUE, "0", "-1").splitlines()
        assert json.loads(raw)["properties"]["deliveries"] == 1
        running.alive()
    assert later.get(timeout=SOON) == key
    assert running.count(key) == 1
