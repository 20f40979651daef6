"""The envelope: what verifies, what does not, and which refusal says so."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from ...project import envelope, errors, trust
from .certificates import CLIENT, WORKER, Pair, authority, b64, header, jws, key_of, signing, x5c

TASK = envelope.Type.TASK
ALGORITHMS = ["EdDSA", "ES256", "PS256"]
CA = authority()
CLIENTS = {algorithm: signing(CLIENT, CA, key_of(algorithm)) for algorithm in ALGORITHMS}
PAIR = CLIENTS["EdDSA"]
PAYLOAD = b'{"a":1}'
TOKEN = PAIR.signer.sign(TASK, PAYLOAD)
MAX = 64 * 1024


def _verifier(**options: Any) -> envelope.Verifier:
    return envelope.Verifier(trust.Trust([CA.leaf]), options.get("max_bytes", MAX))


VERIFIER = _verifier()


def _refused(leaf: type[errors.MessageRefused], token: bytes | str, kind: envelope.Type = TASK) -> None:
    """Assert the same refusal from a verifier that has seen the signer and from one that has not."""
    for verifier in (VERIFIER, _verifier()):
        with pytest.raises(errors.MessageRefused) as caught:
            verifier.verify(kind, token)
        assert type(caught.value) is leaf


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", envelope.Type)
def test_a_signed_payload_comes_back_with_its_signer(algorithm: str, kind: envelope.Type) -> None:
    token = CLIENTS[algorithm].signer.sign(kind, PAYLOAD)
    for presented in (token, token.decode()):
        verified = VERIFIER.verify(kind, presented)
        assert verified.payload == PAYLOAD
        assert str(verified.signer.identity) == CLIENT
        assert verified.signer.algorithm == algorithm


@given(st.binary(min_size=1, max_size=2000))
def test_any_payload_survives(payload: bytes) -> None:
    assert VERIFIER.verify(TASK, PAIR.signer.sign(TASK, payload)).payload == payload


# --- altered ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, len(TOKEN) * 8 - 1))
def test_one_flipped_bit_anywhere_is_refused(bit: int) -> None:
    altered = bytearray(TOKEN)
    altered[bit // 8] ^= 1 << bit % 8
    with pytest.raises(errors.MessageRefused):
        VERIFIER.verify(TASK, bytes(altered))


@pytest.mark.parametrize("algorithm", ["ES256", "PS256"])
@given(data=st.data())
def test_one_flipped_bit_is_refused_with_each_algorithm(algorithm: str, data: st.DataObject) -> None:
    token = CLIENTS[algorithm].signer.sign(TASK, PAYLOAD)
    bit = data.draw(st.integers(0, len(token) * 8 - 1))
    altered = bytearray(token)
    altered[bit // 8] ^= 1 << bit % 8
    with pytest.raises(errors.MessageRefused):
        VERIFIER.verify(TASK, bytes(altered))


@given(
    st.integers(0, len(TOKEN)),
    st.integers(0, 40),
    st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.=+/ \n", max_size=40),
)
def test_any_replaced_stretch_is_refused(start: int, length: int, text: str) -> None:
    altered = TOKEN[:start] + text.encode() + TOKEN[start + length :]
    if altered != TOKEN:
        with pytest.raises(errors.MessageRefused):
            VERIFIER.verify(TASK, altered)


@given(st.binary(max_size=300) | st.text(max_size=300))
def test_what_is_no_envelope_is_refused_and_never_raises_otherwise(token: bytes | str) -> None:
    with pytest.raises(errors.MessageRefused):
        VERIFIER.verify(TASK, token)


_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["alg", "typ", "x5c", "x"]), values),
    max_leaves=6,
)


@given(_ANY_JSON)
def test_any_json_as_header_is_refused_and_never_raises_otherwise(value: Any) -> None:
    with pytest.raises(errors.MessageRefused):
        VERIFIER.verify(TASK, jws(PAIR, json.dumps(value).encode()))


def test_another_payload_under_the_signature_is_a_bad_signature() -> None:
    head, _, signature = TOKEN.split(b".")
    _refused(errors.BadSignature, head + b"." + b64(b'{"a":2}') + b"." + signature)


def test_another_signature_of_the_same_signer_is_a_bad_signature() -> None:
    head, payload, _ = TOKEN.split(b".")
    _refused(errors.BadSignature, head + b"." + payload + b"." + PAIR.signer.sign(TASK, b"other").split(b".")[2])


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b"..",
        b"a.b",
        b"a.b.c.d",
        TOKEN + b".",
        TOKEN + b"\n",
        b" " + TOKEN,
        TOKEN.replace(b".", b"..", 1),
        TOKEN.rpartition(b".")[0] + b".",
        TOKEN + b"=",
        TOKEN.replace(b".", b"=.", 1),
        TOKEN[:40] + b"\n" + TOKEN[40:],
        TOKEN[:40] + b"+/" + TOKEN[42:],
        TOKEN.decode() + "\u00e9",
        json.dumps({"protected": "e30", "payload": "e30", "signature": "AA"}).encode(),
    ],
)
def test_another_form_than_the_compact_one_is_unsigned(token: bytes | str) -> None:
    _refused(errors.Unsigned, token)


def _non_canonical(segment: bytes) -> bytes:
    """Set a bit that base64url leaves unused at the segment's end: the same bytes in a second spelling."""
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    assert len(segment) % 4
    return segment[:-1] + alphabet[alphabet.index(segment[-1]) | 1 :][:1]


