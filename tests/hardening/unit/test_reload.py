"""Keys, certificates, anchors and revocation lists that are replaced while everything runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from ...project import audit, consumer, envelope, errors, hardening, settings
from ...service import MemorySettings, Party, Service
from . import documents
from .certificates import HOUR, NOW, Pair, authority, revocations, signing

TASK = envelope.Type.TASK
EVENTS = [event for event in audit.Event if event.startswith("credentials.")]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the files at each use."""
    monkeypatch.setattr(settings.Credentials, "LOOK", 0.0)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Return what was said of credentials since it was asked last."""
    caplog.set_level(logging.INFO, logger=audit.logger.name)

    def said() -> list[dict[str, Any]]:
        found = [record.audit for record in caplog.records if hasattr(record, "audit")]
        caplog.clear()
        return [event for event in found if event["event"] in EVENTS]

    return said


def files(party: Party) -> settings.Settings:
    own: settings.Settings = party.app.hardening.settings
    return own


def ca(service: Service) -> Pair:
    return Pair(service.pki.signing.key, (service.pki.signing.root,))


def issue(service: Service, party: Party, issuer: Pair | None = None, uri: str = "", **options: Any) -> Pair:
    """Issue a certificate that is valid within its CA's life."""
    issuer = issuer or ca(service)
    valid = (issuer.leaf.not_valid_before_utc, issuer.leaf.not_valid_after_utc)
    return signing(uri or str(party.identity), issuer, **{"valid": valid, **options})


def pem(key: Any, password: bytes | None = None) -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    content: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    return content


def put(path: Path, content: bytes) -> None:
    """Write a file in place, as a person with an editor does."""
    with path.open("r+b") as file:
        file.truncate()
        file.write(content)


def put_key(party: Party, pair: Pair) -> None:
    put(files(party).security_key, pem(pair.key))


def put_certificate(party: Party, pair: Pair) -> None:
    put(files(party).security_certificate, b"".join(each.public_bytes(Encoding.PEM) for each in pair.chain))


def load(party: Party) -> Any:
    return load_pem_private_key(files(party).security_key.read_bytes(), None)


def twin(service: Service, folder: Path, issuer: Pair | None = None, **options: Any) -> Party:
    """Make a second client of the same identity, with a certificate and files of its own."""
    pair, own = issue(service, service.client, issuer, **options), files(service.client).model_dump()
    own |= {"security_key": folder / "twin-key.pem", "security_certificate": folder / "twin.pem"}
    own["security_key"].write_bytes(pem(pair.key))
    own["security_key"].chmod(0o600)
    own["security_certificate"].write_bytes(pair.leaf.public_bytes(Encoding.PEM))
    app = Celery("twin", set_as_current=False)
    hardening.harden(app, MemorySettings(**own))
    return Party(app, service.client.identity)


def serial(party: Party) -> int:
    """Return the number of the certificate that a party signs with."""
    number: int = party.signer.chain[0].serial_number
    return number


def sends(service: Service, party: Party | None = None) -> bool:
    """Send a task; say whether it ran, and assert that it was refused as revoked if not."""
    service.send(documents.checksum, "text", party=party)
    if service.work():
        return True
    (record,) = service.quarantined()
    assert record["code"] == "signer.revoked"
    return False


# --- the own key and certificate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(put_key, put_certificate), (put_certificate, put_key)], ids=["key", "certificate"])
def test_half_of_a_replaced_pair_leaves_the_whole_old_one(
    service: Service, events: Callable[[], Any], order: tuple[Callable[[Party, Pair], None], ...]
) -> None:
    old, new = serial(service.client), issue(service, service.client)
    events()
    order[0](service.client, new)
    for _ in range(3):
        assert sends(service)
        assert serial(service.client) == old
    (said,) = events()  # once, not at each look
    assert said["event"] == "credentials.refused"
    assert "the key is not the certificate's" in said["signer"]
    order[1](service.client, new)
    assert sends(service)
    assert serial(service.client) == new.leaf.serial_number
    assert [event["event"] for event in events()] == ["credentials.loaded"]


