"""Orders and billing on one broker and one result backend, and a caller's hands: what the tests of two services share.

Each has a signing CA of its own. ``account`` and ``signer`` are chosen apart, to take one of two controls away.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from celery import Celery

from stack import Stack
from stack.account import own_folder, write_own
from stack.pki import Authority, Pair

from ...project import Settings, codec, envelope, hardening, render, topology
from ...project import settings as reading
from ...service import ROOT
from . import brokers
from .everything import within
from .running import SOON

APPS = f"{__package__}.two_services"
CHARGE, REFUND = "billing.tasks.charge", "billing.tasks.refund"
WORKER, CLIENT = (f"spiffe://orders.test/development/orders/{role}" for role in ("worker", "client"))
OF_BILLING = "spiffe://billing.test/development/billing"
ORDERS_TOML = """
application = "orders"
broker = "rabbitmq"
[queues.default]
[pools.worker]
queues = ["default"]
sends = ["orders.tasks.*"]
[callers.client]
queues = ["default"]
sends = ["orders.tasks.*"]
[callers.operator]
queues = ["default"]
sends = ["orders.tasks.*"]
"""
BILLING_TOML = """
application = "billing"
trust_domain = "billing.test"
broker = "rabbitmq"
[queues.default]
[queues.private]
[pools.worker]
queues = ["default", "private"]
sends = ["billing.tasks.*"]
[callers.client]
queues = ["default", "private"]
sends = ["billing.tasks.*"]
[callers.operator]
queues = ["default"]
sends = ["billing.tasks.*"]

[callers.shop]
identity = "spiffe://orders.test/{environment}/orders/client"
queues = ["default"]
sends = ["billing.tasks.charge"]

"""
DOCUMENT = (ROOT / "docs/two-services.md").read_text(encoding="utf-8")
#: The stanza of `orders`.
[STANZA] = re.findall(r"```toml title=\"topology.toml\"\n(.*?)```", DOCUMENT, re.DOTALL)


class Shared(Stack):
    """Billing's stack, whose servers serve orders too: both services' rights, put together."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o711)
        (folder / "effects").mkdir()
        self.effects = folder / "effects"
        self.effects.chmod(0o777)  # the workers are another user's
        files = {"orders": ORDERS_TOML, "billing": BILLING_TOML + STANZA}
        for name, text in files.items():
            (folder / f"{name}.toml").write_text(text.replace('"rabbitmq"', f'"{brokers.NAME}"'), encoding="utf-8")
        super().__init__(ROOT, folder / "stack", f"{APPS}:billing", topology=folder / "billing.toml")
        self.orders_file = folder / "orders.toml"
        self.orders = topology.Topology.load(self.orders_file)
        self.rules = SimpleNamespace(
            contract_text=render.contract_text,
            definitions=lambda billing: _together(render.definitions(self.orders), render.definitions(billing)),
            acl_text=self._both(render.acl_text),
            broker_acl_text=self._both(render.broker_acl_text),
        )

    def _both(self, text: Callable[[Any], str]) -> Callable[[Any], str]:
        # As `sort -u` does. The server refuses a file that names a user twice.
        return lambda billing: "\n".join(sorted({*text(self.orders).splitlines(), *text(billing).splitlines()}))

    def up(self, *, worker: bool = True) -> None:
        """Start the servers, then a worker of each service."""
        super().up(worker=False)
        self.signing: Authority = self.pki.authority("orders-signing")
        # Each CA is for its own trust domain.
        self.trust(self.pki.store, "orders.test", self.signing)
        store = own_folder(self.folder / "pki/orders-store", 0o755)
        self.trust(store, "orders.test", self.signing)
        self.trust(store, "billing.test", self.pki.signing)
        self.store = store
        if worker:
            effects = {"EFFECTS": str(self.effects)}
            self.start_worker(env={**self.environment("worker"), **effects}, name="billing")
            calls = {
                name.replace("SECURE_CELERY_", "BILLING_"): value for name, value in self.at_billing(WORKER).items()
            }
            self.start_worker(f"{APPS}:orders", {**self.at_orders("worker"), **calls}, "orders")

    def trust(self, store: Path, domain: str, authority: Authority) -> None:
        folder = own_folder(store / domain, 0o755)
        write_own(folder / "ca.pem", authority.certificate.read_bytes(), 0o644)

    def environment(self, role: str) -> dict[str, str]:
        """What ``<role>.env`` says, under one prefix."""
        return {
            name.replace("BILLING_", "SECURE_CELERY_", 1): value for name, value in super().environment(role).items()
        }

    def signed_by(self, uri: str, authority: Authority | None = None) -> dict[str, str]:
        """Return the variables of a signer; of orders, unless another authority issues it."""
        name = uri.removeprefix("spiffe://").replace("/", "-")
        pair: Pair = (authority or self.signing).signer(name, uri)
        return {
            "SECURE_CELERY_SECURITY_KEY": str(pair.key),
            "SECURE_CELERY_SECURITY_CERTIFICATE": str(pair.certificate),
            "SECURE_CELERY_SECURITY_CERT_STORE": str(self.store),
        }

    def at_billing(self, uri: str = WORKER, account: str = "orders", **changes: str) -> dict[str, str]:
        """Return the environment of a process of orders that calls billing."""
        return {**self.environment(account), **self.signed_by(uri), **changes}

    def at_orders(self, role: str) -> dict[str, str]:
        """Return the environment of a process of orders at home."""
        account, own = self.orders.account(role), self.environment("client")
        pair = self.pki.tls.client(account)
        changes = {
            "TOPOLOGY": self.orders_file,
            "TLS_CERTIFICATE": pair.certificate,
            "TLS_KEY": pair.key,
            "RESULT_BACKEND_PASSWORD_FILE": self.folder / "redis" / f"{account}.password",
        }
        if "SECURE_CELERY_BROKER_PASSWORD_FILE" in own:
            changes["BROKER_PASSWORD_FILE"] = self.folder / "redis-broker" / f"{account}.password"
        changed = {f"SECURE_CELERY_{name}": str(value) for name, value in changes.items()}
        for name in ("SECURE_CELERY_BROKER_URL", "SECURE_CELERY_RESULT_BACKEND"):
            changed[name] = own[name].replace("billing.client@", f"{account}@").replace("/billing", "/orders")
        if role in self.orders.pools:
            for part in ("", "_PASSWORD_FILE"):
                changed[f"SECURE_CELERY_REPLAY_STORE{part}"] = changed[f"SECURE_CELERY_RESULT_BACKEND{part}"]
        return {**own, **changed, **self.signed_by(f"spiffe://orders.test/development/orders/{role}")}

    def count(self, effect: str) -> int:
        """Return how often an effect happened."""
        return sum(path.name.partition(":")[0] == effect for path in self.effects.iterdir())


