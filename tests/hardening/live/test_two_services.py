"""Two services on one broker and one result backend: orders may call one task of billing, and reaches nothing else.

Each has a signing CA of its own. ``account`` and ``signer`` are chosen apart, to take one of two controls away.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import amqp
import pytest
import redis
from celery import Celery, group

from stack import Stack
from stack.account import own_folder, write_own
from stack.pki import Authority, Pair

from ...project import Settings, codec, envelope, errors, hardening, render, topology
from ...project import settings as reading
from ...service import ROOT
from . import brokers
from .everything import within
from .running import SOON
from .servers import reach
from .test_backend_accounts import CALLER, backend, permitted
from .test_backend_accounts import COMMANDS as RESULTS
from .test_rabbitmq import ACTIONS, SENDER, login, publish, read
from .test_redis_accounts import COMMANDS, broker
from .two_services import orders_app

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


def refusal(both: Shared, environment: Mapping[str, str], body: bytes, queue: str = "default") -> str:
    """Put a message into a queue of billing's; return the code with which billing's worker refuses it."""
    put(environment, f"billing.{queue}", body)
    return refused(both)


def refused(both: Shared, service: str = "billing") -> str:
    """Wait for a message in a service's quarantine; return its code."""
    operator = both.environment("operator") if service == "billing" else both.at_orders("operator")
    record = within(SOON, lambda: take_record(operator))
    assert record
    verified = settings(operator).credentials.verifier.verify(envelope.Type.QUARANTINE, record)
    assert both.count("charge 666") == both.count("refund 666") == 0
    return str(codec.decode(verified.payload)["code"])


@pytest.fixture(scope="module")
def both(temporary: Path) -> Iterator[Shared]:
    shared = Shared(temporary / "two-services")
    try:
        shared.up()
        yield shared
        gc.collect()  # results that wait for nothing any more unsubscribe, which takes a server
    finally:
        shared.down()


# -- what is possible -------------------------------------------------------------------------------------------------


def test_a_worker_of_one_service_calls_the_other_from_within_a_task(both: Shared) -> None:
    orders = orders_app(settings(both.at_orders("client")))
    assert orders.send_task("orders.tasks.order", (1,)).get(timeout=SOON) == f"charge 1 for {WORKER}"
    assert both.count("charge 1") == 1


def test_a_plain_client_calls_the_other_service(both: Shared) -> None:
    billing = hardened(both.at_billing(CLIENT, "shop"))
    assert billing.send_task(CHARGE, (2,)).get(timeout=SOON) == f"charge 2 for {CLIENT}"
    assert both.count("charge 2") == 1


def test_what_the_local_stack_issues_for_another_service_works_as_it_is(both: Shared) -> None:
    environment = both.environment("orders")
    assert Path(environment["SECURE_CELERY_TOPOLOGY"]).parent == both.folder
    assert hardened(environment).send_task(CHARGE, (3,)).get(timeout=SOON) == f"charge 3 for {WORKER}"


def test_a_chain_and_a_group_at_the_other_service_belong_to_their_caller(both: Shared) -> None:
    billing = hardened(both.at_billing())
    charges = [billing.signature(CHARGE, (amount,), immutable=True) for amount in (4, 5, 6, 7)]
    assert (charges[0] | charges[1]).apply_async().get(timeout=SOON) == f"charge 5 for {WORKER}"
    parts = group(charges[2:], app=billing).apply_async()
    parts.save()
    restored = billing.GroupResult.restore(parts.id)
    assert restored.get(timeout=SOON) == [f"charge {amount} for {WORKER}" for amount in (6, 7)]


def test_the_same_id_of_two_services_is_two_results(both: Shared) -> None:
    ours, theirs = (hardened(both.environment("client")), hardened(both.at_billing()))
    results = [app.send_task(CHARGE, (8,), task_id="the-same") for app in (ours, theirs)]
    assert [result.get(timeout=SOON) for result in results] == [
        f"charge 8 for {origin}" for origin in (f"{OF_BILLING}/client", WORKER)
    ]


# -- what the gate refuses, whatever the broker lets pass -------------------------------------------------------------


