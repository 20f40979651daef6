"""Revocation lists: which are relied on, what they end, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from ...project import envelope, errors, trust
from .certificates import CLIENT, HOUR, NOW, WORKER, Pair, authority, certificate, revocations, signing

CA = authority()
STOLEN, OTHER = signing(CLIENT, CA), signing(CLIENT, CA)
KEEP = timedelta(hours=24)  # the grace, as documented


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "ca.pem").write_bytes(CA.leaf.public_bytes(Encoding.PEM))
    return tmp_path


def _accepts(store: trust.Trust, pair: Pair) -> None:
    assert str(store.certificate(pair.chain).identity) in {CLIENT, WORKER}


def _revoked(store: trust.Trust, pair: Pair) -> None:
    with pytest.raises(errors.RevokedSigner):
        store.certificate(pair.chain)


def _refused(folder: Path, content: bytes, reason: str) -> None:
    (folder / "ca.crl").write_bytes(content)
    with pytest.raises(errors.ConfigurationRefused, match=reason) as caught:
        trust.Trust.load(folder)
    assert caught.value.setting == "security_cert_store"
    assert caught.value.code == "config.trust"


def test_a_revoked_certificate_may_not_sign_and_another_one_of_the_signer_may(store: Path) -> None:
    _accepts(trust.Trust.load(store), STOLEN)
    (store / "ca.crl").write_bytes(revocations(CA, STOLEN))
    loaded = trust.Trust.load(store)
    _revoked(loaded, STOLEN)
    _accepts(loaded, OTHER)


def test_what_it_signed_before_is_refused_too(store: Path) -> None:
    token = STOLEN.signer.sign(envelope.Type.TASK, b"{}")
    envelope.Verifier(trust.Trust.load(store), 9999).verify(envelope.Type.TASK, token)
    (store / "ca.crl").write_bytes(revocations(CA, STOLEN, made=datetime.now(UTC)))
    with pytest.raises(errors.RevokedSigner):
        envelope.Verifier(trust.Trust.load(store), 9999).verify(envelope.Type.TASK, token)


def test_a_number_is_revoked_by_its_own_ca_alone(store: Path) -> None:
    second = authority()
    namesakes = signing(CLIENT, CA, serial=7), signing(CLIENT, second, serial=7)
    (store / "second.pem").write_bytes(second.leaf.public_bytes(Encoding.PEM))
    (store / "ca.crl").write_bytes(revocations(CA, namesakes[0]))
    (store / "second.crl").write_bytes(revocations(second))
    loaded = trust.Trust.load(store)
    _revoked(loaded, namesakes[0])
    _accepts(loaded, namesakes[1])


def test_an_intermediate_ca_can_be_revoked_and_can_revoke_as_an_anchor(tmp_path: Path) -> None:
    middle = authority("middle", CA)
    pair = signing(CLIENT, middle)
    assert len(pair.chain) == 2
    _accepts(trust.Trust([CA.leaf]), pair)
    for anchor, content in ((CA, revocations(CA, middle)), (middle, revocations(middle, pair))):
        (tmp_path / "ca.pem").write_bytes(anchor.leaf.public_bytes(Encoding.PEM))
        (tmp_path / "ca.crl").write_bytes(revocations(anchor))
        _accepts(trust.Trust.load(tmp_path), pair)
        (tmp_path / "ca.crl").write_bytes(content)
        _revoked(trust.Trust.load(tmp_path), pair)


# --- which lists are relied on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signer",
    [
        pytest.param(lambda: authority(), id="another CA of the same name"),
        pytest.param(lambda: Pair(CA.key, authority("other").chain), id="the right key, another name"),
        pytest.param(lambda: Pair(OTHER.key, CA.chain), id="a signer"),
    ],
)
def test_a_list_that_no_trusted_ca_signed_is_refused(store: Path, signer: Callable[[], Pair]) -> None:
    _refused(store, revocations(signer()), "is not signed by a CA of the store")


@pytest.mark.parametrize("usage", [None, frozenset({"digital_signature"}), frozenset({"key_cert_sign"})])
def test_an_anchor_that_may_sign_no_lists_revokes_nothing(tmp_path: Path, usage: frozenset[str] | None) -> None:
    anchor = certificate("anchor", ec.generate_private_key(ec.SECP256R1()), usage=usage, ca=True)
    (tmp_path / "ca.pem").write_bytes(anchor.leaf.public_bytes(Encoding.PEM))
    _refused(tmp_path, revocations(anchor), "is not signed by a CA of the store")


def test_an_altered_list_is_refused(store: Path) -> None:
    genuine = x509.load_pem_x509_crl(revocations(CA, STOLEN))
    der = genuine.public_bytes(Encoding.DER)
    number = STOLEN.leaf.serial_number.to_bytes(20).lstrip(b"\0")
    assert der.count(number) == 1
    altered = x509.load_der_x509_crl(der.replace(number, number[:-1] + bytes([number[-1] ^ 1])))
    _refused(store, altered.public_bytes(Encoding.PEM), "is not signed by a CA of the store")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"no list", id="text"),
        pytest.param(b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", id="garbage"),
        pytest.param(revocations(CA)[:-60], id="half"),
        pytest.param(CA.leaf.public_bytes(Encoding.PEM), id="a certificate"),
        pytest.param(revocations(CA) + revocations(CA, STOLEN), id="two, of which a parser reads one"),
        pytest.param(x509.load_pem_x509_crl(revocations(CA)).public_bytes(Encoding.DER), id="DER"),
    ],
)
def test_a_file_that_is_not_one_list_is_refused(store: Path, content: bytes) -> None:
    _refused(store, content, "is not one PEM certificate revocation list")


def _scope(**options: object) -> x509.IssuingDistributionPoint:
    defaults: dict[str, object] = dict.fromkeys(("full_name", "relative_name", "only_some_reasons"))
    names = "only_contains_user_certs", "only_contains_ca_certs", "indirect_crl", "only_contains_attribute_certs"
    return x509.IssuingDistributionPoint(**{**defaults, **dict.fromkeys(names, False), **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "extension",
    [
        x509.DeltaCRLIndicator(1),
        _scope(indirect_crl=True),
        _scope(only_some_reasons=frozenset({x509.ReasonFlags.key_compromise})),
        _scope(only_contains_ca_certs=True),
        _scope(only_contains_attribute_certs=True),
        x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0"),
    ],
    ids=["delta", "indirect", "some reasons", "CAs only", "attributes only", "unknown"],
)
def test_a_list_that_may_be_a_part_is_refused(store: Path, extension: x509.ExtensionType) -> None:
    _refused(store, revocations(CA, extensions=[extension]), "is not the whole list")


def test_a_list_that_says_where_it_comes_from_is_whole(store: Path) -> None:
    """As step-ca and AD CS make it: critical, and without a restriction."""
    place = _scope(full_name=[x509.UniformResourceIdentifier("https://ca.example/1.0/crl")])
    (store / "ca.crl").write_bytes(revocations(CA, STOLEN, extensions=[place]))
    _revoked(trust.Trust.load(store), STOLEN)


def test_a_list_that_everyone_may_replace_is_refused(store: Path) -> None:
    file = store / "ca.crl"
    file.write_bytes(revocations(CA))
    file.chmod(0o666)
    with pytest.raises(errors.ConfigurationRefused, match="every user of this host can replace"):
        trust.Trust.load(store)


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_list_from_the_future_or_long_overdue_is_refused(store: Path) -> None:
    _refused(store, revocations(CA, made=NOW + HOUR), "is from the future")
    _refused(store, revocations(CA, made=NOW - 9 * KEEP, due=NOW - KEEP - HOUR), "is out of date")


def _without_due(ca: Pair) -> bytes:
    """Make a list without a next update, which the library makes none of."""
    signed = x509.load_pem_x509_crl(revocations(ca))
    inner = signed.tbs_certlist_bytes
    due = b"\x17\x0d" + f"{signed.next_update_utc:%y%m%d%H%M%SZ}".encode()
    assert inner.count(due) == 1
    inner = _sequence(inner.replace(due, b"")[2 if inner[1] < 128 else 2 + inner[1] - 128 :])
    signature = b"\0" + ca.key.sign(inner, ec.ECDSA(hashes.SHA256()))
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")
    der = _sequence(inner + algorithm + bytes([3, len(signature)]) + signature)
    return x509.load_der_x509_crl(der).public_bytes(Encoding.PEM)


def _sequence(content: bytes) -> bytes:
    size = len(content)
    return b"\x30" + (bytes([size]) if size < 128 else bytes([0x81, size])) + content


def test_a_list_that_does_not_say_when_the_next_is_due_is_refused(store: Path) -> None:
    content = _without_due(CA)
    assert x509.load_pem_x509_crl(content).is_signature_valid(CA.key.public_key())
    _refused(store, content, "is out of date")


def test_an_overdue_list_is_used_for_a_day_and_then_its_ca_is_not_trusted(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    due = NOW - KEEP + HOUR
    (store / "ca.crl").write_bytes(revocations(CA, STOLEN, made=NOW - 2 * KEEP, due=due))
    loaded = trust.Trust.load(store)
    _revoked(loaded, STOLEN)
    verifier = envelope.Verifier(loaded, 9999)
    token = OTHER.signer.sign(envelope.Type.TASK, b"{}")
    assert verifier.verify(envelope.Type.TASK, token).signer.unknown_from == (due + KEEP).timestamp()
    later = time.time() + HOUR.total_seconds()
    monkeypatch.setattr(envelope, "time", SimpleNamespace(time=lambda: later))
    with pytest.raises(errors.RevocationUnknown):  # although it is remembered
        verifier.verify(envelope.Type.TASK, token)


def test_without_a_list_nothing_runs_out(store: Path) -> None:
    assert trust.Trust.load(store).certificate(OTHER.chain).unknown_from == float("inf")


# --- one after the other ----------------------------------------------------------------------------------------------


def _loaded(store: Path, content: bytes | None) -> trust.Trust:
    (store / "ca.crl").unlink(missing_ok=True)
    if content is not None:
        (store / "ca.crl").write_bytes(content)
    return trust.Trust.load(store)


def test_a_list_is_followed_by_a_newer_one(store: Path) -> None:
    before = _loaded(store, revocations(CA, made=NOW - HOUR))
    for made in (NOW - HOUR, NOW):
        _loaded(store, revocations(CA, STOLEN, made=made)).check_follows(before)


@pytest.mark.parametrize(("old", "new"), [("a.crl", "b.crl"), ("b.crl", "a.crl")])
def test_of_two_lists_of_a_ca_the_newer_counts(store: Path, old: str, new: str) -> None:
    (store / old).write_bytes(revocations(CA, made=NOW - 2 * HOUR))
    (store / new).write_bytes(revocations(CA, STOLEN, made=NOW - HOUR))
    _revoked(trust.Trust.load(store), STOLEN)


@pytest.mark.parametrize("content", [None, revocations(CA, made=NOW - 2 * HOUR)], ids=["gone", "older"])
def test_a_list_that_is_gone_or_older_is_no_successor(store: Path, content: bytes | None) -> None:
    before = _loaded(store, revocations(CA, STOLEN, made=NOW - HOUR))
    with pytest.raises(errors.ConfigurationRefused, match="gone, or older"):
        _loaded(store, content).check_follows(before)


def test_a_list_may_go_with_its_ca(store: Path) -> None:
    before = _loaded(store, revocations(CA, STOLEN))
    (store / "ca.pem").write_bytes(authority().leaf.public_bytes(Encoding.PEM))
    _loaded(store, None).check_follows(before)


def test_a_ca_without_a_list_is_known(store: Path) -> None:
    assert _loaded(store, None).unlisted
    assert not _loaded(store, revocations(CA)).unlisted
    own = signing(CLIENT, None)  # a single signer: it is revoked by taking it out of the store
    assert not trust.Trust([own.leaf]).unlisted
