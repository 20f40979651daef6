"""Signing certificates of every kind a test needs, made in memory."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from ...project import envelope, keys

CLIENT = "spiffe://orders.test/development/orders/client"
WORKER = "spiffe://orders.test/development/orders/worker"
NOW = datetime.now(UTC).replace(microsecond=0)
HOUR = timedelta(hours=1)
WIDE = (NOW - HOUR, NOW + 24 * HOUR)
DIGITAL_SIGNATURE = frozenset({"digital_signature"})


@cache
def key_of(algorithm: str) -> Any:
    """Return one private key per JWS algorithm (making an RSA key takes long)."""
    return {
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
        "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "PS256": lambda: rsa.generate_private_key(65537, 2048),
    }[algorithm]()


@dataclass(frozen=True)
class Pair:
    """A private key and its certificate chain, leaf first."""

    key: Any
    chain: tuple[x509.Certificate, ...]

    @property
    def leaf(self) -> x509.Certificate:
        return self.chain[0]

    @property
    def signer(self) -> envelope.Signer:
        return envelope.Signer(self.key, self.chain)


def usages(names: frozenset[str]) -> x509.KeyUsage:
    every = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
        "encipher_only decipher_only"
    ).split()
    return x509.KeyUsage(**{usage: usage in names for usage in every})


def certificate(
    subject: str,
    key: Any,
    issuer: Pair | None = None,
    *,
    names: Sequence[x509.GeneralName] = (),
    usage: frozenset[str] | None = DIGITAL_SIGNATURE,
    ca: bool = False,
    valid: tuple[datetime, datetime] = WIDE,
    public_key: Any = None,
    serial: int | None = None,
) -> Pair:
    """Issue a certificate; without an issuer it is self-signed."""
    issuer_key = issuer.key if issuer else key
    public_key = public_key or key.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(issuer.leaf.subject if issuer else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .public_key(public_key)
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if usage is not None:
        builder = builder.add_extension(usages(usage), critical=True)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    digest = None if isinstance(issuer_key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    above = issuer.chain if issuer and issuer.leaf.issuer != issuer.leaf.subject else ()
    return Pair(key, (builder.sign(issuer_key, digest), *above))


def authority(name: str = "signing CA", issuer: Pair | None = None, valid: tuple[datetime, datetime] = WIDE) -> Pair:
    """Make a P-256 certificate authority; with an issuer, an intermediate one."""
    key = ec.generate_private_key(ec.SECP256R1())
    return certificate(name, key, issuer, usage=frozenset({"key_cert_sign", "crl_sign"}), ca=True, valid=valid)


def signing(uri: str, issuer: Pair | None, key: Any = None, **options: Any) -> Pair:
    """Issue a certificate that names ``uri``; its key is Ed25519 unless given."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    return certificate(uri.rpartition("/")[2], key, issuer, names=[x509.UniformResourceIdentifier(uri)], **options)


def revocations(
    ca: Pair,
    *revoked: Pair,
    made: datetime = NOW - HOUR,
    due: datetime = WIDE[1],
    extensions: Sequence[x509.ExtensionType] = (),
) -> bytes:
    """Make a CA's revocation list, in PEM; its extensions are critical."""
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.leaf.subject).last_update(made).next_update(due)
    for each in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(each.leaf.serial_number).revocation_date(made)
        builder = builder.add_revoked_certificate(entry.build())
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    digest = None if isinstance(ca.key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(ca.key, digest).public_bytes(Encoding.PEM)


def b64(data: bytes) -> bytes:
    """Encode as JWS does."""
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def x5c(chain: Sequence[x509.Certificate]) -> list[str]:
    """Return the header member for a chain (RFC 7515 section 4.1.6)."""
    return [base64.b64encode(each.public_bytes(Encoding.DER)).decode() for each in chain]


def jws(pair: Pair, header: bytes | dict[str, Any], payload: bytes = b"{}", key: Any = None) -> bytes:
    """Sign any header at all, with the pair's key or another one."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = b64(raw) + b"." + b64(payload)
    return data + b"." + b64(keys.signer(key or pair.key)(data))


def header(pair: Pair, **changes: Any) -> dict[str, Any]:
    """Return the protected header of a genuine task envelope, changed; ``None`` removes a member."""
    genuine = {
        "alg": keys.algorithm_of(pair.leaf.public_key()),
        "typ": envelope.Type.TASK.value,
        "x5c": x5c(pair.chain),
    }
    return {name: value for name, value in (genuine | changes).items() if value is not None}
