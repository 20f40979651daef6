"""Settings: each one that is missing or insecure is one sentence with setting, reason, fix and code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from stack.account import Account
from stack.pki import Pki

from ...project import Settings, errors, hardening
from ...service import ROOT
from . import certificates

SENTENCE = re.compile(r"(?P<setting>[A-Za-z_]+): .+; .+ \[(?P<code>[a-z.-]+)\]")
PASSWORD = "pa ss/w@rd:#?"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("settings") / "pki", Account("tests", os.geteuid(), os.getegid(), switch=False))


def _application() -> str:
    return hardening.topology.Topology.load(ROOT / "topology.toml").application


@pytest.fixture
def values(pki: Pki, tmp_path: Path) -> dict[str, Any]:
    """Genuine settings, in files of this test's own."""
    own = _application()
    authority = certificates.Pair(pki.signing.key, (pki.signing.root,))
    valid = (pki.signing.root.not_valid_before_utc, pki.signing.root.not_valid_after_utc)
    pair = certificates.signing(f"spiffe://{own}.test/development/{own}/client", authority, valid=valid)
    tls = pki.tls.client(tmp_path.name)
    return {
        "broker_url": f"amqps://127.0.0.1:5671/{own}",
        "result_backend": f"rediss://{own}.client@127.0.0.1:6380/0",
        "result_backend_password_file": _private(tmp_path / "password", PASSWORD.encode() + b"\n"),
        "replay_store": f"rediss://{own}.client@127.0.0.1:6380/0",
        "replay_store_password_file": _private(tmp_path / "other-password", PASSWORD.encode() + b"\n"),
        "topology": ROOT / "topology.toml",
        "tls_ca": pki.tls.certificate,
        "tls_certificate": tls.certificate,
        "tls_key": tls.key,
        "security_key": _private(tmp_path / "key.pem", _key(pair.key)),
        "security_certificate": _file(tmp_path / "certificate.pem", _pem(pair)),
        "security_cert_store": pki.store,
    }


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _private(path: Path, content: bytes) -> Path:
    _file(path, content).chmod(0o600)
    return path


def _key(key: Any, password: bytes | None = None) -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    return pem


def _pem(pair: certificates.Pair) -> bytes:
    return b"".join(each.public_bytes(Encoding.PEM) for each in pair.chain)


def _refused(values: dict[str, Any], **changes: Any) -> errors.ConfigurationRefused:
    """Return the refusal, which comes before anything is connected and is one sentence."""
    with pytest.raises(errors.ConfigurationRefused) as caught:
        hardening.harden(_app(), Settings(**{**values, **changes}))
    sentence = SENTENCE.fullmatch(str(caught.value))
    assert sentence, str(caught.value)
    assert sentence["code"] == caught.value.code
    assert PASSWORD not in str(caught.value)
    return caught.value


def _app() -> Celery:
    return Celery("settings", set_as_current=False)


def test_genuine_settings_are_accepted(values: dict[str, Any]) -> None:
    app = _app()
    hardening.harden(app, Settings(**values))
    app.hardening.check(app)


def test_they_are_read_from_the_environment(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"SECURE_CELERY_{name.upper()}", str(value))
    monkeypatch.setenv("SECURE_CELERY_CLOCK_SKEW", "7")
    read = Settings()
    assert {name: getattr(read, name) for name in values} == values
    assert read.clock_skew == 7


REQUIRED = [name for name, field in Settings.model_fields.items() if field.is_required()]


