"""The producer: every task message is signed at the moment it is published, or it is not published.

Guards against: unsigned messages, messages altered between signing and publishing by a signal receiver, and a generic
encoder that would sign whatever it is given.
Rests on: Celery publishing all task messages through ``app.amqp.send_task_message(producer, ...)``: the producer is
wrapped there, after every signal has run. Signals themselves fail open and are never used to sign.
Controls: SIG-1, SIG-3, SIG-4, INT-2.
"""

from __future__ import annotations

import re
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

from celery.utils.time import subtract_datetimes
from kombu.transport.native_delayed_delivery import MAX_NUMBER_OF_BITS_TO_USE

from . import claims, codec, intake, ownership
from .envelope import CONTENT_TYPE, Type
from .errors import ConfigurationRefused, DelayTooLong, TooLarge

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.amqp import AMQP

    from .harden import Hardening
else:
    AMQP = object  # what is mixed in stands before the application's own class

_DELAY_PREFIX = re.compile(rf"(?:[01]\.){{{MAX_NUMBER_OF_BITS_TO_USE}}}")


class TaskProducer:
    """Any kombu producer, made to sign the one task message it was made for."""

    def __init__(self, producer: Any, body: Any, hardening: Hardening) -> None:
        self._producer, self._body, self._hardening = producer, body, hardening

    def __getattr__(self, name: str) -> Any:
        """Be the wrapped producer in everything but :meth:`publish`."""
        return getattr(self._producer, name)

    def publish(self, body: Any, **options: Any) -> Any:
        """Sign and publish.

        Raises:
            kombu.exceptions.EncodeError: an argument has no JSON form.
            TooLarge, BadShape, DelayTooLong: the worker would refuse it.
            ConfigurationRefused: the message's queue is not in the topology, or nobody would accept our certificate.
            amqp.exceptions.ChannelError: the broker refuses it or cannot route it (mandatory, confirmed).
            kombu.exceptions.OperationalError: the broker cannot be reached, or does not confirm the message.
        """
        if body is not self._body:  # a task-sent event, which Celery publishes through the same producer
            return self._producer.publish(body, **options)
        headers = options.pop("headers")
        envelope = self._sign(body, headers, options)
        if len(envelope) > self._hardening.settings.message_max_bytes:
            raise TooLarge
        for unsigned in ("serializer", "compression", "reply_to", "correlation_id", "app_id", "mandatory", "immediate"):
            options.pop(unsigned, None)
        options.pop("expiration", None)  # a broker would drop the message and tell nobody; a worker tells its caller
        return self._producer.publish(
            envelope,
            **options,
            # For people who look at the queue; nobody trusts them.
            headers={"task": headers["task"], "id": headers["id"]},
            content_type=CONTENT_TYPE,
            content_encoding="utf-8",
            mandatory=True,
        )

    def _sign(self, body: Any, headers: dict[str, Any], options: dict[str, Any]) -> bytes:
        args, kwargs, embed = body
        self._hardening.settings.credentials.check()
        signer, audience = self._hardening.signer, self._hardening.audience
        now = int(time.time())
        task = claims.task_fields(headers, options)
        eta = claims.utc(task["eta"]).timestamp() if "eta" in task else now
        if eta > now + self._hardening.settings.message_max_delay:
            raise DelayTooLong
        fields = {
            "iss": str(signer.identity),
            "aud": audience,
            "iat": now,
            "exp": int(max(now, eta)) + self._hardening.settings.message_max_age,
            "jti": claims.new_id(),
            "origin": ownership.origin(signer.identity, audience, headers["id"], headers["task"]),
            "owner": ownership.owner(signer.identity, audience),
            "queue": self._queue(options.get("routing_key")),
            "task": task,
            "args": args,
            "kwargs": kwargs,
            "embed": embed,
        }
        payload = codec.encode(fields)
        claims.TaskClaims.parse(payload)  # what a gate would not take is refused here, where somebody hears of it
        return signer.sign(Type.TASK, payload)

    def _queue(self, routing_key: Any) -> str:
        queue = _DELAY_PREFIX.sub("", str(routing_key), count=1)
        if queue not in self._hardening.queues:
            reason, fix = f"there is no queue {queue!r} in the topology", "add it, then run `make topology`"
            raise ConfigurationRefused("queue", reason, fix, "queue.unknown")
        return queue


def delayed_by_seconds(app: Celery) -> Any:
    """Return ``app.send_task`` for RabbitMQ, where a delay of less than a second becomes one.

    Celery would ask for a delay of 0 seconds, and kombu raise ValueError: a retry after 0.5 s would fail its task.
    """
    send = app.send_task

    def send_task(
        name: str, args: Any = None, kwargs: Any = None, countdown: Any = None, eta: Any = None, *rest: Any, **more: Any
    ) -> Any:
        delay = countdown
        if eta:
            moment = claims.utc(eta) if isinstance(eta, str) else eta
            delay = subtract_datetimes(moment, app.now()).total_seconds()
        if delay and 0 < delay < 2:  # not 1: time goes by until Celery looks at it
            countdown, eta = max(1, delay), None
        return send(name, args, kwargs, countdown, eta, *rest, **more)

    return send_task


class SigningAMQP(AMQP):
    """Mixed into the application's AMQP class by ``harden``."""

    Connection = intake.Connection

    @cached_property
    def send_task_message(self) -> Any:
        """Celery's task sender, around a producer that signs."""
        send = self._create_task_sender()
        hardening: Hardening = self.app.hardening
        hardening.check_configuration(self.app)

        def send_signed(producer: Any, name: str, message: Any, **options: Any) -> Any:
            return send(TaskProducer(producer, message.body, hardening), name, message, **options)

        return send_signed

    def _retry_publish(self, publish: Any, *args: Any, **kwargs: Any) -> Any:
        """Celery publishes callbacks, chains and chord bodies through here: on behalf of the task that just ran."""
        with ownership.acting_for(ownership.current_request()):
            return super()._retry_publish(publish, *args, **kwargs)
