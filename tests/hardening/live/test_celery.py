"""Hardening breaks nothing of Celery: each feature once, live, over TLS, with exact rights at broker and backend.

What is expected here is what Celery does without hardening. Remote control has tests of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import QueueNotFound, TaskRevokedError
from celery.result import AsyncResult
from kombu.exceptions import EncodeError
from pydantic import TypeAdapter

from stack.account import StackFailed

from ...project import codec, envelope, errors
from .everything import Colour, Order, Parcel, within
from .running import SOON, TASKS, Running

# -- calling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "when", [lambda: {"countdown": 1}, lambda: {"eta": datetime.now(UTC) + timedelta(seconds=1.5)}]
)
def test_a_task_that_has_to_wait_keeps_no_other_waiting(running: Running, when: Callable[[], dict[str, Any]]) -> None:
    started = datetime.now(UTC)
    later = running.task("add").apply_async((1, 2), **when())
    assert running.task("add").delay(3, 4).get(timeout=SOON) == 7
    assert (later.id not in running.worker.log.read_text()) == running.broker.keeps_delayed
    assert later.get(timeout=SOON) == 3
    assert datetime.now(UTC) - started > timedelta(seconds=0.9)


def test_an_expired_task_does_not_run(running: Running, key: str) -> None:
    expired = running.task("counted").apply_async((key,), expires=-1)
    with pytest.raises(TaskRevokedError, match="expired"):
        expired.get(timeout=SOON)
    assert expired.state == "REVOKED"
    assert running.count(key) == 0


def test_a_task_that_expires_in_its_queue_does_not_run_and_its_caller_is_told(running: Running, key: str) -> None:
    expired = running.task("counted").apply_async((key,), queue="slow", expires=1)
    began = time.monotonic()
    assert within(SOON, lambda: time.monotonic() > began + 1.1)
    with running.batch():
        with pytest.raises(TaskRevokedError, match="expired"):
            expired.get(timeout=SOON)
        assert running.task("add").apply_async((1, 2), queue="slow").get(timeout=SOON) == 3
    assert running.count(key) == 0


@pytest.mark.parametrize(
    "when",
    [
        lambda: {"countdown": 0.2},
        lambda: {"countdown": 1.5},
        lambda: {"eta": datetime.now(UTC) + timedelta(seconds=0.2)},
        lambda: {"eta": (datetime.now(UTC) + timedelta(seconds=0.2)).isoformat()},
    ],
)
def test_a_delay_need_not_be_whole_seconds(running: Running, when: Callable[[], dict[str, Any]]) -> None:
    began, options = datetime.now(UTC), when()
    assert running.task("add").apply_async((1, 2), **options).get(timeout=SOON) == 3
    assert datetime.now(UTC) - began > timedelta(seconds=options.get("countdown", 0.1))


def test_a_task_is_retried_as_often_as_it_fails(running: Running, key: str) -> None:
    assert running.task("flaky").delay(key, 2).get(timeout=SOON) == 2
    assert running.count(key) == 3


def test_a_retry_waits_and_keeps_its_caller(running: Running, key: str) -> None:
    result = running.task("again").delay(key, 1)
    assert within(SOON, lambda: result.state == "RETRY")
    assert result.get(timeout=SOON) == "spiffe://everything.test/development/everything/client"
    assert running.count(key) == 2


def test_retries_end_with_the_tasks_own_error(running: Running) -> None:
    with pytest.raises(ValueError, match="still not"):
        running.task("never").delay().get(timeout=SOON)


# -- canvas -----------------------------------------------------------------------------------------------------------


class Signatures:
    """Short names for the canvas table below."""

    def __init__(self, running: Running) -> None:
        self.app = running.client
        self.add, self.total, self.echo = (running.task(name) for name in ("add", "total", "echo"))

    def group(self, *signatures: Any) -> Any:
        return group(*signatures, app=self.app)

    def chain(self, *signatures: Any) -> Any:
        return chain(*signatures, app=self.app)

    def chord(self, header: list[Any], body: Any) -> Any:
        return chord(header, body, app=self.app)


CANVAS: dict[str, tuple[Callable[[Signatures], Any], Any]] = {
    "chain": (lambda s: s.add.s(1, 2) | s.add.s(3) | s.add.s(4), 10),
    "immutable": (lambda s: s.add.s(1, 2) | s.add.si(3, 4), 7),
    "group": (lambda s: s.group([s.add.s(i, i) for i in range(5)]), [0, 2, 4, 6, 8]),
    "group of chains": (lambda s: s.group(s.chain(s.add.s(1, 1), s.add.s(1)), s.add.s(1, 2)), [3, 3]),
    "chord": (lambda s: s.chord([s.add.s(i, i) for i in range(5)], s.total.s()), 20),
    "chord of one": (lambda s: s.chord([s.add.s(1, 2)], s.total.s()), 3),
    "chord of nothing": (lambda s: s.chord([], s.total.s()), 0),
    "chord of groups": (
        lambda s: s.chord([s.group(s.add.s(1, 1), s.add.s(2, 2)), s.group(s.add.s(3, 3), s.add.s(4, 4))], s.total.s()),
        20,
    ),
    "chord of a chain that ends in a group": (
        lambda s: s.chord([s.chain(s.add.s(1, 1), s.group(s.add.s(1), s.add.s(2))), s.add.s(1, 1)], s.echo.s()),
        [[3, 4], 2],
    ),
    "chord of chords": (lambda s: s.chord([s.chord([s.add.s(1, 1)], s.total.s()), s.add.s(1, 2)], s.total.s()), 5),
    "chord into a chain": (lambda s: s.chord([s.add.s(1, 1), s.add.s(1, 2)], s.total.s() | s.add.s(1)), 6),
    "chord into a group": (lambda s: s.chord([s.add.s(1, 1)] * 2, s.group(s.total.s(), s.echo.s())), [4, [2, 2]]),
    "group in a chain": (lambda s: s.chain(s.add.si(1, 1), s.group(s.add.s(1), s.add.s(2)), s.total.s()), 7),
    "map": (lambda s: s.total.map([[1], [2, 3]]), [1, 5]),
    "starmap": (lambda s: s.add.starmap([(1, 2), (3, 4)]), [3, 7]),
    "starmap in a chain": (lambda s: s.chain(s.add.si(1, 1), s.add.starmap([(1, 2), (3, 4)])), [3, 7]),
    "chunks": (lambda s: s.add.chunks([(i, i) for i in range(6)], 2), [[0, 2], [4, 6], [8, 10]]),
}


@pytest.mark.parametrize("name", CANVAS)
def test_canvas(running: Running, name: str) -> None:
    make, expected = CANVAS[name]
    assert make(Signatures(running)).apply_async().get(timeout=SOON) == expected


def test_chunks_in_a_chain_are_sent_by_the_worker(running: Running) -> None:
    signatures = Signatures(running)
    chunks = signatures.chain(signatures.add.si(1, 1), signatures.add.chunks([(1, 1), (2, 2)], 1)).apply_async()
    (_, parts) = chunks.get(timeout=SOON)
    values = [AsyncResult(part[0][0], app=running.client).get(timeout=SOON) for part in parts]
    assert values == [[2], [4]]


def test_a_failing_header_fails_its_chord(running: Running, key: str) -> None:
    body = running.task("received").s(key).on_error(running.task("failed").s(key))
    failing = chord([running.task("add").s(1, 1), running.task("fail").s("no")], body, app=running.client)
    result = failing.apply_async()
    assert running.happens(f"{key}={result.id}")  # the error callback, with the chord's id
    with pytest.raises(ValueError, match="no"):
        result.get(timeout=SOON)
    (callbacks,) = within(SOON, lambda: result.children)
    assert len(callbacks.children) == 1  # a group of error callbacks
    assert running.count(key) == 0


def test_a_failing_header_fails_every_task_of_a_group_that_waits_for_it(running: Running) -> None:
    body = group([running.task("echo").s(), running.task("echo").s()], app=running.client)
    result = chord([running.task("fail").s("no"), running.task("add").s(1, 1)], body, app=running.client).apply_async()
    for part in result.results:
        with pytest.raises(ValueError, match="no"):
            part.get(timeout=SOON)


def test_callbacks_run_on_success_and_error_callbacks_on_failure(running: Running, key: str) -> None:
    links = {"link": running.task("received").s(key), "link_error": running.task("failed").s(key)}
    running.task("add").apply_async((1, 2), **links)
    assert running.happens(f"{key}=3")
    failing = running.task("fail").apply_async(("no",), **links)
    assert running.happens(f"{key}={failing.id}")
    assert sum(path.name.startswith(key) for path in running.effects.iterdir()) == 2


def test_a_task_is_replaced_by_another_and_by_a_group(running: Running) -> None:
    assert running.task("becomes").delay(1, 2).get(timeout=SOON) == 3
    assert (running.task("becomes").s(1, 2) | running.task("add").s(4)).apply_async().get(timeout=SOON) == 7
    assert running.task("becomes_group").delay([1, 2]).get(timeout=SOON) == [2, 3]


def test_a_signature_calls_itself_by_name(running: Running) -> None:
    result = running.client.send_task(f"{TASKS}.add", (1,), {"y": 2})
    assert result.get(timeout=SOON) == 3
    assert running.client.signature(f"{TASKS}.add", (1, 2)).apply_async().get(timeout=SOON) == 3


# -- what a message carries -------------------------------------------------------------------------------------------


def test_headers_stamps_and_priority_arrive(running: Running) -> None:
    signature = running.task("seen").s()
    signature.stamp(tenant="blue")
    seen = signature.apply_async(headers={"trace": "abc"}, priority=7).get(timeout=SOON)
    assert (seen["headers"], seen["stamps"], seen["priority"]) == ({"trace": "abc"}, {"tenant": "blue"}, 7)


def test_headers_and_stamps_are_signed(running: Running) -> None:
    signature = running.task("seen").s()
    signature.stamp(tenant="blue")
    signature.apply_async(headers={"trace": "abc"}, queue="slow")
    batch = running.caller("batch")
    with batch.connection_for_read() as connection:
        message = batch.amqp.queues["slow"].bind(connection.default_channel).get()
        message.ack()
    verified = batch.hardening.verifier.verify(envelope.Type.TASK, message.body)
    task = codec.decode(verified.payload)["task"]
    assert (task["headers"], task["stamps"]) == ({"trace": "abc"}, {"tenant": "blue"})
    assert message.headers.keys() - {"x-delivery-count"} == running.broker.headers


def test_types_that_json_has_not_arrive_and_come_back(running: Running) -> None:
    """An enum, a dataclass or a model comes back in its JSON form, all others as themselves."""
    moment, number = datetime(2026, 5, 6, 7, 8, 9, 10, tzinfo=UTC), uuid4()
    plain = [moment, moment.date(), Decimal("1.50"), number]
    parcel = Parcel(Decimal("0.10"), Colour.RED, moment)
    order = Order(id=number, due=moment.date(), parcels=[parcel])
    returned = running.task("typed").delay(order, parcel, Colour.RED, *plain).get(timeout=SOON)
    names, values = zip(*returned, strict=True)
    assert names == ("Order", "Parcel", "Colour", "datetime", "date", "Decimal", "UUID")
    assert values[3:] == tuple(plain)
    assert [type(value) for value in values[3:]] == [type(value) for value in plain]
    for value, original in zip(values, (order, parcel, Colour.RED), strict=False):
        assert TypeAdapter(type(original)).validate_python(value) == original


# -- queues and pools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_every_kind_of_pool_serves_its_queue(running: Running, pool: str) -> None:
    short, full = (running.task("seen").apply_async(queue=queue) for queue in ("slow", "everything.slow"))
    called = running.task("calls").apply_async((f"{TASKS}.add", [1, 2], "slow"))  # from one pool to the other
    with running.batch("--pool", pool) as worker:
        for seen in (short.get(timeout=SOON), full.get(timeout=SOON)):
            assert (seen["queue"], seen["host"].partition("@")[0]) == ("everything.slow", "batch")
            assert (seen["pid"] == worker.pid) == (pool != "prefork")
            assert (seen["thread"] == "MainThread") == (pool != "threads")
        assert AsyncResult(called.get(timeout=SOON), app=running.client).get(timeout=SOON) == 3
        with pytest.raises(running.broker.refused):  # its pool may send to its own queue only
            running.task("calls").apply_async((f"{TASKS}.add", [1, 2], "default"), queue="slow").get(timeout=SOON)


def test_a_pool_of_green_threads_is_refused_with_a_sentence(running: Running) -> None:
    """By its full name Celery takes it from here even where gevent is not installed."""
    with pytest.raises(StackFailed, match=r"worker_pool .* choose prefork, threads or solo \[worker.pool\]"):
        running.start("batch", "--pool", "custom", CELERY_CUSTOM_WORKER_POOL="celery.concurrency.gevent:TaskPool")


def test_a_route_sends_a_task_to_its_queue(running: Running) -> None:
    caller = running.caller("client")
    caller.conf.task_routes = {f"{TASKS}.seen": {"queue": "slow"}}
    result = running.task("seen", caller).delay()
    with running.batch():
        assert result.get(timeout=SOON)["queue"] == "everything.slow"


# -- results ----------------------------------------------------------------------------------------------------------


def stored(running: Running, result: AsyncResult) -> int:
    """Return for how many seconds more the client's result is stored, 0 if it is not."""
    return max(0, int(running.stack.redis("TTL", running.client.backend.get_key_for_task(result.id).decode())))