def test_every_setting_without_a_safe_default_is_required() -> None:
    assert set(REQUIRED) == {
        *("broker_url", "result_backend", "result_backend_password_file", "topology"),
        *("security_key", "security_certificate", "security_cert_store"),
    }


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_setting_is_named_as_a_person_sets_it(values: dict[str, Any], name: str) -> None:
    del values[name]
    refusal = _refused(values)
    assert refusal.setting == f"SECURE_CELERY_{name.upper()}"
    assert "is not set" in refusal.reason


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("message_max_bytes", 10),
        ("message_max_bytes", 10**9),
        ("message_max_bytes", "much"),
        ("message_max_age", 0),
        ("message_max_age", 10**9),
        ("message_max_delay", -1),
        ("clock_skew", 3600),
        ("clock_skew", "swordfish"),
        ("security_key", 1),
    ],
)
def test_a_malformed_setting_is_refused_without_its_value(values: dict[str, Any], name: str, value: object) -> None:
    refusal = _refused(values, **{name: value})
    assert refusal.setting == f"SECURE_CELERY_{name.upper()}"
    assert "swordfish" not in str(refusal)


def test_an_unknown_setting_is_refused(values: dict[str, Any]) -> None:
    assert "BROKER_URI" in _refused(values, broker_uri="amqps://x").setting


@pytest.mark.parametrize("name", ["message_max_bytes", "clock_skew", "broker_url"])
def test_settings_cannot_be_changed_later(values: dict[str, Any], name: str) -> None:
    read = Settings(**values)
    with pytest.raises(ValueError, match="frozen"):
        setattr(read, name, 1)


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("broker_url", "amqp://127.0.0.1"),
        ("broker_url", "redis://127.0.0.1"),
        ("broker_url", "memory://"),
        ("broker_url", "amqps://user:swordfish@127.0.0.1"),
        ("broker_url", "amqps://127.0.0.1;amqp://127.0.0.1"),
        ("broker_url", ""),
        ("result_backend", "redis://127.0.0.1"),
        ("result_backend", "rediss://127.0.0.1?ssl_cert_reqs=none"),
        ("result_backend", "cache+memory://"),
        ("result_backend", "db+sqlite:////tmp/x"),
        ("result_backend", "rpc://"),
        ("result_backend", "rediss://user:swordfish@127.0.0.1"),
        ("replay_store", "redis://127.0.0.1"),
        ("replay_store", "memory://"),
        ("replay_store", "rediss://user:swordfish@127.0.0.1"),
    ],
)
def test_an_unprotected_address_is_refused(values: dict[str, Any], name: str, url: str) -> None:
    refusal = _refused(values, **{name: url})
    assert refusal.setting == f"SECURE_CELERY_{name.upper()}"
    assert refusal.code == "config.tls"
    assert "swordfish" not in str(refusal)


