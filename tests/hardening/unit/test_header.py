"""The envelope's header: whatever it says otherwise than a genuine one is refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from ...project import envelope, errors
from .certificates import CLIENT, WORKER, b64, header, jws, signing, x5c
from .envelopes import ALGORITHMS, CA, CLIENTS, PAIR, PAYLOAD, TASK, VERIFIER, _refused


@pytest.mark.parametrize(
    "algorithm", ["none", "HS256", "ES256", "PS256", "RS256", "EdDSA ", "eddsa", "Ed25519", "", 1, ["EdDSA"]]
)
def test_another_algorithm_than_the_keys_is_a_bad_signature(algorithm: object) -> None:
    _refused(errors.BadSignature, jws(PAIR, header(PAIR, alg=algorithm)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_certificate_is_never_a_shared_secret(algorithm: str) -> None:
    """The classic confusion: HS256 keyed with the public key, in each form a library may take it."""
    pair = CLIENTS[algorithm]
    public = pair.leaf.public_key()
    for secret in (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        pair.leaf.public_bytes(Encoding.PEM),
        pair.leaf.public_bytes(Encoding.DER),
        b"",
    ):
        for named in ("HS256", algorithm):
            data = b64(json.dumps(header(pair, alg=named)).encode()) + b"." + b64(PAYLOAD)
            _refused(errors.BadSignature, data + b"." + b64(hmac.digest(secret, data, hashlib.sha256)))


def test_no_signature_under_alg_none_is_refused() -> None:
    data = b64(json.dumps(header(PAIR, alg="none")).encode()) + b"." + b64(PAYLOAD)
    _refused(errors.Unsigned, data + b".")
    _refused(errors.BadSignature, data + b".AAAA")


@pytest.mark.parametrize(
    "extra",
    [
        {"crit": ["exp"]},
        {"crit": []},
        {"b64": False, "crit": ["b64"]},
        {"jwk": {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwaaPJHURo"}},
        {"jku": "https://attacker.test/keys"},
        {"x5u": "https://attacker.test/certificate"},
        {"kid": "1"},
        {"cty": "application/x-python-serialize"},
        {"zip": "DEF"},
        {"x5t#S256": "AA"},
        {"": ""},
    ],
    ids=lambda extra: next(iter(extra)) or "empty name",
)
def test_any_further_header_member_is_malformed(extra: dict[str, object]) -> None:
    _refused(errors.Malformed, jws(PAIR, {**header(PAIR), **extra}))


@pytest.mark.parametrize("missing", ["alg", "typ", "x5c"])
def test_a_missing_header_member_is_malformed(missing: str) -> None:
    _refused(errors.Malformed, jws(PAIR, header(PAIR, **{missing: None})))


@pytest.mark.parametrize("member", ["alg", "typ", "x5c"])
def test_a_duplicate_header_member_is_malformed_whichever_one_counts(member: str) -> None:
    genuine, other = header(PAIR), header(PAIR, alg="none", typ="other", x5c=[])
    text = json.dumps(genuine)
    for doubled in (
        text[:-1] + f", {json.dumps(member)}: {json.dumps(other[member])}}}",
        "{" + f"{json.dumps(member)}: {json.dumps(other[member])}, " + text[1:],
    ):
        assert len(json.loads(doubled)) == 3
        _refused(errors.Malformed, jws(PAIR, doubled.encode()))


@pytest.mark.parametrize(
    "raw", [b"{", b"[]", b"1", b"null", b'"x"', b"{}", b"\xff", b"{} {}", b"[" * 5000, b"9" * 5000]
)
def test_a_header_that_is_no_json_object_is_malformed(raw: bytes) -> None:
    _refused(errors.Malformed, jws(PAIR, raw))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_header_in_another_encoding_than_utf_8_is_malformed(encoding: str) -> None:
    _refused(errors.Malformed, jws(PAIR, json.dumps(header(PAIR)).encode(encoding)))


@pytest.mark.parametrize("made", envelope.Type)
@pytest.mark.parametrize("door", envelope.Type)
def test_each_door_takes_its_own_type_alone(made: envelope.Type, door: envelope.Type) -> None:
    token = PAIR.signer.sign(made, PAYLOAD)
    assert VERIFIER.verify(made, token).payload == PAYLOAD  # the header is known now, but only for its own door
    if made is not door:
        _refused(errors.WrongType, token, door)


@pytest.mark.parametrize(
    "typ", ["JWT", "", "CELERY-TASK+JWS", "application/celery-task+jws", 1, None, ["celery-task+jws"]]
)
def test_a_foreign_type_is_refused(typ: object) -> None:
    _refused(errors.WrongType, jws(PAIR, {**header(PAIR), "typ": typ}))


@pytest.mark.parametrize("count", [0, 4, 5])
def test_no_or_too_many_certificates_are_malformed(count: int) -> None:
    _refused(errors.Malformed, jws(PAIR, header(PAIR, x5c=x5c([PAIR.leaf] * count))))


@pytest.mark.parametrize("chain", [{}, "text", 1, True, [1], [None], [[]]])
def test_certificates_that_are_no_list_of_texts_are_malformed(chain: object) -> None:
    _refused(errors.Malformed, jws(PAIR, {**header(PAIR), "x5c": chain}))


_DER = PAIR.leaf.public_bytes(Encoding.DER)
_TEXT = base64.b64encode(_DER).decode()
#: Of a certificate whose length needs no padding; it takes three tries or so.
_UNPADDED = next(
    text
    for pair in iter(lambda: signing(WORKER, CA), None)
    if not (text := base64.b64encode(pair.leaf.public_bytes(Encoding.DER)).decode()).endswith("=")
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "AAAA",
        "====",
        "\u00e9",
        "not base64!",
        base64.b64encode(b"\x30\x80").decode(),
        base64.b64encode(_DER + b"\0").decode(),
        base64.b64encode(_DER * 2).decode(),
        base64.b64encode(PAIR.leaf.public_bytes(Encoding.PEM)).decode(),
        _TEXT + "\n",
        _TEXT[:64] + "\n" + _TEXT[64:],
        _TEXT + "====",
        _UNPADDED + "====",
        _TEXT + "AAAA",
    ],
    ids=lambda text: text[-12:],
)
def test_what_is_no_certificate_is_an_untrusted_signer(text: str) -> None:
    _refused(errors.UntrustedSigner, jws(PAIR, header(PAIR, x5c=[text])))


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # a negative one, after its first bit was flipped
@given(st.integers(0, len(_DER) * 8 - 1))
def test_one_flipped_bit_in_the_certificate_is_refused_or_changes_nothing_it_says(bit: int) -> None:
    altered = bytearray(_DER)
    altered[bit // 8] ^= 1 << bit % 8
    try:
        verified = VERIFIER.verify(TASK, jws(PAIR, header(PAIR, x5c=[base64.b64encode(altered).decode()])))
    except errors.MessageRefused:
        return
    # Only the count of unused bits behind the CA's signature, which that signature does not cover, may differ.
    body = PAIR.leaf.tbs_certificate_bytes
    assert bytes(altered).count(body) == 1
    assert str(verified.signer.identity) == CLIENT


def test_a_header_over_sixteen_kilobytes_is_malformed() -> None:
    _refused(errors.Malformed, jws(PAIR, json.dumps(header(PAIR)).encode() + b" " * 16 * 1024))