def test_a_mounted_volume_is_replaced_by_a_link(service: Service, tmp_path: Path) -> None:
    """As Kubernetes does it: each file is a link through ``..data``, which alone is replaced."""
    volume = tmp_path / "volume"
    own = files(service.client)

    def content(version: str, pair: Pair) -> None:
        folder = volume / f"..{version}"
        folder.mkdir(parents=True)
        (folder / "tls.key").write_bytes(pem(pair.key))
        (folder / "tls.key").chmod(0o600)
        (folder / "tls.crt").write_bytes(pair.leaf.public_bytes(Encoding.PEM))
        (volume / "..data_tmp").symlink_to(folder.name)
        (volume / "..data_tmp").rename(volume / "..data")

    first, second = issue(service, service.client), issue(service, service.client)
    content("1", first)
    for name in ("tls.key", "tls.crt"):
        (volume / name).symlink_to(f"..data/{name}")
    changed = {"security_key": volume / "tls.key", "security_certificate": volume / "tls.crt"}
    credentials = settings.Credentials(MemorySettings(**{**own.model_dump(), **changed}))
    assert credentials.signer.chain == first.chain
    content("2", second)
    assert credentials.signer.chain == second.chain


def test_a_locked_key_is_replaced_with_its_password(service: Service, tmp_path: Path) -> None:
    own, password = files(service.client), tmp_path / "password"
    first, second = issue(service, service.client), issue(service, service.client)
    password.write_bytes(b"one")
    password.chmod(0o600)
    put(own.security_key, pem(first.key, b"one"))
    put_certificate(service.client, first)
    credentials = settings.Credentials(MemorySettings(**{**own.model_dump(), "security_key_password_file": password}))
    put_certificate(service.client, second)
    put(own.security_key, pem(second.key, b"two"))
    assert credentials.signer.chain == first.chain
    put(password, b"two")
    assert credentials.signer.chain == second.chain


@pytest.mark.parametrize("damage", ["missing", "empty", "unreadable", "garbage"])
@pytest.mark.parametrize("name", ["security_key", "security_certificate"])
def test_a_damaged_file_leaves_the_old_pair(
    service: Service, events: Callable[[], Any], name: str, damage: str
) -> None:
    old, path = serial(service.client), getattr(files(service.client), name)
    content = path.read_bytes()
    events()
    if damage == "missing":
        path.unlink()
    elif damage == "unreadable":
        path.chmod(0o666)
    else:
        put(path, {"empty": b"", "garbage": content[:40]}[damage])
    assert sends(service)
    assert serial(service.client) == old
    (said,) = events()
    assert name.upper() in said["signer"].upper()
    path.write_bytes(content)
    path.chmod(0o600)
    assert sends(service)
    assert [event["event"] for event in events()] == ["credentials.loaded"]


def test_a_certificate_that_readers_would_refuse_is_not_taken(service: Service, events: Callable[[], Any]) -> None:
    start = service.pki.signing.root.not_valid_before_utc
    old, past = serial(service.client), (start, start + timedelta(minutes=4))
    other = issue(service, service.client, uri=str(service.client.identity).replace("/client", "/monitor"))
    for pair, reason in (
        (issue(service, service.client, authority()), "signer.untrusted"),
        (issue(service, service.client, valid=past), "signer.validity"),
        (other, "names another signer"),
    ):
        events()
        put_key(service.client, pair)
        put_certificate(service.client, pair)
        assert sends(service)
        assert serial(service.client) == old
        assert reason in events()[-1]["signer"]


def test_the_next_one_is_taken_once_its_ca_is_trusted(service: Service) -> None:
    second = authority()
    new = issue(service, service.client, second)
    put_key(service.client, new)
    put_certificate(service.client, new)
    assert serial(service.client) != new.leaf.serial_number
    (service.pki.store / "second.pem").write_bytes(second.leaf.public_bytes(Encoding.PEM))
    assert serial(service.client) == new.leaf.serial_number
    assert sends(service)


