"""Keys against the RFCs' own examples, and which keys may sign at all."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, utils

from ...project import keys
from .certificates import key_of

_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256 (SEC 2, section 2.4.2)


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def test_eddsa_signs_and_verifies_the_example_of_rfc_8037_appendix_a_4() -> None:
    key = ed25519.Ed25519PrivateKey.from_private_bytes(_decoded("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"))
    data = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc"
    signature = _decoded("hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg")
    assert keys.verifier(key.public_key())(signature, data)
    assert keys.signer(key)(data) == signature
    assert not keys.verifier(key.public_key())(signature, data + b"x")


def test_es256_verifies_the_example_of_rfc_7515_appendix_a_3() -> None:
    x, y = (
        int.from_bytes(_decoded(coordinate))
        for coordinate in (
            "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
        )
    )
    key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    data = (
        b"eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0"
        b"cnVlfQ"
    )
    signature = _decoded("DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q")
    assert keys.verifier(key)(signature, data)
    assert not keys.verifier(key)(signature, data + b"x")


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "PS256"])
def test_each_key_type_has_one_algorithm_and_refuses_signatures_of_any_length(algorithm: str) -> None:
    key = key_of(algorithm)
    assert keys.algorithm_of(key.public_key()) == algorithm
    signature, verify = keys.signer(key)(b"data"), keys.verifier(key.public_key())
    assert verify(signature, b"data")
    for wrong in (b"", b"\0", signature[:-1], signature + b"\0", b"\0" * len(signature), b"\xff" * len(signature)):
        assert not verify(wrong, b"data")


def test_es256_takes_two_fixed_length_integers_and_no_der() -> None:
    key = key_of("ES256")
    signature = keys.signer(key)(b"data")
    assert len(signature) == 64
    der = utils.encode_dss_signature(int.from_bytes(signature[:32]), int.from_bytes(signature[32:]))
    padded = signature[:32] + b"\0" + signature[32:]  # the same two numbers
    for other in (der, padded):
        assert not keys.verifier(key.public_key())(other, b"data")


@pytest.mark.parametrize("number", [0, _ORDER, _ORDER + 1, 2**256 - 1])
def test_es256_refuses_integers_outside_the_group(number: int) -> None:
    key = key_of("ES256")
    signature, verify = keys.signer(key)(b"data"), keys.verifier(key.public_key())
    assert not verify(number.to_bytes(32) + signature[32:], b"data")
    assert not verify(signature[:32] + number.to_bytes(32), b"data")
    assert not verify(number.to_bytes(32) * 2, b"data")


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(ec.generate_private_key(ec.SECP384R1()), id="P-384"),
        pytest.param(ec.generate_private_key(ec.SECP256K1()), id="secp256k1"),
        pytest.param(rsa.generate_private_key(65537, 1024), id="RSA-1024"),
        pytest.param(ed448.Ed448PrivateKey.generate(), id="Ed448"),
        pytest.param(dsa.generate_private_key(1024), id="DSA"),
    ],
)
def test_any_other_key_is_no_signing_key(key: object) -> None:
    assert keys.algorithm_of(key.public_key()) is None  # type: ignore[attr-defined]  # every private key has one


def test_a_key_of_another_family_can_neither_sign_nor_verify() -> None:
    key = ed448.Ed448PrivateKey.generate()
    with pytest.raises(TypeError, match="is not a signing key"):
        keys.signer(key)
    with pytest.raises(TypeError, match="is not a signing key"):
        keys.verifier(key.public_key())
