"""What the tests of everything that Celery can do have to know of the broker that carries it, in one place.

Differences that are no defect, with their reason, are listed in the project's ``deploy/redis/broker.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from amqp.exceptions import AccessRefused
from kombu.exceptions import OperationalError

from stack import Stack

from ...project import topology

ROOT = Path(__file__).parents[3]
#: The broker of the baked project.
NAME = topology.Topology.load(ROOT / "topology.toml").broker


class RabbitMQ:
    """Expectations and levers of RabbitMQ."""

    server = "rabbitmq"
    #: Who keeps a message until its time has come.
    keeps_delayed = True
    #: What is raised where the account may not send, and what it says.
    refused: type[Exception] = AccessRefused
    refused_queue = r"everything\.slow"
    #: Unsigned headers that reach a consumer, which believes none of them.
    headers = frozenset({"task", "id"})
    no_memory = "not confirmed"

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def length(self, queue: str) -> int:
        """Return how many messages a queue holds, delivered ones included."""
        lines = self.stack.rabbitmqctl("list_queues", "-p", "everything", "name", "messages", "--no-table-headers")
        return {name: int(count) for name, count in map(str.split, lines.splitlines())}[f"everything.{queue}"]

    def waiting(self, queue: str) -> int:
        """Return how many messages of a queue are not delivered yet."""
        lines = self.stack.rabbitmqctl(
            "list_queues", "-p", "everything", "name", "messages_ready", "--no-table-headers"
        )
        return {name: int(count) for name, count in map(str.split, lines.splitlines())}[f"everything.{queue}"]

    @contextmanager
    def short_of_memory(self) -> Iterator[None]:
        self.stack.rabbitmqctl("set_vm_memory_high_watermark", "0.00001")
        try:
            yield
        finally:
            self.stack.rabbitmqctl("set_vm_memory_high_watermark", "0.4")

    def disconnect(self, account: str) -> None:
        """Cut off an account; here, everybody."""
        self.stack.rabbitmqctl("close_all_connections", "--vhost", "everything", f"of {account}")

    def sees_certificate(self, ends: datetime) -> bool:
        """Whether a client is connected whose certificate ends then."""
        return f"{ends:%Y-%m-%dT%H:%M:%S}" in self.stack.rabbitmqctl("list_connections", "user", "peer_cert_validity")


class Redis:
    """Expectations and levers of Redis."""

    server = "redis-broker"
    keeps_delayed = False
    refused: type[Exception] = OperationalError
    refused_queue = "no permissions"
    headers: frozenset[str] = frozenset()
    no_memory = "command not allowed when used memory"

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def length(self, queue: str) -> int:
        """Return how many messages a queue holds; those that a worker holds are elsewhere."""
        return int(self.stack.redis_broker("LLEN", f"everything.{queue}"))

    waiting = length

    @contextmanager
    def short_of_memory(self) -> Iterator[None]:
        _, _, limit = self.stack.redis_broker("CONFIG", "GET", "maxmemory").partition("\n")
        self.stack.redis_broker("CONFIG", "SET", "maxmemory", "1")
        try:
            yield
        finally:
            self.stack.redis_broker("CONFIG", "SET", "maxmemory", limit)

    def disconnect(self, account: str) -> None:
        """Cut off an account."""
        self.stack.redis_broker("CLIENT", "KILL", "USER", f"everything.{account}")

    def sees_certificate(self, ends: datetime) -> bool:
        """Whether somebody of that name is connected: Redis does not tell of certificates."""
        return bool(re.search(r"user=everything\.client\b", self.stack.redis_broker("CLIENT", "LIST")))


def of(stack: Stack) -> RabbitMQ | Redis:
    """Return what to expect of a stack's broker."""
    return {"rabbitmq": RabbitMQ, "redis": Redis}[stack.topology.broker](stack)