def test_what_no_parser_was_made_for_stops_no_message(
    service: Service, events: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise KeyError("odd")

    events()
    monkeypatch.setattr(settings.Trust, "load", crash)
    service.pki.revoke(serial(service.client))
    assert sends(service)
    assert all(said["event"] == "credentials.refused" and "odd" in said["trust"] for said in events())


def test_unchanged_files_are_not_read_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(settings, "load_signer", read)
    monkeypatch.setattr(settings.Trust, "load", read)
    assert sends(service)


def test_files_are_looked_at_once_in_a_while(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.Credentials, "LOOK", 1000.0)
    old = serial(service.client)  # one more look
    put_key(service.client, issue(service, service.client))
    assert serial(service.client) == old
    later = time.monotonic() + 999.0
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert not files(service.client).credentials._problems
    later += 2
    assert serial(service.client) == old
    assert files(service.client).credentials._problems


# --- trust ------------------------------------------------------------------------------------------------------------


def test_an_unknown_signer_is_reason_enough_to_look_at_once(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks a CA may have come to be trusted; its first message must not be lost to that."""
    assert sends(service)
    monkeypatch.setattr(settings.Credentials, "LOOK", 1000.0)
    assert sends(service)  # one more look, the last
    second = authority()
    (service.pki.store / "second.pem").write_bytes(second.leaf.public_bytes(Encoding.PEM))
    assert sends(service, twin(service, tmp_path, second))


def test_a_new_ca_overlaps_with_the_old_one_which_then_goes(service: Service, tmp_path: Path) -> None:
    second, store = authority(), service.pki.store
    assert sends(service)
    (store / "second.pem").write_bytes(second.leaf.public_bytes(Encoding.PEM))
    new = twin(service, tmp_path, second)
    pair = issue(service, service.worker, second)
    put_key(service.worker, pair)
    put_certificate(service.worker, pair)
    assert sends(service)
    assert sends(service, new)
    old = service.client.signer.sign(TASK, b"{}")
    service.worker.app.hardening.verifier.verify(TASK, old)
    for name in ("ca.pem", "ca.crl"):
        (store / name).unlink()
    with pytest.raises(errors.UntrustedSigner):  # although it was remembered
        service.worker.app.hardening.verifier.verify(TASK, old)
    assert sends(service, new)


def test_a_ca_that_goes_waits_for_no_key(service: Service, events: Callable[[], Any]) -> None:
    """A worker whose own certificate is the old CA's does not trust that CA any longer."""
    service.send(documents.checksum, "text")
    events()
    (service.pki.store / "ca.crl").unlink()
    put(service.pki.store / "ca.pem", authority().leaf.public_bytes(Encoding.PEM))
    assert service.work() == 0
    (said,) = events()
    assert said["event"] == "credentials.refused"
    assert "signer.untrusted" in said["signer"]
    assert "trust" not in said
    put(service.pki.store / "ca.pem", service.pki.signing.root.public_bytes(Encoding.PEM))
    assert [record["code"] for record in service.quarantined()] == ["signer.untrusted"]


# --- revocation -------------------------------------------------------------------------------------------------------


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


# --- what runs out ----------------------------------------------------------------------------------------------------


def test_what_runs_out_is_said_in_time_and_again(
    service: Service, tmp_path: Path, events: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    events()
    start = service.pki.signing.root.not_valid_before_utc  # five minutes ago
    lifetime = (start, start + timedelta(minutes=6))
    soon = twin(service, tmp_path, valid=lifetime)
    assert sends(service, soon)
    (said,) = events()
    at = int(lifetime[1].timestamp())
    assert said == {"event": "credentials.expiring", "what": "the signing certificate", "at": at}
    assert sends(service, soon)
    assert events() == []
    monkeypatch.setattr(settings.Credentials, "WARN", 0.0)
    assert sends(service)
    files(soon).credentials._next_warning = 0.0
    assert sends(service, soon)
    assert said in events()


def test_an_overdue_list_is_said(service: Service, events: Callable[[], Any]) -> None:
    root = service.pki.signing.root.not_valid_before_utc
    due = NOW - HOUR
    (service.pki.store / "ca.crl").write_bytes(revocations(ca(service), made=root - 2 * HOUR, due=due))
    events()
    settings.Credentials(files(service.client)).check()
    assert events() == [{"event": "credentials.expiring", "what": "a revocation list", "at": int(due.timestamp())}]


def test_a_ca_without_a_list_is_said_at_the_start(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    settings.Credentials(files(service.client))
    assert "hardening.weakened" not in caplog.text
    (service.pki.store / "ca.crl").unlink()
    settings.Credentials(files(service.client))
    assert "hardening.weakened" in caplog.text
