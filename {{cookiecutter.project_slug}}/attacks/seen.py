"""Attacks by someone who may publish to the queue and has seen an honest message, but holds no key.

A backup of the broker, a mirrored queue, a debugging session, an error report: messages are seen. What was signed once
must mean what its signer meant: this task, these arguments, this id, this queue, this application, now.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import cast

from .attack import REDIS, RESULT_SEEN, SEEN, BrokenAttack, attack
from .target import Target, within
from .wire import Message, Redis

REFUND = "attacks.refund"


def states(target: Target, messages: Iterable[Message]) -> set[str]:
    """What the callers are told."""
    return {target.state(message.task_id) for message in messages}


@attack("F1", "Have a signed payment run as a refund", control="SIG-3", assumes=SEEN)
def other_task(target: Target) -> str | None:
    for message in target.retold("attacks.pay", 5, task=REFUND):
        target.inject(message)
    target.settle()
    return "the captured payment ran as a refund" if target.ran("refund") else None


@attack("F2", "Have the result stored under another id", control="SIG-3", assumes=SEEN)
def other_id(target: Target) -> str | None:
    for message in target.retold("attacks.pay", 5, id="chosen-by-the-attacker"):
        target.inject(message)
    target.settle()
    state = target.state("chosen-by-the-attacker")
    return f"the attacker's id has the state {state}" if state != "PENDING" else None


@attack("F3", "Have one payment made three times", control="SIG-5", assumes=SEEN)
def replay(target: Target) -> str | None:
    message = target.capture("attacks.pay", 5)
    for _ in range(3):
        target.inject(message)
    target.settle()
    times = len(target.ran("pay"))
    return f"one payment was made {times} times" if times > 1 else None


@attack("F15", "Rename a message of Celery's old protocol", control="SIG-3", assumes=SEEN)
def protocol_1(target: Target) -> str | None:
    for message in target.protocol_1("attacks.pay", 5, told=REFUND):
        target.inject(message)
    target.settle()
    return "the captured payment ran as a refund" if target.ran("refund") else None


@attack("X7", "Have a task killed by a time limit", control="SIG-3", assumes=SEEN)
def cut_short(target: Target) -> str | None:
    told = list(target.retold("attacks.work", 1.0, timelimit=[0.3, 0.2]))
    for message in told:
        target.inject(message)
    target.settle()
    return "the task was killed half-way" if "FAILURE" in states(target, told) else None


@attack("X8", "Have a task dropped as expired", control="SIG-3", assumes=SEEN)
def made_to_expire(target: Target) -> str | None:
    told = list(target.retold("attacks.pay", 5, expires="2001-01-01T00:00:00+00:00"))
    for message in told:
        target.inject(message)
    target.settle()
    return "the payment was dropped" if "REVOKED" in states(target, told) else None


@attack("X9", "Have a task put off till tomorrow", control="SIG-3", assumes=SEEN)
def put_off(target: Target) -> str | None:
    tomorrow = datetime.now(UTC) + timedelta(hours=20)
    for message in target.retold("attacks.pay", 5, eta=tomorrow.isoformat()):
        target.inject(message)
    return "the worker sits on the payment till tomorrow" if target.lost() else None


@attack("X10", "Keep a result from its caller", control="SIG-3", assumes=SEEN)
def no_result(target: Target) -> str | None:
    message = next(target.retold("attacks.pay", 5, ignore_result=True))
    target.inject(message)
    target.settle()
    state = target.state(message.task_id)
    return "the payment was made and its caller waits for ever" if target.ran("pay") and state == "PENDING" else None


@attack("X11", "Move a message to another queue", control="SIG-3", assumes=SEEN)
def other_queue(target: Target) -> str | None:
    here = target.capture("attacks.pay", 5)
    message = target.capture("attacks.pay", 5, queue=target.other_queue)
    target.inject(replace(message, exchange=here.exchange, routing_key=here.routing_key))
    target.settle()
    return "the workers of another queue made the payment" if target.ran("pay") else None


@attack("X12", "Deliver a message meant for elsewhere", control="SIG-4", assumes=SEEN)
def other_environment(target: Target) -> str | None:
    """On ours its signer is genuine, of the same CA, and of another environment or application."""
    for message in target.from_elsewhere("attacks.pay", 5):
        target.inject(message)
    target.settle()
    return "a payment was made that was meant for elsewhere" if target.ran("pay") else None


@attack("X13", "Deliver a message that is out of date", control="SIG-4", assumes=SEEN)
def stale(target: Target) -> str | None:
    target.inject(target.outdated("attacks.pay", 5))
    target.settle()
    return "an outdated payment was made" if target.ran("pay") else None


@attack("X19", "Stop the fleet: a signed result for a task", control="INT-2", assumes=RESULT_SEEN)
def result_for_task(target: Target) -> str | None:
    """Whatever a worker has signed is signed; what it was for must be part of it."""
    result = target.app.tasks["attacks.pay"].delay(5)
    value = within(5.0, lambda: target.results.get(target.result_key(result.id)))
    target.inject(target.capture("attacks.pay", 5).with_body(value))
    return target.outage()


# -- on Redis, where what the broker says of a message is part of the message -----------------------------------------


@attack("F20.1", "Have a retry sent where one likes", control="SIG-3", assumes=SEEN, only=REDIS)
def readdressed(target: Target) -> str | None:
    """A worker sends a retry to where it was told the message came from; signed with its own key."""
    target.observer.purge(target.other_queue)
    message = target.capture("attacks.flaky", "order")
    here = {"exchange": "", "routing_key": target.other_queue}
    target.inject(message.with_properties(delivery_info=here))
    target.settle()
    stolen = target.observer.drain(target.other_queue)
    return "the worker sent its retry to the attacker's queue" if stolen else None


@attack("F20.2", "Have a payment skipped as made already", control="SIG-3", assumes=SEEN, only=REDIS)
def called_a_repeat(target: Target) -> str | None:
    """A careful task looks whether it is being delivered again."""
    message = target.capture("attacks.pay_once", 5)
    told = {"exchange": "", "routing_key": target.queue, "redelivered": True}
    target.inject(message.with_headers(redelivered=True).with_properties(delivery_info=told, redelivered=True))
    target.settle()
    return "the payment was skipped, for the message says that it came before" if target.ran("skipped") else None


@attack("F20.3", "Lose another's message with its worker", control="INT-1", assumes=SEEN, only=REDIS)
def chosen_tag(target: Target) -> str | None:
    """Two messages of one tag: to be done with one is to be done with both. Then the worker is killed."""
    wire = cast("Redis", target.observer)
    victim = target.capture("attacks.pay", 7, countdown=60)
    target.attacker.publish(victim)  # by its honest sender
    if not within(5.0, lambda: wire.holds(victim)):
        raise BrokenAttack("the worker does not hold the victim's message")
    for tag in (victim.properties["delivery_tag"], *wire.tags()):
        target.inject(next(target.unsigned("attacks.pay", 1)).with_properties(delivery_tag=tag))
    target.settle()
    target.worker.process.kill()
    held = wire.holds(victim)
    target.restart()
    return None if held else "the worker was killed, and nothing knows of the payment that it had taken"
