"""Workers that share a replay store, and the store, which can be away."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from ...project import consumer, envelope, gate
from ...service import MemoryStore, Service
from . import documents
from .desk import Channel, delivered


class Store(MemoryStore):
    """A store that can be away."""

    away = False

    def claim(self, name: str, worker: str, seconds: int) -> str:
        if self.away:
            raise ConnectionError
        return super().claim(name, worker, seconds)

    def renew(self, worker: str, seconds: int) -> bool:
        if self.away:
            raise ConnectionError
        return super().renew(worker, seconds)

    def lasts(self) -> float:
        """For how long it keeps the one message that it knows, in seconds."""
        (until,) = (until for name, (_, until) in self._values.items() if not name.startswith("worker:"))
        return until - time.monotonic()


class Worker:
    """A gate of its own, and what it has refused or taken."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.gate = gate.Gate(service.worker.app, service.worker.app.hardening)
        self.taken: list[Any] = []
        self.qos = SimpleNamespace(value=0)
        self.qos.increment_eventually = lambda: setattr(self.qos, "value", self.qos.value + 1)
        self.qos.decrement_eventually = lambda: setattr(self.qos, "value", self.qos.value - 1)
        self.gate.guard.connected(self.qos, set())

    def receive(self, message: Any) -> None:
        admitted = self.gate.receive(message)
        if admitted is not None:
            self.taken.append(admitted)

    def gets(self, body: bytes, delivery_info: dict[str, Any] | None = None) -> list[str]:
        """Deliver a message as RabbitMQ does; return its fate, which goes on to change."""
        channel = Channel()
        flag = {"redelivered": False} if delivery_info is None else delivery_info
        self.receive(delivered(body, channel, flag, content_type=envelope.CONTENT_TYPE))
        return channel.fate

    def look(self) -> None:
        self.gate.guard.tick(self.receive)

    def dies(self) -> None:
        self.gate.guard.end()

    def request(self) -> consumer.HardenedRequest:
        """Make a request of what it took."""
        (admitted,) = self.taken
        return consumer.HardenedRequest(
            admitted,
            app=self.service.worker.app,
            task=self.service.worker.app.tasks[documents.checksum.name],
            on_ack=admitted.ack_log_error,
            on_reject=admitted.reject_log_error,
            hostname="test",
        )
