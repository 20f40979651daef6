"""Settings of a client and a worker, and an application that is hardened with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from kombu.serialization import registry

from stack.account import Account
from stack.pki import Pki

from ...project import Settings, errors, hardening
from ...service import ROOT


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("harden") / "pki", Account("tests", os.geteuid(), os.getegid(), switch=False))


@pytest.fixture(scope="module")
def own() -> str:
    return hardening.topology.Topology.load(ROOT / "topology.toml").application


def _settings(pki: Pki, own: str, role: str) -> Settings:
    signing = pki.signing.signer(role, f"spiffe://{own}.test/development/{own}/{role}")
    tls = pki.tls.client(role)
    return Settings(
        broker_url=f"amqps://127.0.0.1:5671/{own}",
        result_backend=f"rediss://{own}.{role}@127.0.0.1:6380/0",
        result_backend_password_file=tls.key,
        replay_store=f"rediss://{own}.{role}@127.0.0.1:6380/0",
        replay_store_password_file=tls.key,
        topology=ROOT / "topology.toml",
        tls_ca=pki.tls.certificate,
        tls_certificate=tls.certificate,
        tls_key=tls.key,
        security_key=signing.key,
        security_certificate=signing.certificate,
        security_cert_store=pki.store,
    )


@pytest.fixture(scope="module")
def client(pki: Pki, own: str) -> Settings:
    """Production's own settings class, with real schemes: nothing is connected."""
    return _settings(pki, own, "client")


@pytest.fixture(scope="module")
def worker(pki: Pki, own: str) -> Settings:
    return _settings(pki, own, "worker")


@pytest.fixture(autouse=True)
def stock_decoders() -> Iterator[None]:
    """Take back what a test does to kombu's registry, which belongs to the whole process."""
    decoders, disabled = dict(registry._decoders), set(registry._disabled_content_types)
    yield
    registry._decoders.clear()
    registry._decoders.update(decoders)
    registry._disabled_content_types.clear()
    registry._disabled_content_types.update(disabled)


def _app(settings: Settings, **options: Any) -> Celery:
    app = Celery("harden", set_as_current=False, **options)
    hardening.harden(app, settings)
    return app


def _refused(app: Celery) -> errors.ConfigurationRefused:
    with pytest.raises(errors.ConfigurationRefused) as caught:
        app.hardening.check(app)
    return caught.value