def test_a_second_spelling_of_the_signature_is_malformed() -> None:
    head, payload, signature = TOKEN.split(b".")
    _refused(errors.Malformed, b".".join((head, payload, _non_canonical(signature))))


def test_a_second_spelling_of_the_payload_is_malformed_even_when_signed() -> None:
    head, payload, _ = TOKEN.split(b".")
    data = head + b"." + _non_canonical(payload)
    _refused(errors.Malformed, data + b"." + b64(PAIR.key.sign(data)))


def test_a_second_spelling_of_the_header_is_malformed_even_when_signed() -> None:
    raw = json.dumps(header(PAIR)).encode()
    raw += b" " * (1 if len(raw) % 3 == 0 else 0)
    data = _non_canonical(b64(raw)) + b"." + b64(PAYLOAD)
    _refused(errors.Malformed, data + b"." + b64(PAIR.key.sign(data)))


def test_a_segment_of_impossible_length_is_malformed() -> None:
    head, payload, signature = TOKEN.split(b".")
    _refused(errors.Malformed, b".".join((head, payload, signature + b"AAA")))


def test_one_byte_over_the_limit_is_too_large_and_judged_first() -> None:
    verifier = _verifier(max_bytes=len(TOKEN))
    assert verifier.verify(TASK, TOKEN).payload == PAYLOAD
    for token in (TOKEN + b"A", b"\xff" * (len(TOKEN) + 1), "\u00e9" * (len(TOKEN) + 1)):
        with pytest.raises(errors.TooLarge):
            verifier.verify(TASK, token)


# --- header -----------------------------------------------------------------------------------------------------------


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


# --- signer -----------------------------------------------------------------------------------------------------------


def test_another_valid_signers_signature_under_my_certificate_is_a_bad_signature() -> None:
    other = signing(WORKER, CA)
    _refused(errors.BadSignature, jws(PAIR, header(PAIR), key=other.key))


def test_my_certificate_below_a_foreign_one_is_a_bad_signature() -> None:
    other = signing(WORKER, CA)
    _refused(errors.BadSignature, jws(PAIR, header(PAIR, x5c=x5c([other.leaf, PAIR.leaf]))))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_key_that_is_not_the_certificates_makes_no_signer(algorithm: str) -> None:
    other = signing(WORKER, CA, CLIENTS["ES256"].key if algorithm != "ES256" else PAIR.key)
    with pytest.raises(TypeError, match="the key is not the certificate's"):
        envelope.Signer(other.key, CLIENTS[algorithm].chain)


# --- what is remembered -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _CountingTrust:
    """Counts the path validations of a real trust."""

    real: trust.Trust
    validations: int = 0

    def certificate(self, chain: list[x509.Certificate]) -> trust.SignerCertificate:
        self.validations += 1
        return self.real.certificate(chain)


def _counting() -> tuple[envelope.Verifier, _CountingTrust]:
    counting = _CountingTrust(trust.Trust([CA.leaf]))
    return envelope.Verifier(counting, MAX), counting  # type: ignore[arg-type]  # as good as the real one


def test_a_known_signer_costs_one_path_validation() -> None:
    verifier, counting = _counting()
    for number in range(5):
        verifier.verify(TASK, PAIR.signer.sign(TASK, str(number).encode()))
    assert counting.validations == 1


def test_what_is_remembered_is_bounded_and_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "_CACHE_MAX", 3)
    verifier, counting = _counting()
    spellings = [jws(PAIR, json.dumps(header(PAIR), indent=indent).encode()) for indent in range(5)]
    for token in spellings:
        verifier.verify(TASK, token)
    assert counting.validations == 5
    verifier.verify(TASK, spellings[4])
    assert counting.validations == 5
    verifier.verify(TASK, spellings[0])
    assert counting.validations == 6


def test_a_header_without_a_signature_that_fits_is_not_remembered() -> None:
    """Otherwise anyone who has seen a certificate could push every known signer out."""
    verifier, counting = _counting()
    forged = jws(PAIR, header(PAIR), key=ed25519.Ed25519PrivateKey.generate())
    for _ in range(2):
        with pytest.raises(errors.BadSignature):
            verifier.verify(TASK, forged)
    assert counting.validations == 2


def test_a_signer_carries_its_intermediate_certificates() -> None:
    pair: Pair = signing(CLIENT, authority("intermediate CA", CA))
    assert len(pair.chain) == 2
    assert VERIFIER.verify(TASK, pair.signer.sign(TASK, PAYLOAD)).payload == PAYLOAD
    _refused(errors.UntrustedSigner, jws(pair, header(pair, x5c=x5c(pair.chain[:1]))))
