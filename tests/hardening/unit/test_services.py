"""Another service that calls this one: what its processes sign and believe, and what the gate makes of it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.concurrency.prefork import TaskPool

from ...project import codec, consumer, envelope, errors, hardening, identity, ownership, render
from ...service import ENVIRONMENT, ROOT, MemorySettings, Service
from . import documents

HASH = documents.checksum.name
SHOP = f"spiffe://shop.test/{ENVIRONMENT}/shop"
OTHER = f"{HASH.rpartition('.')[0]}.other"


class Two:
    """A service, and another one that may call one of its tasks."""

    def __init__(self, folder: Path) -> None:
        rules = (ROOT / "topology.toml").read_text(encoding="utf-8")
        own = hardening.topology.Topology.load(ROOT / "topology.toml")
        queue = own.queues[0].name
        file = folder / "topology.toml"
        file.write_text(
            f'trust_domain = "{own.trust_domain or own.application + ".test"}"\n{rules}\n[callers.shop]\n'
            f'identity = "spiffe://shop.test/{{environment}}/shop/worker"\nqueues = ["{queue}"]\nsends = ["{HASH}"]\n',
            encoding="utf-8",
        )
        self.topology = file
        self.service = Service(folder, file)
        self.contract = folder / "shop.toml"
        self.contract.write_text(render.rendered(self.service.rules)[render.CONTRACTS / "shop.toml"], encoding="utf-8")
        self.audience = self.service.worker.identity.audience

    def app(self, uri: str = f"{SHOP}/worker", contract: Path | None = None) -> Celery:
        """Make an application of the other service's that calls this one."""
        app = Celery("shop", set_as_current=False)
        hardening.harden(app, self.settings(uri, contract))
        return app

    def settings(self, uri: str = f"{SHOP}/worker", contract: Path | None = None) -> MemorySettings:
        pair = self.service.pki.signing.signer(uri.removeprefix("spiffe://").replace("/", "-"), uri)
        own = self.service.client.app.hardening.settings.model_dump()
        changes = {
            "security_key": pair.key,
            "security_certificate": pair.certificate,
            "topology": contract or self.contract,
        }
        return MemorySettings(**{**own, **changes})

    def task(self, signer: envelope.Signer, **changes: Any) -> bytes:
        """Sign a task by hand, made from a genuine one of the other service's."""
        self.app().send_task(HASH, ("x",))
        (message,) = self.service.deliveries()
        message.ack()
        claims = codec.decode(
            self.service.worker.app.hardening.verifier.verify(envelope.Type.TASK, message.body).payload
        )
        return signer.sign(envelope.Type.TASK, codec.encode({**claims, "iss": str(signer.identity), **changes}))

    def code(self, body: bytes) -> str:
        """Publish a message that is refused; return the code."""
        self.service.publish(body)
        assert self.service.work() == 0
        (record,) = self.service.quarantined()
        return str(record["code"])


@pytest.fixture
def two(tmp_path: Path) -> Two:
    return Two(tmp_path)


def test_the_other_service_calls_its_task_and_believes_its_result(two: Two) -> None:
    result = two.app().send_task(HASH, ("hello",))
    assert two.service.work() == 1
    assert result.get(timeout=1) == documents.checksum("hello")
    assert two.app().AsyncResult(result.id).state == "SUCCESS"
    for party in (two.service.client, two.service.party("beat")):  # nobody else finds anything under that id
        assert party.app.AsyncResult(result.id).state == "PENDING"


def test_another_task_is_refused_and_the_caller_hears_of_it(two: Two) -> None:
    @two.service.worker.app.task(name=OTHER, shared=False)
    def other() -> None: ...

    result = two.app().send_task(OTHER, ignore_result=False)
    assert two.service.work() == 0
    with pytest.raises(errors.NotAllowed):
        result.get(timeout=1)
    assert [record["code"] for record in two.service.quarantined()] == ["policy.denied"]


def test_a_refusal_by_another_package_is_one_of_ours(two: Two) -> None:
    stored = {"exc_type": "NotAllowed", "exc_message": ["x"], "exc_module": "elsewhere.hardening.errors"}
    refusal = two.app().backend.exception_to_python(stored)
    assert type(refusal) is errors.NotAllowed
    assert "policy.denied" in str(refusal)


def test_inside_a_task_of_its_own_it_acts_for_itself_all_the_same(two: Two) -> None:
    app = two.app()
    with ownership.acting_for(Context(origin=f"{SHOP}/client", owner=f"{SHOP}/client")):
        result = app.send_task(HASH, ("hello",))
    assert two.service.work() == 1
    with ownership.acting_for(Context(origin=f"{SHOP}/client", owner=f"{SHOP}/client")):
        assert result.get(timeout=1) == documents.checksum("hello")
    assert app.AsyncResult(result.id).state == "SUCCESS"


