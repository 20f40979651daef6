"""The envelope: what verifies, what does not, and which refusal says so."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given
from hypothesis import strategies as st

from ...project import envelope, errors, trust
from .certificates import CLIENT, WORKER, Pair, authority, b64, header, jws, signing, x5c
from .envelopes import ALGORITHMS, CA, CLIENTS, MAX, PAIR, PAYLOAD, TASK, TOKEN, VERIFIER, _refused, _verifier


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
