"""Two services on one broker and one result backend: orders may call one task of billing, and reaches nothing else."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from pathlib import Path

import amqp
import pytest
import redis
from celery import group

from ...project import codec, envelope, errors
from .running import SOON
from .servers import reach
from .shared import (
    CHARGE,
    CLIENT,
    OF_BILLING,
    REFUND,
    WORKER,
    Shared,
    hardened,
    put,
    refused,
    settings,
    signer_of,
    task,
)
from .test_backend_accounts import CALLER, backend, permitted
from .test_backend_accounts import COMMANDS as RESULTS
from .test_rabbitmq import ACTIONS, SENDER, login, publish, read
from .test_redis_accounts import COMMANDS, broker
from .two_services import orders_app


def refusal(both: Shared, environment: Mapping[str, str], body: bytes, queue: str = "default") -> str:
    """Put a message into a queue of billing's; return the code with which billing's worker refuses it."""
    put(environment, f"billing.{queue}", body)
    return refused(both)


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
