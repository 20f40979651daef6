"""PyJWT and joserfc read our envelopes, and we read theirs (RFC 7515, RFC 8037)."""

from __future__ import annotations

from typing import Any

import joserfc.jwk
import joserfc.jws
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from .certificates import header
from .envelopes import ALGORITHMS, CLIENTS, PAYLOAD, TASK, VERIFIER, _verifier

# RFC 9864 renames EdDSA to Ed25519 and joserfc warns; PyJWT and most others know the name of RFC 8037 alone.
_OLD_NAME = pytest.mark.filterwarnings("ignore:EdDSA is deprecated")


@_OLD_NAME
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_pyjwt_and_joserfc_verify_what_we_sign(algorithm: str) -> None:
    pair = CLIENTS[algorithm]
    token = pair.signer.sign(TASK, PAYLOAD).decode()
    decoded = jwt.api_jws.decode_complete(token, pair.leaf.public_key(), algorithms=[algorithm])
    assert decoded["payload"] == PAYLOAD
    assert decoded["header"] == header(pair)
    read = joserfc.jws.deserialize_compact(token, _jwk(pair.key.public_key()), registry=_registry(algorithm))
    assert read.payload == PAYLOAD


@_OLD_NAME
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_we_verify_what_pyjwt_and_joserfc_sign(algorithm: str) -> None:
    pair = CLIENTS[algorithm]
    fields = {name: value for name, value in header(pair).items() if name != "alg"}
    by_pyjwt = jwt.api_jws.encode(PAYLOAD, pair.key, algorithm=algorithm, headers=fields)
    by_joserfc = joserfc.jws.serialize_compact(header(pair), PAYLOAD, _jwk(pair.key), registry=_registry(algorithm))
    for token in (by_pyjwt, by_joserfc):
        assert VERIFIER.verify(TASK, token).payload == PAYLOAD
        assert _verifier().verify(TASK, token.encode()).payload == PAYLOAD


def _jwk(key: Any) -> Any:
    """Return the key as joserfc takes it."""
    match key:
        case ed25519.Ed25519PrivateKey() | ed25519.Ed25519PublicKey():
            kind = joserfc.jwk.OKPKey
        case ec.EllipticCurvePrivateKey() | ec.EllipticCurvePublicKey():
            kind = joserfc.jwk.ECKey
        case _:
            kind = joserfc.jwk.RSAKey
    return kind(key, key)


def _registry(algorithm: str) -> joserfc.jws.JWSRegistry:
    """Return joserfc's settings: its default header limit is smaller than any certificate."""
    registry = joserfc.jws.JWSRegistry(algorithms=[algorithm])
    registry.max_header_length = 16 * 1024
    return registry
