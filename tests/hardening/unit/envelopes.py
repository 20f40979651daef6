"""A CA's signers, one envelope, and who verifies it: what the tests of envelopes share."""

from __future__ import annotations

from typing import Any

import pytest

from ...project import envelope, errors, trust
from .certificates import CLIENT, authority, key_of, signing

TASK = envelope.Type.TASK
ALGORITHMS = ["EdDSA", "ES256", "PS256"]
CA = authority()
CLIENTS = {algorithm: signing(CLIENT, CA, key_of(algorithm)) for algorithm in ALGORITHMS}
PAIR = CLIENTS["EdDSA"]
PAYLOAD = b'{"a":1}'
TOKEN = PAIR.signer.sign(TASK, PAYLOAD)
MAX = 64 * 1024


def _verifier(**options: Any) -> envelope.Verifier:
    return envelope.Verifier(trust.Trust([CA.leaf]), options.get("max_bytes", MAX))


VERIFIER = _verifier()


def _refused(leaf: type[errors.MessageRefused], token: bytes | str, kind: envelope.Type = TASK) -> None:
    """Assert the same refusal from a verifier that has seen the signer and from one that has not."""
    for verifier in (VERIFIER, _verifier()):
        with pytest.raises(errors.MessageRefused) as caught:
            verifier.verify(kind, token)
        assert type(caught.value) is leaf