def test_a_worker_of_another_service_has_no_workers_rights(two: Two) -> None:
    signer = two.app().hardening.signer
    client = str(two.service.client.identity)
    assert two.code(two.task(signer, origin=client)) == "policy.denied"
    assert two.code(two.task(signer, owner=client)) == "message.shape"
    with pytest.raises(PermissionError):
        two.app().backend.encode({"status": "SUCCESS", "task_id": "1", "result": 1})


@pytest.mark.parametrize("uri", [f"{SHOP}/client", f"{SHOP}/operator", f"{SHOP}s/worker", f"{SHOP}/worker/shop"])
def test_who_is_not_listed_is_refused_at_its_own_start_and_at_the_gate(two: Two, uri: str) -> None:
    with pytest.raises(errors.ConfigurationRefused, match="neither a part nor a caller") as caught:
        two.app(uri)
    assert caught.value.setting == "SECURE_CELERY_TOPOLOGY"
    signer = two.settings(uri).credentials.signer
    assert two.code(two.task(signer, origin=uri, owner=uri)) == "policy.denied"


def test_a_message_is_for_the_callers_own_environment(two: Two) -> None:
    app = two.app(SHOP.replace(ENVIRONMENT, "production") + "/worker")
    result = app.send_task(HASH, ("hello",))
    assert app.hardening.audience == two.audience.replace(ENVIRONMENT, "production")
    assert two.service.work() == 0
    assert [record["code"] for record in two.service.quarantined()] == ["message.audience"]
    assert result.state == "PENDING"
    signer = app.hardening.signer
    uri = str(signer.identity)
    assert two.code(two.task(signer, origin=uri, owner=uri)) == "policy.denied"  # for our environment, from another


@pytest.mark.parametrize("whole", [False, True], ids=["what it gets to know", "the whole topology"])
def test_another_services_worker_cannot_start_as_one_of_ours(
    two: Two, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getresuid", lambda: (1000, 1000, 1000))
    app = two.app(contract=two.topology if whole else None)
    assert app.hardening.consumed == frozenset()
    with pytest.raises(errors.ConfigurationRefused) as caught:
        consumer.Preflight(SimpleNamespace(app=app, pool_cls=TaskPool))
    assert caught.value.code == "worker.identity"


def test_a_result_of_the_other_services_own_worker_is_refused(two: Two) -> None:
    app = two.app()
    result = app.send_task(HASH, ("hello",))
    two.service.work()
    backend = app.backend
    key = backend.get_key_for_task(result.id)
    claims = codec.decode(two.app().hardening.verifier.verify(envelope.Type.RESULT, backend.get(key)).payload)
    assert claims["iss"] == str(two.service.worker.identity)
    for aud in (two.audience, SHOP):
        forged = app.hardening.signer.sign(
            envelope.Type.RESULT, codec.encode({**claims, "iss": f"{SHOP}/worker", "aud": aud})
        )
        backend.set(key, forged)
        with pytest.raises(errors.WrongAudience):
            two.app().AsyncResult(result.id).get(timeout=1)


def test_a_group_that_it_saved_is_its_own(two: Two) -> None:
    app = two.app()
    group = app.GroupResult("a-group", [app.AsyncResult("1"), app.AsyncResult("2")])
    group.save()
    assert app.GroupResult.restore("a-group") == group
    assert two.service.client.app.GroupResult.restore("a-group") is None


@pytest.mark.parametrize("domain", ["other.test", "shop.test"])
def test_our_own_processes_are_of_the_trust_domain_that_the_topology_names(two: Two, domain: str) -> None:
    own = identity.Identity.parse(str(two.service.client.identity))
    uri = str(own).replace(own.trust_domain, domain, 1)
    with pytest.raises(errors.ConfigurationRefused, match="neither a part nor a caller"):
        two.app(uri, contract=two.topology)


def test_settings_of_another_service_have_a_prefix_of_their_own(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = set(hardening.Settings.model_fields)
    for name, value in two.settings().model_dump(include=fields, exclude_none=True).items():
        monkeypatch.setenv(f"BILLING_{name.upper()}", str(value))
    assert MemorySettings(_env_prefix="BILLING_") == two.settings().model_copy()
    monkeypatch.delenv("BILLING_TLS_CA")
    with pytest.raises(errors.ConfigurationRefused) as caught:
        MemorySettings(_env_prefix="BILLING_")
    assert caught.value.setting == "BILLING_TLS_CA"