def test_a_result_goes_through_its_states(running: Running, key: str) -> None:
    result = running.task("held").delay(key)
    assert within(SOON, lambda: result.state == "STARTED")
    assert not result.ready()
    running.go(key)
    assert result.get(timeout=SOON) == key
    assert (result.state, result.successful()) == ("SUCCESS", True)


def test_an_error_is_raised_with_its_type_and_its_traceback(running: Running) -> None:
    result = running.task("fail").delay("broken")
    with pytest.raises(ValueError, match="broken"):
        result.get(timeout=SOON)
    assert result.failed()
    assert "raise ValueError(message)" in result.traceback
    assert isinstance(result.get(propagate=False), ValueError)
    with pytest.raises(EncodeError, match="not JSON"):
        running.task("unserializable").delay().get(timeout=SOON)


def test_an_ignored_result_is_not_stored(running: Running, key: str) -> None:
    result = running.task("effect").delay(key)
    assert running.happens(key)
    assert result.get(timeout=SOON) is None
    ignored = running.task("add").apply_async((1, 2), ignore_result=True)
    assert running.task("add").delay(1, 2).get(timeout=SOON) == 3
    for each in (result, ignored):
        assert not stored(running, each)


def test_a_result_is_forgotten(running: Running) -> None:
    result = running.task("add").delay(1, 2)
    assert result.get(timeout=SOON) == 3
    assert stored(running, result)
    result.forget()
    assert not stored(running, result)


