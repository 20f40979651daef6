"""The service in one process: real signing, real gate, real tracer, over kombu's in-memory transport.

For tests alone: the settings class that allows ``memory://`` is here, and no environment variable can choose it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from celery import Celery
from celery.backends.cache import _DUMMY_CLIENT_CACHE
from kombu import Exchange, Queue

from stack.pki import Pki

from . import ROOT, SELF
from .project import Settings, codec, consumer, envelope, gate, hardening, identity, intake, replay

ENVIRONMENT = "development"


class MemoryStore:
    """A replay store of one process."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[str, float]] = {}

    def _get(self, name: str) -> str | None:
        value, until = self._values.get(name, (None, 0.0))
        return value if time.monotonic() < until else None

    def _set(self, name: str, value: str, seconds: float) -> None:
        self._values[name] = value, time.monotonic() + seconds

    def claim(self, name: str, worker: str, seconds: int) -> str:
        """See ``ReplayStore``."""
        holder = self._get(name)
        if holder == replay.DONE:
            return replay.DONE
        if holder not in {None, worker} and self.alive(str(holder)):
            return replay.HELD
        self._set(name, worker, seconds)
        return replay.OURS

    def done(self, name: str, seconds: int) -> None:
        """See ``ReplayStore``."""
        self._set(name, replay.DONE, seconds)

    def release(self, name: str, worker: str) -> None:
        """See ``ReplayStore``."""
        if self._get(name) == worker:
            del self._values[name]

    def alive(self, worker: str) -> bool:
        """Whether a worker's lease holds."""
        return self._get(replay.WORKER + worker) is not None

    def renew(self, worker: str, seconds: int) -> bool:
        """See ``ReplayStore``."""
        alive = self.alive(worker)
        self._set(replay.WORKER + worker, worker, seconds)
        return alive


class MemorySettings(Settings):
    """Settings that allow the in-memory transport."""

    broker_schemes: ClassVar[frozenset[str]] = frozenset({"memory"})
    result_schemes: ClassVar[frozenset[str]] = frozenset({"cache+memory"})

    @property
    def result_backend_address(self) -> str:
        """Need no password."""
        return self.result_backend

    def open_replay_store(self, prefix: str) -> replay.ReplayStore:
        """Need no server."""
        return MemoryStore()


@dataclass(frozen=True)
class Party:
    """One signer with its own hardened application."""

    app: Celery
    identity: identity.Identity

    @property
    def signer(self) -> envelope.Signer:
        """Its signing key, for tests that make envelopes by hand."""
        signer: envelope.Signer = self.app.hardening.signer
        return signer


class Service:
    """A client and a worker that share queues, results and trust."""

    def __init__(self, folder: Path, topology: Path = ROOT / "topology.toml", **settings: Any) -> None:
        self.pki = Pki(folder / "pki", SELF)
        self._topology = topology
        self._settings = settings
        self.client = self.party("client")
        self.worker = self.party("worker")
        self.rules = self.worker.app.hardening.topology
        self.worker.app.hardening.check(self.worker.app)  # as a worker does before it starts
        _DUMMY_CLIENT_CACHE.clear()
        self.gate = gate.Gate(self.worker.app, self.worker.app.hardening)
        intake.MemoryTransport.global_state.clear()
        self._channel = self.worker.app.connection_for_read().channel()
        self._channel.queues.clear()
        names = dict.fromkeys((queue.broker_name for queue in self.rules.queues), self.rules.exchange)
        names |= {name: name for name in (self.rules.quarantine, self.rules.dead)}
        self._queues = {
            name: Queue(name, Exchange(exchange, type="topic"), routing_key=name)(self._channel)
            for name, exchange in names.items()
        }
        for queue in self._queues.values():
            queue.declare()

    def party(self, role: str, application: str | None = None, environment: str = ENVIRONMENT) -> Party:
        """Return a new signer; another application or environment makes a foreign one."""
        rules = hardening.topology.Topology.load(self._topology)
        domain = rules.trust_domain or f"{rules.application}.test"
        uri = f"spiffe://{domain}/{environment}/{application or rules.application}/{role}"
        name = uri.removeprefix("spiffe://").replace("/", "-")
        signing, tls = self.pki.signing.signer(name, uri), self.pki.tls.client(name)
        settings = MemorySettings(
            **{
                "broker_url": "memory://localhost",
                "result_backend": "cache+memory://localhost",
                "result_backend_password_file": tls.key,
                "topology": self._topology,
                "tls_ca": self.pki.tls.certificate,
                "tls_certificate": tls.certificate,
                "tls_key": tls.key,
                "security_key": signing.key,
                "security_certificate": signing.certificate,
                "security_cert_store": self.pki.store,
                **self._settings,
            }
        )
        app = Celery(role, set_as_current=False)
        hardening.harden(app, settings)
        return Party(app, identity.Identity.parse(uri))

    def send(self, task: Any, *args: Any, party: Party | None = None, **kwargs: Any) -> Any:
        """Send a task as a caller does; return its ``AsyncResult``."""
        return (party or self.client).app.tasks[task.name].delay(*args, **kwargs)

    def deliveries(self, queue: str | None = None) -> Iterator[Any]:
        """Take what lies in a queue (the first one of the topology, if none is named)."""
        source = self._queues[queue or self.rules.queues[0].broker_name]
        while (message := source.get()) is not None:
            yield message

    def work(self) -> int:
        """Let the worker take and run all that lies in its queue; return how many messages it admitted."""
        return sum(self.receive(message) for message in self.deliveries())

    def receive(self, message: Any) -> bool:
        """Give one delivered message to the worker's gate and, if admitted, to Celery's own request and tracer."""
        admitted = self.gate.receive(message)
        if admitted is None:
            return False
        app = self.worker.app
        consumer.HardenedRequest(
            admitted,
            app=app,
            task=app.tasks[admitted.headers["task"]],
            on_ack=admitted.ack_log_error,
            on_reject=admitted.reject_log_error,
            hostname="test",
        ).execute()
        return True

    def publish(self, body: bytes | str, queue: str | None = None, **options: Any) -> None:
        """Publish raw bytes, as whoever can write to the broker may."""
        name = queue or self.rules.queues[0].broker_name
        with self.worker.app.connection_for_write() as connection, connection.Producer() as producer:
            producer.publish(
                body,
                **{
                    "exchange": self.rules.exchange,
                    "routing_key": name,
                    "content_type": envelope.CONTENT_TYPE,
                    "content_encoding": "utf-8",
                    **options,
                },
            )

    def quarantined(self) -> list[dict[str, Any]]:
        """Take what lies in the quarantine: the verified records."""
        verifier = self.worker.app.hardening.verifier
        records = []
        for message in self.deliveries(self.rules.quarantine):
            verified = verifier.verify(envelope.Type.QUARANTINE, message.body)
            records.append(codec.decode(verified.payload))
            message.ack()
        return records
