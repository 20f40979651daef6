"""Certificates and lists as the tools of ``docs/keys.md`` make them are accepted, and its script makes a list."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ...project import envelope, errors, trust
from ...service import ROOT
from .certificates import CLIENT, NOW, WIDE, Pair, authority, revocations, signing, usages

TEXT = (ROOT / "docs/keys.md").read_text(encoding="utf-8")
URI = x509.UniformResourceIdentifier(CLIENT)
STEP = x509.ObjectIdentifier("1.3.6.1.4.1.37476.9000.64.1")
CA = authority()


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])


def leaf(issuer: Pair, key: Any, extensions: list[tuple[x509.ExtensionType, bool]], subject: str = "") -> Pair:
    """Issue a certificate with these extensions, each critical or not, and nothing else."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer.leaf.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(minutes=1))
        .not_valid_after(WIDE[1])
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    certificate = builder.sign(issuer.key, hashes.SHA256())
    return Pair(key, (certificate, *(each for each in issuer.chain if each.issuer != each.subject)))


def identifiers(issuer: Pair, key: Any) -> list[tuple[x509.ExtensionType, bool]]:
    return [
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), False),
    ]


def cert_manager(issuer: Pair, key: Any) -> Pair:
    """No subject, so the names are critical; no extended usage."""
    return leaf(
        issuer,
        key,
        [
            (usages(frozenset({"digital_signature"})), True),
            (x509.BasicConstraints(False, None), True),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), False),
            (x509.SubjectAlternativeName([URI]), True),
        ],
    )


def vault(issuer: Pair, key: Any) -> Pair:
    """No basic constraints."""
    names = x509.SubjectAlternativeName([URI])
    return leaf(
        issuer, key, [(usages(frozenset({"digital_signature"})), True), *identifiers(issuer, key), (names, False)]
    )


def step(issuer: Pair, key: Any) -> Pair:
    """An intermediate CA's, for use in TLS too, and with an extension of its own."""
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return leaf(
        issuer,
        key,
        [
            (usages(frozenset({"digital_signature"})), True),
            (both, False),
            *identifiers(issuer, key),
            (x509.SubjectAlternativeName([URI]), False),
            (x509.UnrecognizedExtension(STEP, bytes.fromhex("3003020101")), False),
        ],
        "client",
    )


KEYS = {
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
}


@pytest.mark.parametrize("profile", [cert_manager, vault, step])
@pytest.mark.parametrize("key", KEYS)
def test_a_certificate_of_each_tool_may_sign(profile: Any, key: str, tmp_path: Path) -> None:
    issuer = authority("intermediate", CA) if profile is step else CA
    pair, other = (profile(issuer, KEYS[key]()) for _ in range(2))
    (tmp_path / "ca.pem").write_bytes(issuer.leaf.public_bytes(Encoding.PEM))
    (tmp_path / "ca.crl").write_bytes(revocations(issuer, other))
    store = trust.Trust.load(tmp_path)
    verified = envelope.Verifier(store, 99_999).verify(envelope.Type.TASK, pair.signer.sign(envelope.Type.TASK, b"{}"))
    assert str(verified.signer.identity) == CLIENT
    with pytest.raises(errors.RevokedSigner):
        store.certificate(other.chain)


def root(key: Any) -> Pair:
    """Make a CA of any key."""
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name("CA"))
        .issuer_name(_name("CA"))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(WIDE[0])
        .not_valid_after(WIDE[1])
        .add_extension(x509.BasicConstraints(True, None), True)
        .add_extension(usages(frozenset({"key_cert_sign", "crl_sign"})), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    ).sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    return Pair(key, (certificate,))


CA_KEYS = {**KEYS, "P-384": lambda: ec.generate_private_key(ec.SECP384R1())}


@pytest.mark.parametrize("key", CA_KEYS)
def test_the_cas_of_the_table_are_accepted_and_another_is_not(key: str) -> None:
    issuer = root(CA_KEYS[key]())
    store, pair = trust.Trust([issuer.leaf]), signing(CLIENT, issuer)
    if key == "Ed25519":
        assert "an Ed25519 CA is refused" in TEXT
        with pytest.raises(errors.UntrustedSigner):
            store.certificate(pair.chain)
    else:
        assert str(store.certificate(pair.chain).identity) == CLIENT


def test_the_script_makes_a_list(tmp_path: Path) -> None:
    (script,) = re.findall(r'```python title="revoke.py"\n(.*?)```', TEXT, re.DOTALL)
    (tmp_path / "revoke.py").write_text(script)
    (tmp_path / "ca.pem").write_bytes(CA.leaf.public_bytes(Encoding.PEM))
    (tmp_path / "ca.key").write_bytes(CA.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    stolen, other = signing(CLIENT, CA), signing(CLIENT, CA)
    command = [sys.executable, "revoke.py", "ca.pem", "ca.key", f"{stolen.leaf.serial_number:x}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    (tmp_path / "ca.crl").write_bytes(done.stdout)
    store = trust.Trust.load(tmp_path)
    assert str(store.certificate(other.chain).identity) == CLIENT
    with pytest.raises(errors.RevokedSigner):
        store.certificate(stolen.chain)
