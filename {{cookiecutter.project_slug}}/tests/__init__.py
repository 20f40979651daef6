"""Tests of this service.

The application reads its settings when it is imported; ``throw_away`` gives it some that lead nowhere.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from stack.account import Account
from stack.pki import Pki

ROOT = Path(__file__).parent.parent
#: Files of tests belong to whoever runs them.
SELF = Account("tests", os.geteuid(), os.getegid(), switch=False)


@contextmanager
def throw_away() -> Iterator[None]:
    """Set the environment of a client whose broker does not exist, until the block ends."""
    topology = tomllib.loads((ROOT / "topology.toml").read_text(encoding="utf-8"))
    application = topology["application"]
    account = f"rediss://{application}.client@127.0.0.1:1/0"
    with tempfile.TemporaryDirectory() as folder:
        pki = Pki(Path(folder) / "pki", SELF)
        tls = pki.tls.client("client")
        domain = topology.get("trust_domain", f"{application}.test")
        signing = pki.signing.signer("client", f"spiffe://{domain}/development/{application}/client")
        if topology["broker"] == "redis":
            broker = {"BROKER_URL": account, "BROKER_PASSWORD_FILE": tls.key}
        else:
            broker = {"BROKER_URL": "amqps://127.0.0.1:1/"}
        values = {
            **broker,
            "RESULT_BACKEND": account,
            "RESULT_BACKEND_PASSWORD_FILE": tls.key,
            "TOPOLOGY": ROOT / "topology.toml",
            "TLS_CA": pki.tls.certificate,
            "TLS_CERTIFICATE": tls.certificate,
            "TLS_KEY": tls.key,
            "SECURITY_KEY": signing.key,
            "SECURITY_CERTIFICATE": signing.certificate,
            "SECURITY_CERT_STORE": pki.store,
        }
        others = {name: value for name, value in os.environ.items() if not name.startswith("SECURE_CELERY_")}
        given = {f"SECURE_CELERY_{name}": str(value) for name, value in values.items()}
        with mock.patch.dict(os.environ, {**others, **given}, clear=True):
            yield
