"""Certificates that are revoked, or expire, while everything runs: nothing signed with them counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from ...project import consumer, envelope, errors, settings
from ...service import Service
from . import documents
from .certificates import authority, revocations
from .rotation import (
    TASK,
    at_once,
    ca,
    events,
    files,
    issue,
    load,
    put,
    put_certificate,
    put_key,
    sends,
    serial,
    service,
    twin,
)

__all__ = ["at_once", "events", "service"]


def test_a_revoked_keys_messages_are_refused_and_others_are_not(service: Service, tmp_path: Path) -> None:
    stolen = twin(service, tmp_path)
    assert sends(service, stolen)
    waiting = service.send(documents.checksum, "text", party=stolen)
    service.pki.revoke(serial(stolen))
    assert service.work() == 0  # although it was sent before
    assert [record["code"] for record in service.quarantined()] == ["signer.revoked"]
    assert waiting.state == "PENDING"
    forged = envelope.Signer(load(stolen), stolen.signer.chain).sign(TASK, b"{}")
    service.publish(forged)
    assert service.work() == 0
    assert [record["code"] for record in service.quarantined()] == ["signer.revoked"]
    assert sends(service)  # the same identity, with another certificate


def test_a_revoked_workers_results_are_refused(service: Service) -> None:
    result = service.send(documents.checksum, "text")
    assert service.work() == 1
    assert result.get(timeout=1)
    fresh = service.client.app.AsyncResult(result.id)
    service.pki.revoke(serial(service.worker))
    with pytest.raises(errors.RevokedSigner):
        fresh.get(timeout=1)


def test_a_message_that_waits_in_the_worker_is_refused_when_its_turn_comes(service: Service, tmp_path: Path) -> None:
    stolen, app = twin(service, tmp_path), service.worker.app
    for party in (stolen, service.client):
        service.send(documents.checksum, "text", party=party)
    requests = []
    for message in service.deliveries():
        admitted = service.gate.receive(message)
        assert admitted
        task = app.tasks[admitted.headers["task"]]
        own = {"on_ack": admitted.ack_log_error, "on_reject": admitted.reject_log_error}
        requests.append((message, consumer.HardenedRequest(admitted, app=app, task=task, hostname="test", **own)))
    service.pki.revoke(serial(stolen))
    (revoked, first), (genuine, second) = requests
    with pytest.raises(TaskRevokedError):
        first.execute_using_pool(None)
    assert revoked.acknowledged
    assert [record["code"] for record in service.quarantined()] == ["signer.revoked"]
    assert first.revoked()
    assert service.quarantined() == []  # once
    assert second.execute()
    assert genuine.acknowledged


def test_nobody_signs_with_a_certificate_that_all_would_refuse(service: Service) -> None:
    service.pki.revoke(serial(service.client))
    with pytest.raises(errors.ConfigurationRefused, match=r"has been revoked \[signer.revoked\].*; Issue") as caught:
        service.send(documents.checksum, "text")
    assert caught.value.code == "config.certificate"
    assert list(service.deliveries()) == []
    new = issue(service, service.client)
    put_key(service.client, new)
    put_certificate(service.client, new)
    assert sends(service)


def test_nobody_signs_with_a_certificate_that_has_expired(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sends(service)
    later = service.client.signer.chain[0].not_valid_after_utc.timestamp() + 2
    monkeypatch.setattr(settings, "time", SimpleNamespace(time=lambda: later, monotonic=time.monotonic))
    with pytest.raises(errors.ConfigurationRefused, match=r"had expired, or was.*: it is valid from") as caught:
        service.send(documents.checksum, "text")
    assert caught.value.code == "config.certificate"


def test_a_revoked_process_does_not_start(service: Service) -> None:
    service.pki.revoke(serial(service.client))
    with pytest.raises(errors.ConfigurationRefused, match=r"has been revoked"):
        settings.Credentials(files(service.client))


@pytest.mark.parametrize("damage", ["gone", "half", "foreign", "older"])
def test_a_damaged_list_leaves_the_old_one(
    service: Service, tmp_path: Path, events: Callable[[], Any], damage: str
) -> None:
    stolen, file = twin(service, tmp_path), service.pki.store / "ca.crl"
    token = stolen.signer.sign(TASK, b"{}")
    service.pki.revoke(serial(stolen))
    content = file.read_bytes()
    assert sends(service)
    events()
    if damage == "gone":
        file.unlink()
    else:
        old = revocations(ca(service), made=service.pki.signing.root.not_valid_before_utc)
        put(file, {"half": content[: len(content) // 2], "foreign": revocations(authority()), "older": old}[damage])
    for _ in range(2):
        service.publish(token)
        assert service.work() == 0
        assert [record["code"] for record in service.quarantined()] == ["signer.revoked"]
    assert sends(service)
    for said in events():  # a client's and a worker's
        assert said["event"] == "credentials.refused"
        assert "revocation list" in said["trust"] or "a CA's list" in said["trust"]
    file.write_bytes(content)
    assert sends(service)
    assert {event["event"] for event in events()} == {"credentials.loaded"}


def test_a_revocation_waits_for_no_key(service: Service, tmp_path: Path) -> None:
    stolen = twin(service, tmp_path)
    token = stolen.signer.sign(TASK, b"{}")
    put_key(service.worker, issue(service, service.worker))
    service.pki.revoke(serial(stolen))
    service.publish(token)
    assert service.work() == 0
    assert [record["code"] for record in service.quarantined()] == ["signer.revoked"]
    assert sends(service)
