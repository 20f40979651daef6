"""Keys, certificates and anchors that are replaced while everything runs, and what is said before they run out."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from ...project import errors, settings
from ...service import MemorySettings, Party, Service
from . import documents
from .certificates import HOUR, NOW, Pair, authority, revocations
from .rotation import (
    TASK,
    at_once,
    ca,
    events,
    files,
    issue,
    pem,
    put,
    put_certificate,
    put_key,
    sends,
    serial,
    service,
    twin,
)

__all__ = ["at_once", "events", "service"]

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
