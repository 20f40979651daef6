"""Origin and owner: what a worker does because of a message is done for that message's caller, and nobody else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Task

from ...project import codec, envelope, errors, identity, ownership
from ...service import Service
from . import documents

PREFIX = documents.checksum.name.rpartition(".documents.")[0]
PLAIN, SENDS, SENDS_AS_ITSELF = f"{PREFIX}.plain", f"{PREFIX}.sends", f"{PREFIX}.sends_as_itself"
OWN = identity.Identity.parse("spiffe://orders.test/production/orders/worker")


class Sent:
    """A service, and the claims of what its worker sends."""

    def __init__(self, service: Service) -> None:
        self.service = service
        app = service.worker.app

        @app.task(name=PLAIN, shared=False, bind=True, max_retries=1)
        def plain(task: Task, outcome: str = "") -> None:
            if outcome == "retry" and not task.request.retries:
                raise task.retry(countdown=0)
            if outcome == "fail":
                raise ValueError

        @app.task(name=SENDS, shared=False)
        def sends() -> None:
            app.send_task(PLAIN)

        @app.task(name=SENDS_AS_ITSELF, shared=False, bind=True)
        def sends_as_itself(task: Task) -> None:
            app.send_task(PLAIN, task_id=task.request.id)

    def by_worker(self, name: str, *args: Any, **options: Any) -> dict[str, Any]:
        """Send a task as a client; return the claims of the one message that the worker then sends."""
        self.service.client.app.send_task(name, args, **options)
        (message,) = self.service.deliveries()
        assert self.service.receive(message)
        (sent,) = self.service.deliveries()
        sent.ack()
        verified = self.service.worker.app.hardening.verifier.verify(envelope.Type.TASK, sent.body)
        claims: dict[str, Any] = codec.decode(verified.payload)
        assert claims["iss"] == str(self.service.worker.identity)
        return claims


@pytest.fixture
def sent(service: Service) -> Sent:
    return Sent(service)


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        pytest.param(PLAIN, ["retry"], {}, id="retry"),
        pytest.param(PLAIN, [], {"link": {"task": PLAIN}}, id="callback"),
        pytest.param(PLAIN, ["fail"], {"link_error": {"task": PLAIN}}, id="errback"),
        pytest.param(PLAIN, [], {"chain": [{"task": PLAIN}]}, id="chain"),
    ],
)
def test_what_celery_sends_for_a_message_has_its_origin_and_its_owner(
    sent: Sent, name: str, args: list[str], options: dict[str, Any]
) -> None:
    blank = {"args": [], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": False}
    whole = {
        option: [blank | each for each in value] if isinstance(value, list) else blank | value
        for option, value in options.items()
    }
    claims = sent.by_worker(name, *args, **whole)
    client = str(sent.service.client.identity)
    assert (claims["origin"], claims["owner"]) == (client, client)


@pytest.mark.parametrize("name", [SENDS, SENDS_AS_ITSELF])
def test_what_a_tasks_own_code_sends_is_the_workers_doing_and_its_callers_property(sent: Sent, name: str) -> None:
    claims = sent.by_worker(name)
    assert claims["origin"] == str(sent.service.worker.identity)
    assert claims["owner"] == str(sent.service.client.identity)


def owner(own: identity.Identity = OWN, audience: str = OWN.audience) -> str:
    return ownership.owner(own, audience)


def origin(own: identity.Identity = OWN, audience: str = OWN.audience) -> str:
    return ownership.origin(own, audience, "id", "task")


def test_outside_a_task_everything_is_ones_own() -> None:
    assert owner() == origin() == str(OWN)


def test_at_another_service_one_always_acts_for_oneself() -> None:
    elsewhere = "spiffe://billing.test/production/billing"
    with ownership.acting_for(SimpleNamespace(origin="an-origin", owner="an-owner")):
        assert (owner(), origin()) == ("an-owner", "an-origin")
        assert owner(audience=elsewhere) == origin(audience=elsewhere) == str(OWN)


def test_the_outermost_request_is_acted_for_and_only_until_the_block_ends() -> None:
    outer, inner = (SimpleNamespace(origin=f"{name}-origin", owner=f"{name}-owner") for name in ("outer", "inner"))
    with ownership.acting_for(outer):
        with ownership.acting_for(inner):
            assert owner() == "outer-owner"
            assert origin() == "outer-origin"
        assert owner() == "outer-owner"
    with pytest.raises(ZeroDivisionError), ownership.acting_for(outer):
        _ = 1 / 0
    assert owner() == str(OWN)


@pytest.mark.parametrize("request_", [None, SimpleNamespace(), SimpleNamespace(owner=None, origin="x")])
def test_a_request_without_an_owner_changes_nothing(request_: Any) -> None:
    with ownership.acting_for(request_):
        assert owner() == str(OWN)


def test_no_two_owners_share_a_namespace() -> None:
    owners = [
        "spiffe://orders.test/production/orders/client",
        "spiffe://orders.test/production/orders/client/web",
        "spiffe://orders.test/production/orders/client/web.x",
        "spiffe://orders.test/production/orders/worker",
        "spiffe://orders.test/production/orders/worker/web",
        "spiffe://orders.test/production/billing/client",
        "spiffe://orders.test/production/billing/client/web",
        "spiffe://billing.test/production/billing/client",
        "spiffe://billing.test/production/orders/client",
    ]
    names = [ownership.namespace(owner, OWN.audience) for owner in owners]
    assert len(set(names)) == len(owners)
    for name in names:
        assert not any(other.startswith(f"{name}:") for other in names)  # the id follows behind a colon


@pytest.mark.parametrize(
    "owner", ["", "client", "spiffe://x", "spiffe://x/y/z/root", "spiffe://a/b/c/client/../worker"]
)
def test_an_owner_that_is_no_identity_has_no_namespace(owner: str) -> None:
    with pytest.raises(errors.InvalidIdentity):
        ownership.namespace(owner, OWN.audience)