def _together(*documents: Mapping[str, list[Any]]) -> dict[str, Any]:
    return {section: [item for document in documents for item in document[section]] for section in documents[0]}


def settings(environment: Mapping[str, str]) -> Settings:
    return Settings(**{key.removeprefix("SECURE_CELERY_").lower(): value for key, value in environment.items()})


def signer_of(environment: Mapping[str, str]) -> envelope.Signer:
    """Return a signer that does not ask whether anybody believes it."""
    return reading.load_signer(settings(environment))


def hardened(environment: Mapping[str, str]) -> Celery:
    """Make an application that has no task, as a caller of another service does."""
    app = Celery("caller", set_as_current=False)
    hardening.harden(app, settings(environment))
    return app


def take_record(environment: Mapping[str, str]) -> bytes | None:
    """Take a record out of an operator's quarantine; None if it is empty."""
    app = hardened(environment)
    with app.connection_for_read() as connection:
        for record, remove in app.hardening.broker.quarantined(connection):
            remove()
            return bytes(record)
    return None


def put(environment: Mapping[str, str], queue: str, body: bytes) -> None:
    """Publish raw bytes, with nothing to stop it but the account's rights at the broker."""
    app = hardened(environment)
    with app.connection_for_write() as connection, connection.Producer() as producer:
        options = {"content_type": envelope.CONTENT_TYPE, "content_encoding": "utf-8"}
        producer.publish(body, exchange=app.hardening.broker.exchange, routing_key=queue, **options)


def task(signer: envelope.Signer, name: str = CHARGE, queue: str = "billing.default", **changes: Any) -> bytes:
    """Sign a task message by hand."""
    now, own = int(time.time()), str(signer.identity)
    claims = {
        "iss": own,
        "aud": OF_BILLING,
        "iat": now,
        "exp": now + 600,
        "jti": "by-hand",
        "origin": own,
        "owner": own,
        "queue": queue,
        "task": {"name": name, "id": "by-hand"},
        "args": [666],
        "kwargs": {},
        "embed": {},
    }
    return signer.sign(envelope.Type.TASK, codec.encode({**claims, **changes}))


def refused(both: Shared, service: str = "billing") -> str:
    """Wait for a message in a service's quarantine; return its code."""
    operator = both.environment("operator") if service == "billing" else both.at_orders("operator")
    record = within(SOON, lambda: take_record(operator))
    assert record
    verified = settings(operator).credentials.verifier.verify(envelope.Type.QUARANTINE, record)
    assert both.count("charge 666") == both.count("refund 666") == 0
    return str(codec.decode(verified.payload)["code"])