def test_a_result_expires(running: Running) -> None:
    with running.batch(RESULT_EXPIRES="1"):
        result = running.task("add").apply_async((1, 2), queue="slow")
        assert result.get(timeout=SOON) == 3
        assert stored(running, result)
        assert within(SOON, lambda: not stored(running, result))
    kept = running.task("add").delay(1, 2)
    kept.get(timeout=SOON)
    assert 60 < stored(running, kept) <= 3600


def test_a_group_is_saved_restored_by_who_saved_it_and_deleted(running: Running) -> None:
    results = group([running.task("add").s(i, i) for i in range(3)], app=running.client).apply_async()
    results.save()
    fresh = running.caller("client")
    restored = fresh.GroupResult.restore(results.id)
    assert restored.get(timeout=SOON) == [0, 2, 4]
    assert running.caller("shop").GroupResult.restore(results.id) is None
    restored.delete()
    assert running.caller("client").GroupResult.restore(results.id) is None


def test_a_caller_can_read_results_before_and_after_they_are_there(running: Running, key: str) -> None:
    result = running.task("held").delay(key)
    other = running.caller("client").AsyncResult(result.id)
    running.go(key)
    assert other.get(timeout=SOON) == key
    assert running.caller("client").AsyncResult(result.id).get(timeout=SOON) == key


