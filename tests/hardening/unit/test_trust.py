"""Which certificates may sign, and from where to when."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding

from stack.account import Account
from stack.pki import Pki

from ...project import errors, trust
from .certificates import (
    CLIENT,
    HOUR,
    NOW,
    WIDE,
    WORKER,
    Pair,
    authority,
    certificate,
    key_of,
    signing,
)

CA = authority()
TRUST = trust.Trust([CA.leaf])


def _untrusted(pair: Pair, store: trust.Trust = TRUST) -> None:
    with pytest.raises(errors.UntrustedSigner):
        store.certificate(pair.chain)


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "PS256"])
def test_a_leaf_of_the_signing_ca_may_sign(algorithm: str) -> None:
    trusted = TRUST.certificate(signing(CLIENT, CA, key_of(algorithm)).chain)
    assert str(trusted.identity) == CLIENT
    assert trusted.algorithm == algorithm
    assert (trusted.not_before, trusted.not_after) == tuple(moment.timestamp() for moment in WIDE)


def test_a_self_made_certificate_may_not() -> None:
    _untrusted(signing(CLIENT, None))
    _untrusted(signing(CLIENT, authority()))  # the same subject, another key
    lookalike = authority()
    _untrusted(Pair(lookalike.key, (*signing(CLIENT, lookalike).chain, CA.leaf)))


def test_a_ca_certificate_may_not_sign_messages() -> None:
    _untrusted(CA)
    named = [x509.UniformResourceIdentifier(CLIENT)]
    both = frozenset({"digital_signature", "key_cert_sign"})
    key = key_of("ES256")
    _untrusted(certificate("x", key, CA, names=named, usage=both, ca=True))
    _untrusted(certificate("x", key, CA, names=named, usage=both))
    _untrusted(certificate("x", key, CA, names=named, ca=True))


@pytest.mark.parametrize("usage", [None, frozenset({"key_encipherment"}), frozenset({"content_commitment"})])
def test_a_certificate_without_the_digital_signature_usage_may_not(usage: frozenset[str] | None) -> None:
    _untrusted(signing(CLIENT, CA, usage=usage))


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(ec.generate_private_key(ec.SECP384R1()), id="P-384"),
        pytest.param(rsa.generate_private_key(65537, 1024), id="RSA-1024"),
        pytest.param(ed448.Ed448PrivateKey.generate(), id="Ed448"),
    ],
)
def test_a_certificate_of_an_unsupported_key_may_not(key: Any) -> None:
    _untrusted(signing(CLIENT, CA, key))


def test_a_certificate_of_a_key_that_cannot_sign_may_not() -> None:
    _untrusted(signing(CLIENT, CA, public_key=x25519.X25519PrivateKey.generate().public_key()))


def test_a_leaf_cannot_issue_another_signer() -> None:
    """A stolen client key makes no worker, whatever issued it."""
    client = signing(CLIENT, CA, key_of("ES256"))
    forged = certificate("x", key_of("EdDSA"), client, names=[x509.UniformResourceIdentifier(WORKER)])
    _untrusted(Pair(forged.key, (forged.leaf, client.leaf)))
    pinned = signing(CLIENT, None, key_of("ES256"))
    forged = certificate("x", key_of("EdDSA"), pinned, names=[x509.UniformResourceIdentifier(WORKER)])
    _untrusted(Pair(forged.key, (forged.leaf, pinned.leaf)), trust.Trust([CA.leaf, pinned.leaf]))
    _untrusted(Pair(forged.key, (forged.leaf,)), trust.Trust([CA.leaf, pinned.leaf]))


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(rsa.RSAPublicNumbers(65537, 2**8191 + 1), id="RSA-8192"),
        pytest.param(rsa.RSAPublicNumbers(2**64 + 1, 2**2047 + 1), id="long exponent"),
    ],
)
def test_no_key_of_a_chain_may_take_long_to_verify_with(numbers: rsa.RSAPublicNumbers) -> None:
    """A chain comes with a message, so anyone who can publish one chooses its keys."""
    pair = signing(CLIENT, CA)
    slow = certificate("slow", key_of("PS256"), public_key=numbers.public_key(), ca=True)
    assert TRUST.certificate((pair.leaf, certificate("usual", key_of("PS256"), ca=True).leaf))
    _untrusted(Pair(pair.key, (pair.leaf, slow.leaf)))
    _untrusted(signing(CLIENT, CA, public_key=numbers.public_key()))


def test_the_other_authoritys_certificates_may_not(tmp_path: Path) -> None:
    """The TLS client certificate of a genuine account, which the CA for signing has never seen."""
    pki = Pki(tmp_path / "pki", Account("tests", 0, 0, switch=False))
    store = trust.Trust.load(pki.store)
    tls = x509.load_pem_x509_certificate(pki.tls.client("orders.client").certificate.read_bytes())
    own = x509.load_pem_x509_certificate(pki.signing.signer("client", CLIENT).certificate.read_bytes())
    assert str(store.certificate([own]).identity) == CLIENT
    for chain in ([tls], [tls, pki.tls.root], [tls, pki.signing.root], [pki.tls.root], [pki.signing.root]):
        with pytest.raises(errors.UntrustedSigner):
            store.certificate(chain)


# --- self-signed ------------------------------------------------------------------------------------------------------


def test_a_self_signed_certificate_may_sign_if_it_is_in_the_store() -> None:
    pair = signing(CLIENT, None)
    assert str(trust.Trust([CA.leaf, pair.leaf]).certificate(pair.chain).identity) == CLIENT
    _untrusted(pair)


def test_a_self_signed_certificate_of_the_same_name_and_another_key_may_not() -> None:
    pair = signing(CLIENT, None)
    _untrusted(signing(CLIENT, None), trust.Trust([pair.leaf]))


# --- identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        [],
        [x509.DNSName("client")],
        [x509.UniformResourceIdentifier("https://orders.test/client")],
        [x509.UniformResourceIdentifier(CLIENT), x509.UniformResourceIdentifier(WORKER)],
        [x509.UniformResourceIdentifier(CLIENT), x509.UniformResourceIdentifier(CLIENT)],
    ],
    ids=["none", "dns", "https", "two", "the same twice"],
)
def test_a_certificate_names_exactly_one_spiffe_id(names: list[x509.GeneralName]) -> None:
    pair = certificate("x", key_of("EdDSA"), CA, names=names)
    with pytest.raises(errors.InvalidIdentity):
        trust.identity_of(pair.leaf)
    with pytest.raises(errors.MessageRefused):
        TRUST.certificate(pair.chain)


def test_names_of_other_kinds_beside_the_spiffe_id_do_no_harm() -> None:
    names = [x509.DNSName("client"), x509.UniformResourceIdentifier(CLIENT)]
    assert str(TRUST.certificate(certificate("x", key_of("EdDSA"), CA, names=names).chain).identity) == CLIENT


# --- validity ---------------------------------------------------------------------------------------------------------


def _window(pair: Pair, *anchors: Pair) -> tuple[datetime, datetime]:
    trusted = trust.Trust([anchor.leaf for anchor in anchors]).certificate(pair.chain)
    return tuple(datetime.fromtimestamp(at, NOW.tzinfo) for at in (trusted.not_before, trusted.not_after))  # type: ignore[return-value]  # two


def test_an_expired_certificate_keeps_its_window_for_what_it_signed_then() -> None:
    old = authority(valid=(NOW - 10 * HOUR, NOW + HOUR))
    window = (NOW - 3 * HOUR, NOW - HOUR)
    assert _window(signing(CLIENT, old, valid=window), old) == window


def test_a_certificate_cannot_outlive_its_ca() -> None:
    """Otherwise a stolen key of an expired CA could issue signers that are valid for ever."""
    old = authority(valid=(NOW - 10 * HOUR, NOW - HOUR))
    pair = signing(CLIENT, old, valid=(NOW - 2 * HOUR, NOW + 1000 * HOUR))
    assert _window(pair, old) == (NOW - 2 * HOUR, NOW - HOUR)


def test_a_certificate_cannot_outlive_its_intermediate_ca() -> None:
    root = authority(valid=(NOW - 10 * HOUR, NOW + 10 * HOUR))
    middle = authority("middle", root, valid=(NOW - 3 * HOUR, NOW - HOUR))
    assert _window(signing(CLIENT, middle, valid=(NOW - 2 * HOUR, NOW + HOUR)), root) == (NOW - 2 * HOUR, NOW - HOUR)


def test_a_certificate_issued_after_its_ca_expired_may_not_sign() -> None:
    old = authority(valid=(NOW - 10 * HOUR, NOW - 5 * HOUR))
    _untrusted(signing(CLIENT, old), trust.Trust([old.leaf]))


def test_a_foreign_certificate_in_the_chain_widens_nothing() -> None:
    pair = signing(CLIENT, CA)
    foreign = authority(valid=(NOW - 100 * HOUR, NOW + 100 * HOUR))
    assert _window(Pair(pair.key, (pair.leaf, foreign.leaf)), CA) == WIDE


# --- the store --------------------------------------------------------------------------------------------------------


def _pem(*pairs: Pair) -> bytes:
    return b"".join(pair.leaf.public_bytes(Encoding.PEM) for pair in pairs)


def _store_refused(folder: Path, reason: str) -> None:
    with pytest.raises(errors.ConfigurationRefused, match=reason) as caught:
        trust.Trust.load(folder)
    assert caught.value.setting == "security_cert_store"
    assert caught.value.code == "config.trust"


def test_every_pem_file_of_the_folder_is_an_anchor_and_a_file_may_hold_several(tmp_path: Path) -> None:
    second, third = authority(), authority()
    (tmp_path / "a.pem").write_bytes(_pem(CA, second))
    (tmp_path / "b.pem").write_bytes(_pem(third))
    (tmp_path / "README").write_text("no certificate")
    store = trust.Trust.load(tmp_path)
    for anchor in (CA, second, third):
        assert str(store.certificate(signing(CLIENT, anchor).chain).identity) == CLIENT


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    _store_refused(tmp_path, "holds no certificate")


def test_a_missing_or_relative_store_or_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ca.pem"
    file.write_bytes(_pem(CA))
    monkeypatch.chdir(tmp_path.parent)
    for folder in (tmp_path / "missing", Path(tmp_path.name), file):
        _store_refused(folder, "is not an absolute path of a folder")


def test_a_file_that_is_no_certificate_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_bytes(_pem(CA))
    (tmp_path / "b.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    _store_refused(tmp_path, "b.pem is not a PEM certificate")


@pytest.mark.parametrize("store", ["/etc/ssl", "/etc/ssl/certs", "/etc/pki", "/usr/share/ca-certificates"])
def test_a_system_store_is_refused_even_through_a_link(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda _: True)  # not every system has all of them
    _store_refused(Path(store), "is a system certificate store")
    link = tmp_path / "store"
    link.symlink_to(store)
    _store_refused(link, "is a system certificate store")


def test_a_bundle_of_many_cas_is_refused_wherever_it_lies(tmp_path: Path) -> None:
    for number in range(16):
        (tmp_path / f"{number}.pem").write_bytes(_pem(CA))
    trust.Trust.load(tmp_path)
    shutil.copy(tmp_path / "0.pem", tmp_path / "16.pem")
    _store_refused(tmp_path, "looks like a bundle of public CAs")


def test_an_anchor_that_everyone_may_replace_is_refused(tmp_path: Path) -> None:
    anchor = tmp_path / "ca.pem"
    anchor.write_bytes(_pem(CA))
    anchor.chmod(0o666)
    with pytest.raises(errors.ConfigurationRefused, match="every user of this host can replace"):
        trust.Trust.load(tmp_path)


@pytest.mark.parametrize("mounted", [False, True], ids=["a folder", "a Kubernetes volume"])
def test_another_services_ca_names_signers_of_its_own_trust_domain_alone(tmp_path: Path, mounted: bool) -> None:
    theirs, elsewhere = authority("theirs"), authority("elsewhere")
    files = {"ca.pem": CA, "shop.test/ca.pem": theirs, "shop.test/intermediate.pem": elsewhere}
    for name, anchor in files.items():
        file = tmp_path / "..data" / name if mounted else tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_pem(anchor))
        if mounted and not (tmp_path / Path(name).parts[0]).exists():
            (tmp_path / Path(name).parts[0]).symlink_to(Path("..data") / Path(name).parts[0])
    store = trust.Trust.load(tmp_path)
    shop = CLIENT.replace("orders.test", "shop.test")
    for anchor in (theirs, elsewhere, authority("below", theirs)):
        assert str(store.certificate(signing(shop, anchor).chain).identity) == shop
        _untrusted(signing(CLIENT, anchor), store)
        _untrusted(signing(CLIENT.replace("orders.test", "x.shop.test"), anchor), store)
    for uri in (CLIENT, shop):  # our own CA is ours to hold responsible
        assert str(store.certificate(signing(uri, CA).chain).identity) == uri
    # With the CA among our own, the attack works: it is the folder that stops it.
    assert str(trust.Trust([CA.leaf, theirs.leaf]).certificate(signing(CLIENT, theirs).chain).identity) == CLIENT


def test_a_ca_may_be_trusted_for_several_trust_domains(tmp_path: Path) -> None:
    for name in ("shop.test", "pay.test", "No.Domain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ca.pem").write_bytes(_pem(CA))
    store = trust.Trust.load(tmp_path)
    for name in ("shop.test", "pay.test"):
        assert store.certificate(signing(CLIENT.replace("orders.test", name), CA).chain)
    _untrusted(signing(CLIENT, CA), store)


def test_the_certificates_of_others_count_too(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(_pem(CA))
    (tmp_path / "shop.test").mkdir()
    (tmp_path / "shop.test" / "ca.pem").write_bytes(_pem(*[CA] * 16))
    _store_refused(tmp_path, "looks like a bundle of public CAs")


def test_what_kubernetes_keeps_beside_its_links_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "..data").mkdir()
    for number in range(9):
        (tmp_path / "..data" / f"{number}.pem").write_bytes(_pem(CA))
        (tmp_path / f"{number}.pem").symlink_to(Path("..data") / f"{number}.pem")
    assert trust.Trust.load(tmp_path).certificate(signing(CLIENT, CA).chain)
