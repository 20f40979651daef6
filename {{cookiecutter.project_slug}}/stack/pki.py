"""A throw-away public key infrastructure: one CA for TLS, another one for signing, what they issue and revoke.

Guards against: a TLS certificate that passes for a signer, or the other way round: the two CAs do not know each other.
Rests on: P-256 keys, the cheapest to verify with among the short ones, and a lifetime of a few days.
The CAs' keys are files of mode 0600 in the stack's ignored folder: ours, so that a worker that runs as another account
can issue nothing.
Controls: TLS-1, TLS-2, SIG-6.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .account import Account, own_folder, write_own

LIFETIME = timedelta(days=7)
#: Clocks differ, also between a host and its containers.
SKEW = timedelta(minutes=5)

PrivateKey = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Pair:
    """The files of a certificate and its private key, both PEM."""

    certificate: Path
    key: Path

    @property
    def serial(self) -> int:
        """The certificate's serial number, by which it is revoked."""
        return x509.load_pem_x509_certificate(self.certificate.read_bytes()).serial_number


class Authority:
    """A certificate authority whose files, and those of what it issues, live in one folder."""

    def __init__(self, folder: Path, name: str, account: Account) -> None:
        """Make the key and the self-signed certificate, or take those that the folder has."""
        self.folder = own_folder(folder)
        self.account = account
        self.certificate, self.revocations = folder / "ca.pem", folder / "ca.crl"
        key = folder / "ca-key.pem"
        if key.exists():
            self.root = x509.load_pem_x509_certificate(self.certificate.read_bytes())
            self.key = cast(PrivateKey, load_pem_private_key(key.read_bytes(), password=None))
            return
        self.key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.root = (
            _builder(subject, subject, self.key, self.key, (now - SKEW, now + LIFETIME))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        write_own(self.certificate, self.root.public_bytes(Encoding.PEM), 0o644)
        self.revoke()
        write_own(key, _pem(self.key), 0o600)

    def server(self, name: str, hosts: tuple[str, ...], valid: tuple[datetime, datetime] | None = None) -> Pair:
        """Issue a TLS server certificate for these addresses and host names."""
        return self._issue(name, _hosts(hosts), ExtendedKeyUsageOID.SERVER_AUTH, valid)

    def client(self, name: str, valid: tuple[datetime, datetime] | None = None) -> Pair:
        """Issue a TLS client certificate; the common name is the account it logs in to."""
        return self._issue(name, [x509.DNSName(name)], ExtendedKeyUsageOID.CLIENT_AUTH, valid)

    def signer(self, name: str, identity: str, valid: tuple[datetime, datetime] | None = None) -> Pair:
        """Issue a signing certificate whose one subject alternative name is ``identity``, a SPIFFE ID."""
        return self._issue(name, [x509.UniformResourceIdentifier(identity)], None, valid)

    def revoke(self, *serials: int) -> Path:
        """Add certificates to the revocation list, and return its file."""
        now = datetime.now(UTC)
        revoked = [*x509.load_pem_x509_crl(self.revocations.read_bytes())] if self.revocations.exists() else []
        for serial in {*serials} - {each.serial_number for each in revoked}:
            revoked.append(x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build())
        signed = x509.CertificateRevocationListBuilder(
            self.root.subject, now, self.root.not_valid_after_utc, revoked_certificates=revoked
        ).sign(self.key, hashes.SHA256())
        return write_own(self.revocations, signed.public_bytes(Encoding.PEM), 0o644)

    def _issue(
        self,
        name: str,
        names: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier | None,
        valid: tuple[datetime, datetime] | None,
    ) -> Pair:
        now, key = datetime.now(UTC), ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            _builder(subject, self.root.subject, key, self.key, valid or (now - SKEW, now + LIFETIME))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage("digital_signature"), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        return Pair(
            write_own(self.folder / f"{name}.pem", certificate.public_bytes(Encoding.PEM), 0o644),
            self.account.write(self.folder / f"{name}-key.pem", _pem(key)),
        )


class Pki:
    """The stack's two authorities. ``authority()`` makes more of them, for tests of what must be refused."""

    def __init__(self, folder: Path, account: Account) -> None:
        self.folder = own_folder(folder)
        self.account = account
        self.tls = self.authority("tls")
        self.signing = self.authority("signing")
        # A folder of trust anchors and their revocation lists, and of nothing else.
        self.store = folder / "signing-store"
        if not self.store.exists():
            own_folder(self.store, 0o755)
            write_own(self.store / "ca.pem", self.signing.certificate.read_bytes(), 0o644)
            self.revoke()

    def revoke(self, *serials: int) -> None:
        """Revoke signing certificates: whoever trusts the store refuses them within seconds."""
        write_own(self.store / "ca.crl", self.signing.revoke(*serials).read_bytes(), 0o644)

    def authority(self, name: str) -> Authority:
        """Make an authority of its own key in ``<folder>/<name>``, or take it from there."""
        return Authority(self.folder / name, f"throw-away {name} CA", self.account)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, issuer_key: PrivateKey, valid: tuple[datetime, datetime]
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _key_usage(*usages: str) -> x509.KeyUsage:
    every = list(inspect.signature(x509.KeyUsage).parameters)
    return x509.KeyUsage(**{usage: usage in usages for usage in every})


def _hosts(hosts: tuple[str, ...]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def _pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
