"""Which certificates may sign: path validation against the signing CA, once per header.

Guards against: self-made certificates, certificates of a foreign or the machine's public CAs, certificates without a
SPIFFE ID, CA certificates used to sign messages, stolen keys, and paying for path validation on every message.
Rests on: RFC 5280 path validation by ``cryptography.x509.verification``. Only trust anchors and revocation lists are
distributed: the certificate itself travels in each envelope's header (``x5c``, RFC 7515 section 4.1.6). A revoked
certificate is refused from now on, also for what it signed before: its key's thief chooses the time of issue. Another
service's CA vouches for its own trust domain alone (SPIFFE Trust Domain and Bundle, section 4): it could otherwise name
signers of ours.
Controls: SIG-2, SIG-6, AUT-2, BRK-6.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.verification import Criticality, ExtensionPolicy, Policy, PolicyBuilder, Store

from .errors import ConfigurationRefused, InvalidIdentity, NotValidAtIssue, RevokedSigner, UntrustedSigner
from .files import read_public_file
from .identity import TRUST_DOMAIN, Identity
from .keys import Verify, algorithm_of, costly, verifier

_SETTING = "security_cert_store"
#: Stores of public CAs: as a signing store they would let anyone with a public certificate sign.
_SYSTEM_STORES = ("/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/usr/share/ca-certificates", "/usr/lib/ssl")
#: More trust anchors than any signing PKI has; a bundle of public CAs has over a hundred.
_ANCHORS_MAX = 16
#: How long a revocation list is still used after its next one was due; an event says so meanwhile.
GRACE = timedelta(hours=24)
_FIX = "put the CA's current revocation list there"
_CLOCK_SKEW = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class SignerCertificate:
    """A certificate that leads to the signing CA: who it names, how to verify with it, when it is valid.

    ``not_before`` and ``not_after`` are seconds since the epoch, the narrowest of the path up to the trust anchor. From
    ``unknown_from`` on nobody knows whether it has been revoked.
    """

    identity: Identity
    algorithm: str
    verify: Verify
    not_before: float
    not_after: float
    unknown_from: float = math.inf

    def check_issue(self, moment: Any) -> None:
        """Return if the certificate was valid at ``moment``, in seconds since the epoch.

        Raises:
            NotValidAtIssue: it was not, or that is no time.
        """
        if not isinstance(moment, int) or not self.not_before <= moment <= self.not_after:
            ends = (datetime.fromtimestamp(end, UTC).isoformat() for end in (self.not_before, self.not_after))
            raise NotValidAtIssue(f"it is valid from {' to '.join(ends)}")


@dataclass(frozen=True, slots=True)
class RevocationList:
    """The serial numbers that a CA has revoked (RFC 5280 section 5), made and due to be replaced at these times."""

    made: datetime
    due: datetime
    serials: frozenset[int]


class Trust:
    """The trust anchors, and what they have revoked."""

    def __init__(
        self,
        anchors: Sequence[x509.Certificate],
        others: Sequence[tuple[str, x509.Certificate]] = (),
        lists: Iterable[tuple[bytes, RevocationList]] = (),
    ) -> None:
        """Take our anchors, those of ``others`` and revocation lists.

        Each of the others' comes with the one trust domain whose signers it may name, each list with the public key of
        the CA that signed it.
        """
        everyone = [*anchors, *(anchor for _, anchor in others)]
        if not everyone:
            raise _refused("holds no certificate", "put the signing CA's certificate there")
        self._verification = _VERIFICATION.store(Store(everyone))
        self._anchors, self._others = anchors, others
        self._keys = frozenset(map(_key, everyone))
        self.lists = dict(sorted(lists, key=lambda each: each[1].made))  # of two of one CA, the newer
        self.unlisted = any(_is_ca(anchor) and _key(anchor) not in self.lists for anchor in everyone)

    @classmethod
    def load(cls, folder: Path) -> Trust:
        """Load every ``*.pem`` in ``folder``: CA certificates, or self-signed certificates of single signers.

        And every ``*.crl``: a revocation list of one of those CAs. The CAs in a folder of it named like a trust domain,
        ``orders.test/*.pem``, are trusted for that one alone.

        Raises:
            ConfigurationRefused: the folder is missing, empty, a system store, or holds what is no certificate, or a
                revocation list that cannot be relied on.
        """
        if not folder.is_absolute() or not folder.is_dir():
            raise _refused(f"{folder} is not an absolute path of a folder", "name the folder")
        real = folder.resolve()
        if any(real.is_relative_to(store) for store in _SYSTEM_STORES):
            reason = f"{folder} is a system certificate store, so every public CA could make signers"
            raise _refused(reason, "use a folder that holds your signing CA alone")
        anchors: list[x509.Certificate] = []
        others: list[tuple[str, x509.Certificate]] = []
        # Kubernetes keeps a volume's files in a folder `..data` of it, too, which is no trust domain.
        foreign = [path for path in folder.glob("*/*.pem") if re.fullmatch(TRUST_DOMAIN, path.parent.name)]
        for path in sorted([*folder.glob("*.pem"), *foreign]):
            try:
                found = x509.load_pem_x509_certificates(read_public_file(_SETTING, path))
            except ValueError as error:
                raise _refused(f"{path} is not a PEM certificate", "replace or remove the file") from error
            anchors += found if path.parent == folder else []
            others += [(path.parent.name, anchor) for anchor in found if path.parent != folder]
        everyone = [*anchors, *(anchor for _, anchor in others)]
        if len(everyone) > _ANCHORS_MAX:
            reason = f"{folder} holds {len(everyone)} certificates, which looks like a bundle of public CAs"
            raise _refused(reason, f"keep only your signing CAs, {_ANCHORS_MAX} at most")
        lists = [*folder.glob("*.crl"), *folder.glob("*/*.crl")]
        return cls(anchors, others, [_revocation_list(path, everyone) for path in sorted(lists)])

    def check_follows(self, before: Trust) -> None:
        """Check that what ``before`` knew of revocation is not lost, as it is while files are being copied.

        Raises:
            ConfigurationRefused: a CA is still trusted, and its list is gone or older.
        """
        for key in before.lists.keys() & self._keys:
            if key not in self.lists or self.lists[key].made < before.lists[key].made:
                raise _refused("a CA's list is gone, or older than before", _FIX)

    def certificate(self, chain: Sequence[x509.Certificate]) -> SignerCertificate:
        """Validate a chain, leaf first, and return what its leaf may be used for.

        Raises:
            UntrustedSigner: no path to a trust anchor, no digital signature usage, a CA, an unsupported key.
            RevokedSigner: a certificate of the path is revoked.
            InvalidIdentity: the leaf does not name exactly one SPIFFE ID.
        """
        leaf = chain[0]
        try:
            if any(costly(certificate.public_key()) for certificate in chain):
                raise UntrustedSigner
            # Validity is judged per message, at its time of issue; here the path is judged at a time it must hold.
            time = max(certificate.not_valid_before_utc for certificate in chain)
            verification = self._verification.time(time.astimezone(UTC).replace(tzinfo=None)).build_client_verifier()
            path = verification.verify(leaf, list(chain[1:])).chain
            algorithm = algorithm_of(leaf.public_key())
        except Exception as error:  # VerificationError, and whatever the parser raises on an attacker's certificate
            raise UntrustedSigner from error
        if algorithm is None:
            raise UntrustedSigner
        lists = [(each, self.lists[_key(issuer)]) for each, issuer in pairwise(path) if _key(issuer) in self.lists]
        if any(each.serial_number in revoked.serials for each, revoked in lists):
            raise RevokedSigner
        identity = identity_of(leaf)
        if path[-1] not in self._anchors and (identity.trust_domain, path[-1]) not in self._others:
            raise UntrustedSigner("for this trust domain")
        return SignerCertificate(
            identity=identity,
            algorithm=algorithm,
            verify=verifier(leaf.public_key()),
            not_before=max(certificate.not_valid_before_utc for certificate in path).timestamp(),
            not_after=min(certificate.not_valid_after_utc for certificate in path).timestamp(),
            unknown_from=min(((each.due + GRACE).timestamp() for _, each in lists), default=math.inf),
        )