def test_another_task_is_refused_and_its_caller_is_told(both: Shared) -> None:
    with pytest.raises(errors.NotAllowed, match=r"policy\.denied"):
        hardened(both.at_billing()).send_task(REFUND, (666,)).get(timeout=SOON)
    assert refused(both) == "policy.denied"
    orders = orders_app(settings(both.at_orders("client")))
    with pytest.raises(Exception, match=r"policy\.denied"):
        orders.send_task("orders.tasks.order", (666, REFUND)).get(timeout=SOON)
    assert refused(both) == "policy.denied"


def test_a_chain_from_one_service_to_the_other_is_refused(both: Shared) -> None:
    orders = orders_app(settings(both.at_orders("client")))
    chain = orders.signature("orders.tasks.order", (9,)) | orders.signature(CHARGE, (666,), immutable=True)
    with pytest.raises(errors.NotAllowed):
        chain.apply_async().parent.get(timeout=SOON)
    assert refused(both, "orders") == "policy.denied"
    billing = hardened(both.at_billing())
    back = billing.signature(CHARGE, (666,)) | billing.signature("orders.tasks.order", immutable=True)
    with pytest.raises(errors.NotAllowed):
        back.apply_async().parent.get(timeout=SOON)
    assert refused(both) == "policy.denied"


def test_a_queue_that_it_may_not_use_is_refused_even_if_the_broker_would_take_it(both: Shared) -> None:
    signer = signer_of(both.at_billing())
    message = task(signer, queue="billing.private")
    with pytest.raises((amqp.AccessRefused, redis.exceptions.NoPermissionError)):
        put(both.at_billing(), "billing.private", message)
    assert refusal(both, both.environment("client"), message, "private") == "policy.denied"


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://orders.test/production/orders/worker",
        "spiffe://orders.test/staging/orders/client",
        "spiffe://orders.test/development/orders/operator",
        "spiffe://orders.test/development/orders/beat",
        "spiffe://orders.test/development/orders/worker/web",
        "spiffe://orders.test/development/orders/client/orders",
        "spiffe://orders.test/development/billing/client",
        "spiffe://orders.test/development/billing/worker",
        "spiffe://orders.test/development/other/worker",
    ],
)
def test_nobody_else_of_that_trust_domain_may_send_anything(both: Shared, uri: str) -> None:
    signer = signer_of({**both.at_billing(), **both.signed_by(uri)})
    assert refusal(both, both.environment("client"), task(signer)) == "policy.denied"


@pytest.mark.parametrize("role", ["client", "worker", "operator", "client/orders"])
def test_the_other_services_ca_makes_no_signer_of_ours(both: Shared, role: str) -> None:
    signer = signer_of({**both.at_billing(), **both.signed_by(f"{OF_BILLING}/{role}")})
    assert refusal(both, both.at_billing(), task(signer, REFUND)) == "signer.untrusted"


def test_our_own_client_of_that_name_has_not_the_other_services_rights(both: Shared) -> None:
    own = both.signed_by(f"{OF_BILLING}/client/orders", both.pki.signing)
    signer = signer_of({**both.at_billing(), **own})
    assert refusal(both, both.at_billing(), task(signer)) == "policy.denied"


def test_a_worker_of_another_service_speaks_for_nobody(both: Shared) -> None:
    signer = signer_of(both.at_billing())
    client = f"{OF_BILLING}/client"
    assert refusal(both, both.at_billing(), task(signer, origin=client)) == "policy.denied"
    assert refusal(both, both.at_billing(), task(signer, origin=CLIENT)) == "policy.denied"
    assert refusal(both, both.at_billing(), task(signer, owner=client)) == "message.shape"


def test_a_message_for_one_service_is_none_for_the_other(both: Shared) -> None:
    """The message is genuine and its signer may call billing: only whom it was for is another."""
    signer = signer_of(both.at_orders("worker"))
    at_home = {"aud": "spiffe://orders.test/development/orders"}
    captured = task(signer, **at_home)
    assert refusal(both, both.at_billing(), captured) == "message.audience"
    put(both.at_orders("client"), "orders.default", task(signer))
    assert refused(both, "orders") == "message.audience"


# -- what the broker and the backend refuse, whatever is signed -------------------------------------------------------


