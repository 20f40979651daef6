"""Attacks on what is no task: remote control, its replies, and the events that workers and monitors believe.

Most of them assume all rights at the broker, which stock's one account has. What a worker does not listen to cannot
hurt it, whoever says it.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import Event, Thread
from typing import Any

from kombu import Connection, Consumer, Exchange, Producer, Queue

from stack import StackFailed

from .attack import ANYWHERE, ANYWHERE_AND_SIGNER, ANYWHERE_AND_WORKER_KEY, PUBLISH, BrokenAttack, attack
from .target import Target, within

SHUTDOWN: dict[str, Any] = {"method": "shutdown", "arguments": {}, "destination": None}


def tell(connection: Connection, exchange: Exchange, body: Any, key: str = "", serializer: str = "json") -> None:
    """Publish what is no task. Raises what the broker refuses with."""
    with Producer(connection.channel()) as producer:
        producer.publish(body, exchange=exchange, declare=[exchange], routing_key=key, serializer=serializer)


def events(target: Target, connection: Connection) -> Exchange:
    """Where the application's events go."""
    return target.app.events.Receiver(connection.channel()).exchange


def listened(connection: Connection, seconds: float = 0.2) -> None:
    """Take in what a connection's consumers are sent, until nothing comes for a while."""
    with suppress(TimeoutError):
        while True:
            connection.drain_events(timeout=seconds)


@attack("F12", "Show a monitor a task that never was", control="SIG-1", assumes=PUBLISH)
def forged_event(target: Target) -> str | None:
    """What Flower does: `EventReceiver` takes JSON beside what is signed, and `State` makes a task of it."""
    state, task = target.app.events.State(), str(uuid.uuid4())
    event = {"type": "task-received", "uuid": task, "name": "attacks.wipe", "hostname": "worker@nowhere", "pid": 1}
    event |= {"timestamp": 1.0, "local_received": 1.0, "utcoffset": 0, "clock": 1, "args": "[]", "kwargs": "{}"}
    with target.observer.connection(target.app.amqp.Connection) as connection, target.attacker.connection() as attacker:
        receiver = target.app.events.Receiver(connection.channel(), handlers={"*": state.event})
        [consumer] = receiver.get_consumers(partial(Consumer, receiver.channel), receiver.channel)
        with consumer:
            listened(connection)  # until it is subscribed
            try:
                tell(attacker, events(target, attacker), event, "task.received")
            except target.refusals:
                target.forbidden += 1
            listened(connection, 1.0)
    shown = state.tasks.get(task)
    return f"the monitor shows a task {shown.name} that nobody sent" if shown else None


@attack("F13.1", "Stop the fleet: an event that is a list", control="INT-1", assumes=ANYWHERE)
def malformed_event(target: Target) -> str | None:
    """Gossip has each worker read the events of all others."""
    with target.observer.connection() as connection:
        tell(connection, events(target, connection), [1], "worker.heartbeat")
    within(1.0, lambda: not target.worker.alive())
    return target.outage()


@attack("F13.2", "Stop the fleet: an election between 1 and A", control="INT-1", assumes=ANYWHERE)
def malformed_election(target: Target) -> str | None:
    """Who leads is decided by comparing what anybody may say."""
    vote = {"type": "worker-elect", "id": "1", "hostname": "x", "pid": 1, "topic": "task", "action": {}, "cver": 1}
    with target.observer.connection() as connection:
        for clock in (1, "A"):
            tell(connection, events(target, connection), {**vote, "clock": clock}, "worker.elect")
    within(1.0, lambda: not target.worker.alive())
    return target.outage()


@contextmanager
def answering(target: Target) -> Iterator[list[str]]:
    """Overhear what workers are asked by remote control, and answer in a format that nobody accepts."""
    answered: list[str] = []
    ready, done = Event(), Event()

    def answer(message: Any) -> None:
        body = message.body if isinstance(message.body, bytes) else message.body.encode()
        with suppress(ValueError):  # stock signs it, and hides nothing
            body = base64.b64decode(body, validate=True).rpartition(b"\x00\x01")[2]
        reply_to = json.loads(body).get("reply_to")
        if reply_to:
            with Producer(message.channel.connection.client.channel()) as producer:
                producer.publish(
                    b"x", content_type="application/x-klingon", content_encoding="binary", headers={}, **reply_to
                )
            answered.append(reply_to["routing_key"])

    def overhear() -> None:
        with target.observer.connection() as connection:
            commands = target.app.control.mailbox.exchange
            queue = Queue(f"attacker-{uuid.uuid4()}", commands, durable=False, auto_delete=True)
            with Consumer(connection.channel(), [queue], on_message=answer, no_ack=True):
                listened(connection)
                ready.set()
                while not done.is_set():
                    listened(connection, 0.05)

    thread = Thread(target=overhear, daemon=True)
    thread.start()
    ready.wait(5)
    try:
        yield answered
    finally:
        done.set()
        thread.join(5)


@attack("F14", "Keep workers from starting: a false reply", control="INT-1", assumes=ANYWHERE)
def foreign_reply(target: Target) -> str | None:
    """A worker that starts asks its neighbours how they are, and believes whoever answers (mingle)."""
    with answering(target) as answered:
        try:
            target.start_worker(f"second-{target.name}").stop()
        except StackFailed as error:
            if answered:
                return "an answer in an unknown format ended the worker that had asked"
            raise BrokenAttack("a worker does not start, and nobody answered it") from error
    return None


@attack("F16", "Shut the worker down by remote control", control="AUT-4", assumes=ANYWHERE_AND_SIGNER)
def shutdown(target: Target) -> str | None:
    """Signed by the client: with its own account, then with all rights."""
    try:
        target.app.control.broadcast("shutdown")
    except target.refusals:
        target.forbidden += 1
    with target.observer.connection() as connection:
        tell(connection, target.app.control.mailbox.exchange, SHUTDOWN, serializer=target.app.conf.task_serializer)
    within(1.0, lambda: not target.worker.alive())
    return target.outage()


@attack("X26", "Revoke a payment with a worker's key", control="AUT-4", assumes=ANYWHERE_AND_WORKER_KEY)
def revoked_by_worker(target: Target) -> str | None:
    """Workers answer commands. To give one is not theirs."""
    victim = target.capture("attacks.pay", 7)
    target.give("reporter", "revoke", task_id=[victim.task_id])
    target.inject(victim)
    target.settle()
    return None if target.ran("pay") else "the client's payment was dropped"
