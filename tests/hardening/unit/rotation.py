"""A service whose keys and certificates can be replaced while it runs: what the tests of that share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from ...project import audit, envelope, hardening, settings
from ...service import MemorySettings, Party, Service
from . import documents
from .certificates import Pair, signing

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
