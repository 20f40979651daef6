"""The worker's consumer, with the gate ahead of everything Celery does with a message, and the checks before it starts.

Guards against: any path from a delivered message to Celery that does not pass the gate, and a worker that starts as
root or after something undid the hardening.
Rests on: ``worker_consumer`` naming this class, and Celery taking every task message through ``create_task_handler``.
Controls: SIG-1, INT-1, AUT-6, WRK-1, VAL-1.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.utils.functional import noop
from celery.worker.consumer.consumer import Consumer
from celery.worker.request import Request

from . import audit, ownership
from .errors import ConfigurationRefused
from .gate import Gate

if TYPE_CHECKING:
    from .harden import Hardening


class HardenedRequest(Request):
    """Celery's request, whose end concerns its owner alone."""

    def maybe_expire(self) -> bool:
        """Say whether it has expired. Celery would also revoke the id, for every caller who uses it."""
        return self.expires is not None and datetime.now(UTC) > self.expires

    def on_failure(self, *args: Any, **kwargs: Any) -> Any:
        """Look up, store and retry on behalf of the request's origin; here, in the main process, no task runs."""
        with ownership.acting_for(self._context):
            return super().on_failure(*args, **kwargs)


#: Seconds in which an idle worker notices that it shall end.
LOOK_UP = 1.0


class HardenedConsumer(Consumer):
    """Celery's consumer behind the gate."""

    class Blueprint(Consumer.Blueprint):
        """Celery's steps without delayed delivery's, which declares what the operator has declared (topology.toml)."""

        default_steps = tuple(
            step for step in Consumer.Blueprint.default_steps if not step.endswith(":DelayedDelivery")
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Gossip and mingle act on unsigned messages of other workers: a malformed event raises out of the event loop,
        # a foreign reply breaks start-up. Heartbeats are events too. None of the three can be told to verify.
        super().__init__(*args, **{**kwargs, "without_gossip": True, "without_mingle": True, "without_heartbeat": True})
        self._gate = Gate(self.app, self.app.hardening)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Return Celery's handler behind the gate."""
        # The heartbeats that are off also had an idle worker look up often enough to see a signal to end.
        self.timer.call_repeatedly(LOOK_UP, noop)
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            admitted = self._gate.receive(message)
            if admitted is None:
                return
            try:
                handle(admitted)
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as error:  # what leaves this function ends the worker, and the message would come again
                self._gate.give_up(message, admitted, error)

        return on_task_received

    def update_strategies(self) -> None:
        """Give every task our request class before Celery prepares it."""
        for task in self.app.tasks.values():
            task.Request = HardenedRequest
        super().update_strategies()


class Preflight(bootsteps.Step):
    """Refuses to start a worker that would not be safe; Celery prints the sentence and exits 1."""

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        # The saved user too: with it a process can become root again. macOS does not tell it.
        users = os.getresuid() if hasattr(os, "getresuid") else (os.getuid(), os.geteuid())
        if 0 in users:
            raise ConfigurationRefused(
                "user", "a worker may not run as root", "start it as an unprivileged user", "worker.root"
            )
        hardening: Hardening = parent.app.hardening
        hardening.check(parent.app)
        if not hardening.consumed:
            raise ConfigurationRefused(
                "SECURE_CELERY_SECURITY_CERTIFICATE",
                f"{hardening.signer.identity} is no worker pool of the topology",
                "start the worker with a pool's certificate",
                "worker.identity",
            )
        queues = parent.app.amqp.queues
        queues.select([name for name in queues.consume_from if name in hardening.consumed])
        audit.record(audit.Event.STARTED, signer=hardening.signer.identity)
        super().__init__(parent, **kwargs)