@pytest.mark.parametrize("name", ["broker_schemes", "result_schemes"])
def test_no_environment_variable_widens_what_is_protected(
    values: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = getattr(Settings, name)
    monkeypatch.setenv(f"SECURE_CELERY_{name.upper()}", '["memory", "amqp", "redis"]')
    assert getattr(Settings(**values), name) == before
    with pytest.raises(errors.ConfigurationRefused):
        Settings(**values, **{name: ["memory"]})


def test_a_redis_brokers_password_comes_from_its_file_and_is_quoted(values: dict[str, Any], tmp_path: Path) -> None:
    secret = tmp_path / "broker.password"
    secret.write_text("p@ss:w/rd\n")
    secret.chmod(0o600)
    address = {"broker_url": "rediss://shop.client@127.0.0.1:1/0"}
    settings = Settings(**{**values, **address}, broker_password_file=secret)
    assert settings.broker_address == "rediss://shop.client:p%40ss%3Aw%2Frd@127.0.0.1:1/0"
    assert "p@ss" not in repr(settings)
    with pytest.raises(errors.ConfigurationRefused, match="BROKER_PASSWORD_FILE: is not set"):
        _ = Settings(**{**values, **address}).broker_address


def test_another_broker_than_the_topologys_is_refused(values: dict[str, Any]) -> None:
    account, password = f"{_application()}.client", values["result_backend_password_file"]
    refusal = _refused(values, broker_url=f"rediss://{account}@127.0.0.1", broker_password_file=password)
    assert (refusal.setting, refusal.code) == ("SECURE_CELERY_BROKER_URL", "config.topology")


def test_the_backends_password_comes_from_its_file_and_is_quoted(values: dict[str, Any]) -> None:
    url = Settings(**values).result_backend_address
    assert url == f"rediss://{_application()}.client:pa%20ss%2Fw%40rd%3A%23%3F@127.0.0.1:6380/0"
    assert "pa%20" not in repr(Settings(**values))


# --- files ------------------------------------------------------------------------------------------------------------

SECRETS = ["security_key", "tls_key", "result_backend_password_file"]


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("mode", [0o604, 0o644, 0o640, 0o666])
def test_a_secret_that_others_can_read_is_refused(values: dict[str, Any], tmp_path: Path, name: str, mode: int) -> None:
    secret = _private(tmp_path / "secret", values[name].read_bytes())
    secret.chmod(mode)
    if mode == 0o640 and os.geteuid() != 0:
        mode = 0o660
        secret.chmod(mode)
    refusal = _refused(values, **{name: secret})
    assert refusal.code == "config.key-permissions"
    assert "chmod 600" in refusal.fix
    assert name.upper() in refusal.setting.upper()


@pytest.mark.parametrize("name", [*SECRETS, "security_certificate", "tls_ca", "tls_certificate"])
@pytest.mark.parametrize("kind", ["missing", "empty", "relative", "folder", "garbage"])
def test_a_file_that_is_not_what_it_should_be_is_refused(
    values: dict[str, Any], tmp_path: Path, name: str, kind: str
) -> None:
    if (kind, name) == ("garbage", "result_backend_password_file"):
        return  # any text is a password
    path = {
        "missing": lambda: tmp_path / "nothing",
        "empty": lambda: _private(tmp_path / "empty", b"\n"),
        "relative": lambda: Path("relative.pem"),
        "folder": lambda: tmp_path,
        "garbage": lambda: _private(tmp_path / "garbage", b"-----BEGIN GARBAGE-----\n"),
    }[kind]()
    assert name.upper() in _refused(values, **{name: path}).setting.upper()


@pytest.mark.parametrize("name", ["security_certificate", "tls_certificate", "tls_ca"])
def test_a_public_file_that_everyone_can_replace_is_refused(values: dict[str, Any], tmp_path: Path, name: str) -> None:
    public = _file(tmp_path / "public.pem", values[name].read_bytes())
    public.chmod(0o666)
    assert _refused(values, **{name: public}).code == "config.file"


# --- the signing key and its certificate ------------------------------------------------------------------------------


def _issued(
    values: dict[str, Any], pki: Pki, path: Path, uri: str | None = None, key: Any = None, **options: Any
) -> dict[str, Any]:
    """Return genuine settings with another signing certificate."""
    own = _application()
    authority = certificates.Pair(pki.signing.key, (pki.signing.root,))
    uri = uri or f"spiffe://{own}.test/development/{own}/client"
    options.setdefault("valid", (pki.signing.root.not_valid_before_utc, pki.signing.root.not_valid_after_utc))
    pair = certificates.signing(uri, authority, key, **options)
    return {
        **values,
        "security_key": _private(path / "own-key.pem", _key(pair.key)),
        "security_certificate": _file(path / "own.pem", _pem(pair)),
    }


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "PS256"])
def test_each_supported_key_is_accepted(values: dict[str, Any], pki: Pki, tmp_path: Path, algorithm: str) -> None:
    hardening.harden(_app(), Settings(**_issued(values, pki, tmp_path, key=certificates.key_of(algorithm))))


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(lambda: ec.generate_private_key(ec.SECP384R1()), id="P-384"),
        pytest.param(lambda: rsa.generate_private_key(65537, 1024), id="RSA-1024"),
    ],
)
def test_any_other_key_is_refused(values: dict[str, Any], pki: Pki, tmp_path: Path, key: Any) -> None:
    refusal = _refused(_issued(values, pki, tmp_path, key=key()))
    assert refusal.setting == "SECURE_CELERY_SECURITY_KEY"
    assert "Ed25519, P-256 or RSA" in refusal.reason