# -- errors name what happened ----------------------------------------------------------------------------------------


def shop(running: Running) -> Celery:
    """Make the caller that may send one task, to one queue."""
    return running.caller("shop")


def test_the_broker_refuses_a_queue_that_is_not_allowed(running: Running) -> None:
    with pytest.raises(running.broker.refused, match=running.broker.refused_queue):
        running.task("add", shop(running)).apply_async((1, 2), queue="slow")
    with pytest.raises(running.broker.refused):
        running.task("add", shop(running)).apply_async((1, 2), queue="slow", countdown=60)


def test_the_gate_refuses_a_task_that_is_not_allowed_and_tells_its_caller(running: Running) -> None:
    caller = shop(running)
    assert running.task("add", caller).delay(1, 2).get(timeout=SOON) == 3
    add = running.task("add", caller)
    for refused in (
        running.task("total", caller).s([1, 2]),
        add.s(1, 2) | running.task("echo", caller).s(),
        running.task("total", caller).map([[1]]),
        add.s(1, 2).set(link=running.task("add", caller).s(1).set(queue="slow")),
    ):
        result = refused.apply_async()
        while result.parent:
            result = result.parent
        with pytest.raises(errors.NotAllowed, match="client may not send this task to this queue"):
            result.get(timeout=SOON)


@pytest.mark.parametrize("arguments", [("1", 2), (1,), (1, 2, 3), (None, 2)])
def test_wrong_arguments_end_with_an_error_that_names_them(running: Running, arguments: tuple[Any, ...]) -> None:
    # Celery itself checks the number of arguments in the caller.
    with pytest.raises((errors.InvalidArguments, TypeError), match="argument"):
        running.task("add").apply_async(arguments).get(timeout=SOON)


def test_an_unknown_queue_and_an_unknown_task_are_named(running: Running) -> None:
    with pytest.raises(QueueNotFound, match="'fast' missing from task_queues"):
        running.task("add").apply_async((1, 2), queue="fast")
    with pytest.raises(errors.UnknownTask):
        running.client.send_task(f"{TASKS}.missing").get(timeout=SOON)


def test_an_oversized_message_is_refused_in_the_caller(running: Running) -> None:
    with pytest.raises(errors.TooLarge):
        running.task("echo").delay("x" * 2_000_000)
