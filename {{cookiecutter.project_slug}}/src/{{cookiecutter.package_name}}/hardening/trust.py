"""Which certificates may sign: path validation against the signing CA, once per header.

Guards against: self-made certificates, certificates of a foreign or the machine's public CAs, certificates without a
SPIFFE ID, CA certificates used to sign messages, and paying for path validation on every message.
Rests on: RFC 5280 path validation by ``cryptography.x509.verification``. Only trust anchors are distributed: the
certificate itself travels in each envelope's header (``x5c``, RFC 7515 section 4.1.6).
Controls: SIG-2, SIG-6, AUT-2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
)

from .errors import ConfigurationRefused, InvalidIdentity, NotValidAtIssue, UntrustedSigner
from .files import read_public_file
from .identity import Identity
from .keys import Verify, algorithm_of, verifier

_SETTING = "security_cert_store"
#: Stores of public CAs: as a signing store they would let anyone with a public certificate sign.
_SYSTEM_STORES = tuple(
    map(Path, ("/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/usr/share/ca-certificates", "/usr/lib/ssl"))
)
#: More trust anchors than any signing PKI has; a bundle of public CAs has over a hundred.
_ANCHORS_MAX = 16


@dataclass(frozen=True, slots=True)
class SignerCertificate:
    """A certificate that leads to the signing CA: who it names, how to verify with it, when it is valid.

    ``not_before`` and ``not_after`` are seconds since the epoch, the narrowest of the path up to the trust anchor.
    """

    identity: Identity
    algorithm: str
    verify: Verify
    not_before: float
    not_after: float

    def check_issue(self, moment: Any) -> None:
        """Return if the certificate was valid at ``moment``, in seconds since the epoch.

        Raises:
            NotValidAtIssue: it was not, or that is no time.
        """
        if not isinstance(moment, int) or not self.not_before <= moment <= self.not_after:
            raise NotValidAtIssue


class Trust:
    """The trust anchors."""

    def __init__(self, anchors: list[x509.Certificate]) -> None:
        if not anchors:
            raise ConfigurationRefused(
                _SETTING, "holds no certificate", "put the signing CA's certificate there", "config.trust"
            )
        self._store = Store(anchors)

    @classmethod
    def load(cls, folder: Path) -> Trust:
        """Load every ``*.pem`` in ``folder``: CA certificates, or self-signed certificates of single signers.

        Raises:
            ConfigurationRefused: the folder is missing, empty, a system store, or holds what is no certificate.
        """
        if not folder.is_absolute() or not folder.is_dir():
            raise ConfigurationRefused(
                _SETTING, f"{folder} is not an absolute path of a folder", "name the folder", "config.trust"
            )
        real = folder.resolve()
        if any(real.is_relative_to(store) for store in _SYSTEM_STORES):
            raise ConfigurationRefused(
                _SETTING,
                f"{folder} is a system certificate store, so every public CA could make signers",
                "use a folder that holds your signing CA alone",
                "config.trust",
            )
        anchors: list[x509.Certificate] = []
        for path in sorted(folder.glob("*.pem")):
            try:
                anchors += x509.load_pem_x509_certificates(read_public_file(_SETTING, path))
            except ValueError as error:
                raise ConfigurationRefused(
                    _SETTING, f"{path} is not a PEM certificate", "replace or remove the file", "config.trust"
                ) from error
        if len(anchors) > _ANCHORS_MAX:
            raise ConfigurationRefused(
                _SETTING,
                f"{folder} holds {len(anchors)} certificates, which looks like a bundle of public CAs",
                f"keep only your signing CAs, {_ANCHORS_MAX} at most",
                "config.trust",
            )
        return cls(anchors)

    def certificate(self, chain: Sequence[x509.Certificate]) -> SignerCertificate:
        """Validate a chain, leaf first, and return what its leaf may be used for.

        Raises:
            UntrustedSigner: no path to a trust anchor, no digital signature usage, a CA, an unsupported key.
            InvalidIdentity: the leaf does not name exactly one SPIFFE ID.
        """
        leaf = chain[0]
        try:
            # Validity is judged per message, at its time of issue; here the path is judged at a time it must hold.
            time = max(certificate.not_valid_before_utc for certificate in chain)
            path = (
                PolicyBuilder()
                .store(self._store)
                .time(time.astimezone(UTC).replace(tzinfo=None))
                .extension_policies(
                    ca_policy=ExtensionPolicy.webpki_defaults_ca(),
                    ee_policy=_LEAF_POLICY,
                )
                .build_client_verifier()
                .verify(leaf, list(chain[1:]))
                .chain
            )
            algorithm = algorithm_of(leaf.public_key())
        except Exception as error:  # VerificationError, and whatever the parser raises on an attacker's certificate
            raise UntrustedSigner from error
        if algorithm is None:
            raise UntrustedSigner
        return SignerCertificate(
            identity=identity_of(leaf),
            algorithm=algorithm,
            verify=verifier(leaf.public_key()),
            not_before=max(certificate.not_valid_before_utc for certificate in path).timestamp(),
            not_after=min(certificate.not_valid_after_utc for certificate in path).timestamp(),
        )


def identity_of(certificate: x509.Certificate) -> Identity:
    """Return the identity a certificate names.

    Raises:
        InvalidIdentity: it has not exactly one URI SAN, or that is no SPIFFE ID of ours.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris: Iterable[str] = names.get_values_for_type(x509.UniformResourceIdentifier)
        (uri,) = uris
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise InvalidIdentity from error
    return Identity.parse(uri)


def _signs_messages(_: Policy, __: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    if usage is None or not usage.digital_signature or usage.key_cert_sign:
        raise ValueError("the certificate is not for signing messages")


def _is_no_authority(_: Policy, __: x509.Certificate, constraints: x509.BasicConstraints | None) -> None:
    if constraints is not None and constraints.ca:
        raise ValueError("a CA signs certificates and no messages")


_LEAF_POLICY = (
    ExtensionPolicy.permit_all()
    .may_be_present(x509.BasicConstraints, Criticality.AGNOSTIC, _is_no_authority)
    .require_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
    .require_present(x509.KeyUsage, Criticality.AGNOSTIC, _signs_messages)
)
