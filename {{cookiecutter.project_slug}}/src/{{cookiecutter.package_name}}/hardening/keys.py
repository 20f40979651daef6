"""Signing keys and the algorithm that follows from each.

Guards against: algorithm confusion. The message never chooses: Ed25519 means EdDSA, P-256 means ES256, RSA means PS256,
and any other key is no signing key (RFC 7518 section 3, RFC 8037 section 3.1, RFC 8725 section 3.1). RFC 9864 has since
named the same algorithm ``Ed25519``; PyJWT knows only ``EdDSA``, and what goes over the wire is one name and no choice.
Rests on: ``cryptography`` for the primitives.
Controls: SIG-1, SIG-2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

#: Signs bytes.
Sign = Callable[[bytes], bytes]
#: ``verify(signature, data)`` says whether the signature fits.
Verify = Callable[[bytes, bytes], bool]

_RSA_BITS_MIN, _RSA_BITS_MAX, _EXPONENT = 2048, 4096, 65537
_P256_BYTES = 32
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=hashes.SHA256.digest_size)
_ECDSA = ec.ECDSA(hashes.SHA256())


def algorithm_of(key: PublicKeyTypes) -> str | None:
    """Return the one JWS algorithm this public key may be used with, or None if it is no signing key."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "EdDSA"
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return "ES256"
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _RSA_BITS_MIN and not costly(key):
        return "PS256"
    return None


def costly(key: PublicKeyTypes) -> bool:
    """Say whether checking a signature takes far longer than usual, as an RSA key's maker can see to."""
    return isinstance(key, rsa.RSAPublicKey) and (key.key_size > _RSA_BITS_MAX or key.public_numbers().e > _EXPONENT)


def signer(key: PrivateKeyTypes) -> Sign:
    """Return the function that signs with ``key``.

    Raises:
        TypeError: ``key`` is not of a supported type.
    """
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return lambda data: _to_jose(key.sign(data, _ECDSA))
    if isinstance(key, rsa.RSAPrivateKey):
        return lambda data: key.sign(data, _PSS, hashes.SHA256())
    raise TypeError(f"{type(key).__name__} is not a signing key")


def verifier(key: PublicKeyTypes) -> Verify:
    """Return the function that verifies with ``key``, which :func:`algorithm_of` has accepted.

    Raises:
        TypeError: ``key`` is not of a supported type.
    """
    check: Callable[[bytes, bytes], None]
    if isinstance(key, ed25519.Ed25519PublicKey):
        check = key.verify
    elif isinstance(key, ec.EllipticCurvePublicKey):
        check = partial(_verify_jose, key)
    elif isinstance(key, rsa.RSAPublicKey):
        check = partial(key.verify, padding=_PSS, algorithm=hashes.SHA256())
    else:
        raise TypeError(f"{type(key).__name__} is not a signing key")

    def verify(signature: bytes, data: bytes) -> bool:
        try:
            check(signature, data)
        except InvalidSignature:
            return False
        return True

    return verify


def _to_jose(der: bytes) -> bytes:
    """Turn a DER ECDSA signature into the two fixed-length integers of RFC 7518 section 3.4."""
    r, s = utils.decode_dss_signature(der)
    return r.to_bytes(_P256_BYTES, "big") + s.to_bytes(_P256_BYTES, "big")


def _verify_jose(key: ec.EllipticCurvePublicKey, signature: bytes, data: bytes) -> None:
    if len(signature) != 2 * _P256_BYTES:
        raise InvalidSignature
    r, s = (int.from_bytes(half, "big") for half in (signature[:_P256_BYTES], signature[_P256_BYTES:]))
    key.verify(utils.encode_dss_signature(r, s), data, _ECDSA)
