"""The envelope: a compact JWS whose header carries the signer's certificate chain.

Guards against: messages altered, made or replayed as another kind of message by whoever can write to the broker.
Rests on: RFC 7515 (compact serialization, ``x5c``), RFC 8037 (EdDSA), RFC 7518 (ES256, PS256), RFC 8725 (explicit
typing; the verifier, not the message, decides algorithm and type).
Controls: SIG-1, SIG-6, INT-2, SER-2, SER-3.

A header that was verified once is remembered byte for byte, so a message from a known signer costs one signature check
and no parsing of anything an attacker wrote.
"""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from threading import Lock
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding

from .errors import BadSignature, Malformed, RevocationUnknown, TooLarge, Unsigned, UntrustedSigner, WrongType
from .identity import Identity
from .keys import algorithm_of, signer
from .trust import SignerCertificate, Trust, identity_of

#: Content type of an envelope (RFC 7515 section 9.2.1).
CONTENT_TYPE = "application/jose"

_COMPACT = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_HEADER_MAX = 16 * 1024  # bytes; three RSA-4096 certificates fit
#: Longest chain an envelope may carry, in certificates.
CHAIN_MAX = 3
_HEADERS_MAX = 256 * 1024  # bytes; a quarantined message's own, one frame in base64 twice
_CACHE_MAX = 1024  # headers


class Type(StrEnum):
    """What an envelope is; each door accepts one."""

    TASK = "celery-task+jws"
    RESULT = "celery-result+jws"
    CONTROL = "celery-control+jws"
    REPLY = "celery-reply+jws"
    EVENT = "celery-event+jws"
    QUARANTINE = "celery-quarantine+jws"
    RELEASE = "celery-release+jws"


@dataclass(frozen=True, slots=True)
class Verified:
    """A payload whose signature holds, and the certificate it holds under."""

    payload: bytes
    signer: SignerCertificate


class Signer:
    """A private key with its certificate chain."""

    def __init__(self, key: PrivateKeyTypes, chain: Sequence[x509.Certificate]) -> None:
        """Take a key and its chain, leaf first.

        Raises:
            TypeError: the key is not Ed25519, P-256 or RSA, or is not the leaf's.
            InvalidIdentity: the leaf does not name exactly one SPIFFE ID.
        """
        algorithm = algorithm_of(chain[0].public_key())
        if algorithm is None or key.public_key() != chain[0].public_key():
            raise TypeError("the key is not the certificate's")
        self.identity: Identity = identity_of(chain[0])
        self.chain = tuple(chain)
        self._sign = signer(key)
        x5c = [base64.b64encode(certificate.public_bytes(Encoding.DER)).decode("ascii") for certificate in chain]
        self._headers = {
            kind: _b64(json.dumps({"alg": algorithm, "typ": kind, "x5c": x5c}, separators=(",", ":")).encode("ascii"))
            for kind in Type
        }

    def sign(self, kind: Type, payload: bytes) -> bytes:
        """Return the compact JWS of ``payload``."""
        data = self._headers[kind] + b"." + _b64(payload)
        return data + b"." + _b64(self._sign(data))


class Verifier:
    """Verifies envelopes of any signer that ``trust`` leads to."""

    def __init__(self, trust: Trust, max_bytes: int) -> None:
        """Take the trust anchors and the size of the longest message, in bytes."""
        self._trust = trust
        self._max_bytes = dict.fromkeys(Type, max_bytes)
        self._max_bytes[Type.QUARANTINE] = 2 * max_bytes + _HEADERS_MAX  # holds a message, in base64 twice
        self._known: OrderedDict[tuple[Type, bytes], SignerCertificate] = OrderedDict()
        self._lock = Lock()

    def verify(self, kind: Type, token: bytes | str) -> Verified:
        """Verify a compact JWS of type ``kind``.

        Raises:
            TooLarge: longer than the limit (checked before anything else).
            Unsigned, Malformed, WrongType, BadSignature: see each.
            UntrustedSigner, RevokedSigner, RevocationUnknown, InvalidIdentity: see each.
        """
        if len(token) > self._max_bytes[kind]:
            raise TooLarge
        if isinstance(token, str):
            token = token.encode("ascii", "replace")
        if not _COMPACT.fullmatch(token):
            raise Unsigned
        header, payload, signature = token.split(b".")
        certificate = self.certificate(kind, header)
        if not certificate.verify(_unb64(signature), token[: len(header) + 1 + len(payload)]):
            raise BadSignature
        # Not earlier: whoever has seen a certificate could otherwise push every known signer out of the memory.
        with self._lock:
            self._known[kind, header] = certificate
            self._known.move_to_end((kind, header))
            if len(self._known) > _CACHE_MAX:
                self._known.popitem(last=False)
        return Verified(_unb64(payload), certificate)

    def certificate(self, kind: Type, header: bytes) -> SignerCertificate:
        """Return the certificate of a protected header, which is trusted and not revoked now; raises as ``verify``."""
        with self._lock:
            certificate = self._known.get((kind, header))
        if certificate is None:
            algorithm, chain = _open(kind, header)
            certificate = self._trust.certificate(chain)
            if algorithm != certificate.algorithm:
                raise BadSignature
        if time.time() > certificate.unknown_from:
            raise RevocationUnknown
        return certificate


def enveloped(message: Any, max_bytes: float = math.inf) -> bytes:
    """Return a delivered message's body; ``max_bytes`` is judged before anything else of it.

    Raises:
        MessageRefused: the intake's refusal, TooLarge, or Unsigned: it does not even look like an envelope.
    """
    body = message.body
    if message.refusal is not None:
        raise message.refusal
    if body is not None and len(body) > max_bytes:
        raise TooLarge
    if message.content_type != CONTENT_TYPE or not isinstance(body, bytes | str | memoryview):
        raise Unsigned
    return body.encode("ascii", "replace") if isinstance(body, str) else bytes(body)


def _open(kind: Type, header: bytes) -> tuple[object, list[x509.Certificate]]:
    """Return the algorithm a protected header names and the certificates it carries, none of it trusted yet."""
    if len(header) > _HEADER_MAX:
        raise Malformed
    fields = _parse(header)
    if not isinstance(fields, dict) or fields.keys() != {"alg", "typ", "x5c"}:
        raise Malformed
    if fields["typ"] != kind:
        raise WrongType
    x5c = fields["x5c"]
    if not isinstance(x5c, list) or not 1 <= len(x5c) <= CHAIN_MAX or not all(isinstance(c, str) for c in x5c):
        raise Malformed
    try:
        return fields["alg"], [_certificate(text) for text in x5c]
    except Exception as error:  # the certificate is the attacker's; its parser raises ValueError and more
        raise UntrustedSigner from error


def _certificate(text: str) -> x509.Certificate:
    der = base64.b64decode(text, validate=True)
    if base64.b64encode(der) != text.encode("ascii"):  # some versions of Python take more padding than there is
        raise ValueError
    return x509.load_der_x509_certificate(der)


def _parse(header: bytes) -> object:
    """Parse the protected header; a duplicate member is refused (RFC 7515 section 4)."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        return json.loads(_unb64(header).decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Malformed from error


def _b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _unb64(data: bytes) -> bytes:
    """Decode base64url without padding; a second spelling of the same bytes is refused (RFC 7515 section 2)."""
    try:
        decoded = base64.urlsafe_b64decode(data + b"=" * (-len(data) % 4))
    except ValueError as error:
        raise Malformed from error
    if _b64(decoded) != data:
        raise Malformed
    return decoded
