"""The worker's consumer, with the gate ahead of everything Celery does with a message, and the checks before it starts.

Guards against: any path from a delivered message to Celery that does not pass the gate, and a worker that starts as
root or after something undid the hardening.
Rests on: ``worker_consumer`` naming this class, and Celery taking every task message through ``create_task_handler``.
Controls: SIG-1, SIG-5, INT-1, AUT-6, WRK-1, WRK-5, VAL-1.
"""

from __future__ import annotations

import os
from collections.abc import Container
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from celery import bootsteps, signals
from celery.concurrency import prefork, solo, thread
from celery.worker import state
from celery.worker.consumer.consumer import Consumer
from celery.worker.request import Request

from . import audit, heartbeat, ownership
from .errors import ConfigurationRefused
from .gate import Gate
from .identity import Role
from .limits import limit_process

if TYPE_CHECKING:
    from .harden import Hardening


class HardenedRequest(Request):
    """Celery's request, whose end concerns its owner alone."""

    _already_revoked: bool

    def maybe_expire(self) -> bool:
        """Say whether it has expired. Celery would also revoke the id, for every caller who uses it."""
        return self.expires is not None and datetime.now(UTC) > self.expires

    def revoked(self) -> bool:
        """Say whether it may not start any more, after it has waited: for its time, a rate limit or a free process."""
        if not self._already_revoked and not self.message.still_trusted():
            self.message.claim.settle(again=True)  # it has not run, and may be released
            self._already_revoked = True
            state.task_ready(self)
        if super().revoked():
            return True
        if self.message.claim.holds():
            return False
        state.task_ready(self)
        return True

    def info(self, safe: bool = True) -> Any:
        """Describe it to remote control, without its arguments."""
        return super().info(safe=True)

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """Look up, store and retry on behalf of the request's origin; here, in the main process, no task runs."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, MemoryError):  # the task's; Celery would take it for its own and end the worker
            exc_info.exception = RuntimeError(repr(error))
        with ownership.acting_for(self._context):
            done = super().on_failure(exc_info, *args, **kwargs)
        if not self.acknowledged:  # it was cancelled with its connection, and is delivered again
            self.message.claim.settle(again=True)
        return done


#: Kinds of pool in which tasks are known to keep apart. Green threads change the socket, TLS and context of everything.
_POOLS = (prefork.TaskPool, thread.TaskPool, solo.TaskPool)

#: Seconds in which an idle worker notices that it shall end; the replay guard looks up as often.
LOOK_UP = 1.0


class HardenedConsumer(Consumer):
    """Celery's consumer behind the gate."""

    class Blueprint(Consumer.Blueprint):
        """Celery's steps without delayed delivery's, which declares what the operator has declared (topology.toml)."""

        default_steps = tuple(step for step in Consumer.Blueprint.default_steps if "DelayedDelivery" not in step)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Gossip and mingle let workers tell each other what to do and what is revoked, which is not theirs to say.
        # Heartbeats are events, and come with the others (`worker_send_task_events`, `-E`).
        quiet = kwargs.get("without_heartbeat") or not kwargs.get("task_events")
        kwargs |= {"without_gossip": True, "without_mingle": True, "without_heartbeat": quiet}
        super().__init__(*args, **kwargs)
        self._gate = Gate(self.app, self.app.hardening)
        self._look_up: Any = None

    def connect(self) -> Any:
        """Connect, and make what messages go through where no operator has (``broker_topology``)."""
        connection = super().connect()
        self.app.hardening.broker.declare(connection)
        return connection

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Return Celery's handler behind the gate."""
        handle, guard = super().create_task_handler(*args, **kwargs), self._gate.guard

        def on_task_received(message: Any) -> None:
            if (admitted := self._gate.receive(message)) is None:
                return
            try:
                handle(admitted)
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as error:  # what leaves this function ends the worker, and the message would come again
                self._gate.give_up(message, admitted, error)

        def look_up() -> None:
            heartbeat.beat(self.app.hardening.settings.heartbeat_file)
            guard.tick(on_task_received if self.blueprint.state == bootsteps.RUN else None)

        if self._look_up is not None:
            self.timer.cancel(self._look_up)
        guard.connected(self.qos, {request.message.claim for request in state.active_requests})
        # The heartbeats that are off also had an idle worker look up often enough to see a signal to end.
        self._look_up = self.timer.call_repeatedly(LOOK_UP, look_up)
        return on_task_received

    def on_close(self) -> None:
        """Drop what has not started: the connection is lost, or the worker ends. The event loop rests from here on."""
        heartbeat.pause(self.app.hardening.settings.heartbeat_file)
        super().on_close()

    def shutdown(self) -> None:
        """Leave to others what was delivered here and never ran."""
        super().shutdown()
        self._gate.guard.end()

    def update_strategies(self) -> None:
        """Give every task our request class before Celery prepares it."""
        for task in self.app.tasks.values():
            task.Request = HardenedRequest
        super().update_strategies()


def preflight(app: Any, role: Role, accounts: Container[str]) -> Hardening:
    """Return what ``harden`` made of the application, if it is safe to start this process in that role.

    Raises:
        ConfigurationRefused: as root, with a changed configuration, or as somebody else.
    """
    # The saved user too: with it a process can become root again. macOS does not tell it.
    users = os.getresuid() if hasattr(os, "getresuid") else (os.getuid(), os.geteuid())
    if 0 in users:
        reason = f"{role} may not run as root"
        raise ConfigurationRefused("user", reason, "start it as an unprivileged user", "worker.root")
    hardening: Hardening = app.hardening
    if (file := hardening.settings.heartbeat_file) is not None:
        try:
            file.touch()
            heartbeat.pause(file)
        except OSError as error:
            reason = f"{file} cannot be written ({error.strerror})"
            fix = "name a file in a folder that this process may write to"
            raise ConfigurationRefused("SECURE_CELERY_HEARTBEAT_FILE", reason, fix, "config.file") from None
    hardening.check(app)
    identity = hardening.signer.identity
    if identity.role is not role or identity.audience != hardening.audience or identity.account not in accounts:
        reason, fix = f"{identity} is no {role} of the topology", f"start it with the certificate of a {role}"
        raise ConfigurationRefused("SECURE_CELERY_SECURITY_CERTIFICATE", reason, fix, "worker.identity")
    return hardening


class Preflight(bootsteps.Step):
    """Refuses to start a worker that would not be safe; Celery prints the sentence and exits 1."""

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        hardening = preflight(parent.app, Role.WORKER, parent.app.hardening.topology.pools)
        if not issubclass(parent.pool_cls, _POOLS):
            reason = f"{parent.pool_cls.__module__} is a kind of pool that this layer was not made for"
            fix = "choose prefork, threads or solo"
            raise ConfigurationRefused("worker_pool (--pool)", reason, fix, "worker.pool")
        if kwargs.get("beat"):
            reason, fix = "a worker may not send in beat's name", "start `celery beat` by itself"
            raise ConfigurationRefused("--beat", reason, fix, "worker.identity")
        queues = parent.app.amqp.queues
        queues.select([name for name in queues.consume_from if name in hardening.consumed])
        signals.worker_process_init.connect(lambda **_: limit_process(parent.app), weak=False)
        audit.record(audit.Event.STARTED, signer=hardening.signer.identity)
        hardening.tell_weakenings()
        super().__init__(parent, **kwargs)