def test_a_key_that_is_not_the_certificates_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    other = _private(tmp_path / "other.pem", _key(ec.generate_private_key(ec.SECP256R1())))
    refusal = _refused(values, security_key=other)
    assert refusal.setting == "SECURE_CELERY_SECURITY_KEY"
    assert "not the certificate's" in refusal.reason


def test_a_locked_key_is_opened_by_its_passwords_file(values: dict[str, Any], pki: Pki, tmp_path: Path) -> None:
    key = certificates.key_of("ES256")
    issued = _issued(values, pki, tmp_path, key=key)
    issued["security_key"] = _private(tmp_path / "locked.pem", _key(key, b"open sesame"))
    for password, opens in ((b"open sesame\n", True), (b"wrong", False), (None, False)):
        if password:
            issued["security_key_password_file"] = _private(tmp_path / "key-password", password)
        else:
            del issued["security_key_password_file"]
        if opens:
            hardening.harden(_app(), Settings(**issued))
        else:
            assert "the password opens" in _refused(issued).reason
    issued["security_key_password_file"] = _private(tmp_path / "key-password", b"open sesame")
    issued["security_key_password_file"].chmod(0o644)
    assert _refused(issued).code == "config.key-permissions"


def test_a_certificate_that_names_nobody_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    certificate = _file(tmp_path / "tls.pem", values["tls_certificate"].read_bytes())
    refusal = _refused(values, security_certificate=certificate, security_key=values["tls_key"])
    assert refusal.setting == "SECURE_CELERY_SECURITY_CERTIFICATE"
    assert "SPIFFE ID" in str(refusal)


@pytest.mark.parametrize("window", [(0, 4), (60, 64)], ids=["expired", "not yet valid"])
def test_a_certificate_that_is_not_valid_now_is_refused(
    values: dict[str, Any], pki: Pki, tmp_path: Path, window: tuple[int, int]
) -> None:
    start = pki.signing.root.not_valid_before_utc  # some minutes ago
    valid = tuple(start + minutes * certificates.HOUR / 60 for minutes in window)
    refusal = _refused(_issued(values, pki, tmp_path, valid=valid))
    assert refusal.setting == "SECURE_CELERY_SECURITY_CERTIFICATE"
    assert "had expired, or was not valid yet" in refusal.reason
    assert f"valid from {valid[0].isoformat()} to {valid[1].isoformat()}" in refusal.reason
    assert refusal.code == "config.certificate"


def test_a_chain_that_no_reader_would_accept_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    whole = values["security_certificate"].read_bytes()
    chain = _file(tmp_path / "chain.pem", whole + values["tls_ca"].read_bytes() * 3)
    assert "holds 4 certificates" in _refused(values, security_certificate=chain).reason


def test_a_topology_of_another_application_is_refused(values: dict[str, Any], pki: Pki, tmp_path: Path) -> None:
    refusal = _refused(_issued(values, pki, tmp_path, "spiffe://other.test/development/other/client"))
    assert refusal.setting == "SECURE_CELERY_TOPOLOGY"
    assert "of one application" in refusal.fix


def test_a_missing_topology_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    assert _refused_topology(values, tmp_path / "none.toml").code == "config.file"


def _refused_topology(values: dict[str, Any], path: Path) -> errors.ConfigurationRefused:
    with pytest.raises(errors.ConfigurationRefused) as caught:
        hardening.harden(_app(), Settings(**{**values, "topology": path}))
    return caught.value


def test_a_system_store_of_certificates_is_refused(values: dict[str, Any]) -> None:
    refusal = _refused(values, security_cert_store=Path("/etc/ssl/certs"))
    assert refusal.code == "config.trust"
    assert refusal.setting.upper().endswith("SECURITY_CERT_STORE")


def test_an_empty_or_missing_store_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for store in (tmp_path / "store", tmp_path / "nothing"):
        assert _refused(values, security_cert_store=store).code == "config.trust"