def _refused(reason: str, fix: str) -> ConfigurationRefused:
    return ConfigurationRefused(_SETTING, reason, fix, "config.trust")


def _key(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _is_ca(certificate: x509.Certificate) -> bool:
    return any(isinstance(each.value, x509.BasicConstraints) and each.value.ca for each in certificate.extensions)


def _revocation_list(path: Path, anchors: list[x509.Certificate]) -> tuple[bytes, RevocationList]:
    """Return the key of the CA whose list the file holds, and the list."""

    def refuse(reason: str) -> ConfigurationRefused:
        return _refused(f"{path} {reason}", _FIX)

    content = read_public_file(_SETTING, path)
    try:
        if content.count(b"-----BEGIN X509 CRL-----") != 1:
            raise ValueError
        crl = x509.load_pem_x509_crl(content)
        partial = any(each.critical and not _is_whole(each.value) for each in crl.extensions)
        serials = frozenset(entry.serial_number for entry in crl)
    except Exception as error:  # a parser's, of which some are no ValueError
        raise refuse("is not one PEM certificate revocation list") from error
    issuer = next((anchor for anchor in anchors if _has_signed(anchor, crl)), None)
    now = datetime.now(UTC)
    if issuer is None:
        raise refuse("is not signed by a CA of the store")
    if partial:
        raise refuse("is not the whole list of its CA")
    if crl.next_update_utc is None or now > crl.next_update_utc + GRACE:
        raise refuse("is out of date")
    if crl.last_update_utc > now + _CLOCK_SKEW:
        raise refuse("is from the future")
    return _key(issuer), RevocationList(crl.last_update_utc, crl.next_update_utc, serials)


def _has_signed(anchor: x509.Certificate, crl: x509.CertificateRevocationList) -> bool:
    try:
        usage = anchor.extensions.get_extension_for_class(x509.KeyUsage).value
        # cryptography refuses keys that sign no certificates with a TypeError, which mypy knows of
        return usage.crl_sign and crl.issuer == anchor.subject and crl.is_signature_valid(anchor.public_key())  # type: ignore[arg-type]
    except (x509.ExtensionNotFound, TypeError):
        return False


def _is_whole(extension: x509.ExtensionType) -> bool:
    """Whether a critical extension takes nothing from a list; one that we do not know might (RFC 5280 section 5.2)."""
    limits = "indirect_crl", "only_some_reasons", "only_contains_ca_certs", "only_contains_attribute_certs"
    return isinstance(extension, x509.IssuingDistributionPoint) and not any(getattr(extension, each) for each in limits)


def identity_of(certificate: x509.Certificate) -> Identity:
    """Return the identity a certificate names.

    Raises:
        InvalidIdentity: it has not exactly one URI SAN, or that is no SPIFFE ID of ours.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
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
_CA_POLICY = ExtensionPolicy.webpki_defaults_ca()
_VERIFICATION = PolicyBuilder().extension_policies(ca_policy=_CA_POLICY, ee_policy=_LEAF_POLICY)
