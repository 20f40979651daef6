"""The two real servers of the TLS tests: their certificates, right and wrong, and the ways to reach them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from stack import Stack
from stack.pki import Pair

from ...project import Settings, hardening, tls
from .relay import Relay

#: What a refused connection raises, by RabbitMQ's and by Redis' driver.
REFUSED = (OperationalError, redis.ConnectionError)
PROTOCOLS = ("amqp", "redis")
#: What is wrong with a server's certificate, and what a person reads then.
REASONS = {
    "foreign": "unable to get local issuer certificate|self-signed certificate in certificate chain",
    "wrong-host": r"IP address mismatch, certificate is not valid for '127\.0\.0\.1'",
    "expired": "certificate has expired",
    "future": "certificate is not yet valid",
}


@dataclass(frozen=True)
class Reached:
    """A TLS connection that was made: its version, and what the client demanded."""

    version: str
    context: ssl.SSLContext


class Servers:
    """RabbitMQ and Redis of a stack, as the role `client` sees them."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.ca = stack.pki.tls.certificate
        own = {
            name.removeprefix("SECURE_CELERY_").lower(): value for name, value in stack.environment("client").items()
        }
        self.settings = own
        self.client = Pair(Path(own["tls_certificate"]), Path(own["tls_key"]))
        self.account = str(stack.topology.account("client"))
        self.password = Path(own["result_backend_password_file"]).read_text(encoding="utf-8").strip()
        self.ports = {
            "amqp": urlsplit(own["broker_url"]).port or 0,
            "redis": urlsplit(own["result_backend"]).port or 0,
        }

    @cached_property
    def certificates(self) -> dict[str, Pair]:
        """Server certificates, by what is wrong with them."""
        now, day = datetime.now(UTC), timedelta(days=1)
        issue = self.stack.pki.tls.server
        return {
            "right": issue("right", ("127.0.0.1",)),
            "foreign": self.stack.pki.authority("foreign").server("foreign", ("127.0.0.1",)),
            "wrong-host": issue("wrong-host", ("other.example", "127.0.0.2")),
            "expired": issue("expired", ("127.0.0.1",), (now - 2 * day, now - day)),
            "future": issue("future", ("127.0.0.1",), (now + day, now + 2 * day)),
        }

    @property
    def built(self) -> tls.TLS:
        """What the builder makes of the client's files."""
        return tls.TLS(self.ca, self.client.certificate, self.client.key)

    def relay(self, protocol: str, server: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> Relay:
        """Put a relay in front of a server."""
        return Relay(self.ports[protocol], self.client, server, host)

    def address(self, protocol: str, port: int, host: str = "127.0.0.1") -> str:
        """Return an address as this project's settings have it."""
        if protocol == "amqp":
            return f"amqps://{host}:{port}/{self.stack.topology.vhost}"
        return f"rediss://{self.account}@{host}:{port}/0"

    def with_password(self, port: int, scheme: str = "rediss") -> str:
        """Return a Redis address as Celery's own settings have it."""
        return f"{scheme}://{self.account}:{quote(self.password, safe='')}@127.0.0.1:{port}/0"

    def hardened(self, **values: Any) -> Celery:
        """Make a hardened application; ``values`` replace what the client's environment file says."""
        app = Celery("client", set_as_current=False)
        hardening.harden(app, Settings(**{**self.settings, **values}))
        return app

    def ours(self, protocol: str, port: int, **values: Any) -> Reached:
        """Connect to this port with this project's settings."""
        setting = {"amqp": "broker_url", "redis": "result_backend"}[protocol]
        app = self.hardened(**{setting: self.address(protocol, port), **values})
        return reach(app.connection_for_write()) if protocol == "amqp" else ping(app)


def reach(connection: Any) -> Reached:
    """Connect to a broker, without the pauses between attempts."""
    with connection:
        connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
        protected = connection.connection.transport.sock
        return Reached(protected.version(), protected.context)


def ping(app: Celery) -> Reached:
    """Connect to the result backend."""
    app.backend.client.ping()
    protected = app.backend.client.connection_pool.get_connection()._sock
    return Reached(protected.version(), protected.context)