@pytest.mark.broker("rabbitmq")
def test_its_account_at_the_broker_may_send_to_its_queue_and_no_more(both: Shared) -> None:
    private = {"send to another queue": publish("{}", "{}.private"), "read another queue": read("{}.private")}
    done = set()
    with login(both, "orders") as connection:
        for name, act in {**ACTIONS, **private}.items():
            channel = connection.channel()
            try:
                act(channel, "billing")
            except amqp.AccessRefused:  # which closes the channel
                continue
            channel.close()
            done.add(name)
    assert done == SENDER
    for _ in range(2):
        refused(both)  # what was sent is no task


@pytest.mark.broker("rabbitmq")
@pytest.mark.parametrize("account", ["orders", "operator", "worker", "client"])
def test_no_account_of_billings_enters_the_vhost_of_orders(both: Shared, account: str) -> None:
    _stays_out(both.environment(account), "/billing", "/orders")


@pytest.mark.broker("rabbitmq")
@pytest.mark.parametrize("role", ["operator", "worker", "client"])
def test_no_account_of_orders_enters_the_vhost_of_billing(both: Shared, role: str) -> None:
    _stays_out(both.at_orders(role), "/orders", "/billing")


def _stays_out(environment: dict[str, str], own: str, other: str) -> None:
    url = environment["SECURE_CELERY_BROKER_URL"]
    elsewhere = {**environment, "SECURE_CELERY_BROKER_URL": url.replace(own, other)}
    reach(hardened(environment).connection_for_write())
    with pytest.raises(amqp.NotAllowed):
        reach(hardened(elsewhere).connection_for_write())


@pytest.mark.broker("redis")
def test_its_account_at_a_redis_broker_may_push_to_its_queue_and_no_more(both: Shared) -> None:
    private = {"send to another queue": ("LPUSH", "{0}.private", "x"), "take from it": ("RPOP", "{0}.private")}
    commands = {**COMMANDS, **private}
    assert permitted(lambda: broker(both, "orders"), commands, "billing") == {"send"}
    refused(both)  # what was sent is no task
    assert permitted(lambda: broker(both, "orders"), commands, "orders") == set()


@pytest.mark.broker("redis")
@pytest.mark.parametrize("account", ["operator", "worker", "client"])
def test_no_account_at_a_redis_broker_reaches_the_other_service(both: Shared, account: str) -> None:
    assert permitted(lambda: broker(both, account), COMMANDS, "orders") == set()
    own = both.at_orders(account)
    login = {
        "username": f"orders.{account}",
        "password": Path(own["SECURE_CELERY_BROKER_PASSWORD_FILE"]).read_text(encoding="utf-8"),
    }
    assert permitted(lambda: broker(both, "client", **login), COMMANDS, "billing") == set()


def test_its_account_at_the_backend_reads_what_is_its_own(both: Shared) -> None:
    own = "orders.test/orders/worker"
    assert permitted(lambda: backend(both, "orders"), RESULTS, "billing", own) == CALLER
    for application, owner in (
        ("billing", "client"),
        ("billing", "worker"),
        ("billing", "orders.test/orders/client"),
        ("billing", "client.orders"),
        ("orders", "worker"),
        ("orders", own),
    ):
        assert permitted(lambda: backend(both, "orders"), RESULTS, application, owner) == set()
    assert permitted(lambda: backend(both, "operator"), RESULTS, "billing", own) == set()


def test_a_result_that_a_worker_of_orders_signed_is_none_of_billings(both: Shared) -> None:
    billing = hardened(both.at_billing())
    result = billing.send_task(CHARGE, (10,))
    genuine = result.get(timeout=SOON)
    key = f"billing:celery-task-meta-orders.test/orders/worker:{result.id}"
    stored = both.redis("GET", key)
    claims = codec.decode(settings(both.at_billing()).credentials.verifier.verify(envelope.Type.RESULT, stored).payload)
    assert claims["iss"] == f"{OF_BILLING}/worker"
    for uri, refusal in ((WORKER, errors.WrongAudience), (f"{OF_BILLING}/worker", errors.UntrustedSigner)):
        signer = signer_of({**both.at_billing(), **both.signed_by(uri)})
        forged = claims | {"iss": uri, "value": claims["value"] | {"result": "forged"}}
        both.redis("SET", key, signer.sign(envelope.Type.RESULT, codec.encode(forged)).decode())
        with pytest.raises(refusal):
            hardened(both.at_billing()).AsyncResult(result.id).get(timeout=SOON)
    both.redis("SET", key, stored)
    assert hardened(both.at_billing()).AsyncResult(result.id).get(timeout=SOON) == genuine
