"""The TLS builder: what it makes, and which files and addresses it refuses at start."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from stack.account import Account
from stack.pki import Authority, Pair

from ...project import errors, tls

SETTING = "SECURE_CELERY_BROKER_URL"
PASSWORD = "hunter2"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    account = Account("tests", os.geteuid(), os.getegid(), switch=False)
    return Authority(tmp_path_factory.mktemp("pki") / "tls", "test CA", account)


@pytest.fixture(scope="module")
def client(authority: Authority) -> Pair:
    return authority.client("my-service.client")


def refused(setting: str, *words: str, code: str = "config.tls") -> pytest.RaisesExc[errors.ConfigurationRefused]:
    def one_sentence(error: errors.ConfigurationRefused) -> bool:
        sentence = str(error)
        return (
            error.code == code
            and sentence.startswith(f"{setting}: ")
            and "\n" not in sentence
            and PASSWORD not in sentence
            and all(word in sentence for word in words)
        )

    return pytest.raises(errors.ConfigurationRefused, check=one_sentence)


class TestOptions:
    def test_amqp_options_verify_chain_and_host_from_tls_12_on(self, authority: Authority, client: Pair) -> None:
        options = tls.TLS(authority.certificate, client.certificate, client.key).amqp()
        assert options == {
            "cert_reqs": ssl.CERT_REQUIRED,
            "server_hostname": None,
            "ca_certs": str(authority.certificate),
            "certfile": str(client.certificate),
            "keyfile": str(client.key),
            "ciphers": tls.CIPHERS,
            "tls_minimum_version": ssl.TLSVersion.TLSv1_2,
        }

    def test_redis_options_verify_chain_and_host_from_tls_12_on(self, authority: Authority, client: Pair) -> None:
        options = tls.TLS(authority.certificate, client.certificate, client.key).redis()
        assert options == {
            "ssl_cert_reqs": ssl.CERT_REQUIRED,
            "ssl_check_hostname": True,
            "ssl_ca_certs": str(authority.certificate),
            "ssl_certfile": str(client.certificate),
            "ssl_keyfile": str(client.key),
            "ssl_ciphers": tls.CIPHERS,
            "ssl_min_version": ssl.TLSVersion.TLSv1_2,
        }

    def test_sentinel_discovery_has_the_same_options_and_tls_switched_on(self, authority: Authority) -> None:
        built = tls.TLS(authority.certificate, None, None)
        assert built.sentinel() == {"ssl": True, **built.redis()}

    def test_every_call_makes_a_dictionary_of_its_own(self, authority: Authority) -> None:
        built = tls.TLS(authority.certificate, None, None)
        built.amqp()["server_hostname"] = "written by kombu"
        assert built.amqp()["server_hostname"] is None

    def test_without_a_ca_the_systems_store_is_asked_for(self) -> None:
        built = tls.TLS(None, None, None)
        assert built.amqp()["ca_certs"] is None
        assert built.redis()["ssl_ca_certs"] is None
        assert built.amqp()["cert_reqs"] is built.redis()["ssl_cert_reqs"] is ssl.CERT_REQUIRED

    def test_every_cipher_is_authenticated_and_has_forward_secrecy(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_ciphers(tls.CIPHERS)
        ciphers = context.get_ciphers()
        assert {cipher["name"] for cipher in ciphers} >= set(tls.CIPHERS.split(":"))
        assert all(cipher["aead"] for cipher in ciphers)
        for cipher in ciphers:
            assert cipher["protocol"] == "TLSv1.3" or cipher["kea"] == "kx-ecdhe"


class TestFiles:
    def test_a_relative_ca_is_refused(self) -> None:
        with refused(tls.CA_SETTING, "relative", code="config.file"):
            tls.TLS(Path("ca.pem"), None, None)

    def test_a_ca_file_without_a_certificate_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_text("not PEM")
        with refused(tls.CA_SETTING, "no valid PEM certificate"):
            tls.TLS(tmp_path / "ca.pem", None, None)

    def test_a_ca_file_with_a_private_key_in_it_is_refused(
        self, tmp_path: Path, authority: Authority, client: Pair
    ) -> None:
        (tmp_path / "ca.pem").write_bytes(authority.certificate.read_bytes() + client.key.read_bytes())
        with refused(tls.CA_SETTING, "holds a private key"):
            tls.TLS(tmp_path / "ca.pem", None, None)

    def test_an_empty_system_store_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
        with refused(tls.CA_SETTING, "certificate store is empty"):
            tls.TLS(None, None, None)

    def test_a_certificate_without_its_key_is_refused(self, authority: Authority, client: Pair) -> None:
        with refused(tls.KEY_SETTING, "without its key"):
            tls.TLS(authority.certificate, client.certificate, None)

    def test_a_key_without_its_certificate_is_refused(self, authority: Authority, client: Pair) -> None:
        with refused(tls.CERTIFICATE_SETTING, "without its certificate"):
            tls.TLS(authority.certificate, None, client.key)

    def test_a_missing_key_is_refused(self, authority: Authority, client: Pair) -> None:
        with refused(tls.KEY_SETTING, "does not exist", code="config.file"):
            tls.TLS(authority.certificate, client.certificate, client.key.with_name("none.pem"))

    def test_a_key_that_everyone_can_read_is_refused(self, authority: Authority) -> None:
        pair = authority.client("open")
        pair.key.chmod(0o644)
        with refused(tls.KEY_SETTING, "every user of this host", code="config.key-permissions"):
            tls.TLS(authority.certificate, pair.certificate, pair.key)

    def test_another_certificates_key_is_refused(self, authority: Authority, client: Pair) -> None:
        with refused(tls.KEY_SETTING, "does not match the certificate"):
            tls.TLS(authority.certificate, client.certificate, authority.client("other").key)

    def test_a_key_file_without_a_key_is_refused(self, authority: Authority, client: Pair, tmp_path: Path) -> None:
        (tmp_path / "key.pem").write_bytes(client.certificate.read_bytes())
        (tmp_path / "key.pem").chmod(0o600)
        with refused(tls.KEY_SETTING, "no valid PEM private key"):
            tls.TLS(authority.certificate, client.certificate, tmp_path / "key.pem")

    def test_a_key_with_a_passphrase_is_refused_and_not_asked_for(
        self, authority: Authority, client: Pair, tmp_path: Path
    ) -> None:
        key = load_pem_private_key(client.key.read_bytes(), None)
        encryption = BestAvailableEncryption(b"passphrase")
        (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
        (tmp_path / "key.pem").chmod(0o600)
        with refused(tls.KEY_SETTING, "needs a passphrase"):
            tls.TLS(authority.certificate, client.certificate, tmp_path / "key.pem")

    def test_an_expired_client_certificate_is_refused(self, authority: Authority) -> None:
        now = datetime.now(UTC)
        pair = authority.client("expired", (now - timedelta(days=2), now - timedelta(days=1)))
        with refused(tls.CERTIFICATE_SETTING, "expired at", "renew"):
            tls.TLS(authority.certificate, pair.certificate, pair.key)

    def test_a_client_certificate_of_the_future_is_refused(self, authority: Authority) -> None:
        now = datetime.now(UTC)
        pair = authority.client("future", (now + timedelta(days=1), now + timedelta(days=2)))
        with refused(tls.CERTIFICATE_SETTING, "not valid before", "clock"):
            tls.TLS(authority.certificate, pair.certificate, pair.key)


class TestAddresses:
    AMQP = frozenset({"amqps"})
    REDIS = frozenset({"rediss"})

    @pytest.mark.parametrize(
        "url",
        [
            "amqps://127.0.0.1:5671/my-service",
            "amqps://broker.example",
            "amqps://account@broker.example/vhost",
            "amqps://[::1]:5671/vhost",
            "amqps://a.example/vhost;amqps://b.example/vhost",
        ],
    )
    def test_a_protected_address_is_accepted(self, url: str) -> None:
        tls.check_url(SETTING, url, self.AMQP)

    def test_a_user_without_a_password_is_accepted(self) -> None:
        tls.check_url(SETTING, "rediss://my-service.client@127.0.0.1:6379/0", self.REDIS)

    @pytest.mark.parametrize(
        "url",
        [
            "amqp://broker.example",
            "pyamqp://broker.example",
            "AMQPS://broker.example",
            "amqps+amqp://broker.example",
            "redis://broker.example",
            "rediss://broker.example",
            "memory://broker.example",
            "amqps:/broker.example",
            "broker.example:5671",
            f"user:{PASSWORD}@broker.example",
            f"user:{PASSWORD}@broker.example;amqps://b.example",
            "amqps://a.example;amqp://b.example",
            "amqps://a.example;b.example",
            "amqps://a.example;",
        ],
    )
    def test_a_plain_or_unknown_scheme_is_refused(self, url: str) -> None:
        with refused(SETTING, "is not a protected connection", "use amqps://"):
            tls.check_url(SETTING, url, self.AMQP)

    @pytest.mark.parametrize("url", ["", "  ", None, True, ["amqps://a.example"]])
    def test_no_address_is_refused(self, url: str) -> None:
        with refused(SETTING, "no address", "amqps://"):
            tls.check_url(SETTING, url, self.AMQP)

    @pytest.mark.parametrize(
        "parameter",
        ["ssl_cert_reqs=none", "ssl_cert_reqs=CERT_NONE", "ssl_check_hostname=false", "SSL_CA_CERTS=/tmp/ca.pem"],
    )
    @pytest.mark.parametrize("before", ["", "heartbeat=10&"])
    def test_a_tls_parameter_is_refused(self, before: str, parameter: str) -> None:
        with refused(SETTING, "ssl_* parameter", "overrides"):
            tls.check_url(SETTING, f"rediss://127.0.0.1/0?{before}{parameter}", self.REDIS)

    @pytest.mark.parametrize("end", ["?heartbeat=10", "?", "#x", "?%73sl_cert_reqs=none"])
    def test_every_other_parameter_is_refused_too(self, end: str) -> None:
        with refused(SETTING, "parameters in the address"):
            tls.check_url(SETTING, f"rediss://127.0.0.1/0{end}", self.REDIS)

    @pytest.mark.parametrize("credentials", [f"user:{PASSWORD}", f":{PASSWORD}", "user:"])
    def test_a_password_is_refused_and_not_repeated(self, credentials: str) -> None:
        with refused(SETTING, "holds a password", "file"):
            tls.check_url(SETTING, f"amqps://{credentials}@127.0.0.1/vhost", self.AMQP)

    @pytest.mark.parametrize("url", ["amqps://", "amqps:///vhost", "amqps://:5671/vhost", "amqps://user@/vhost"])
    def test_an_address_without_a_host_is_refused(self, url: str) -> None:
        with refused(SETTING, "names no host"):
            tls.check_url(SETTING, url, self.AMQP)

    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("amqps://broker.example:port/", "malformed"),
            ("amqps://broker.example:70000/", "malformed"),
            ("amqps://[::1/", "malformed"),
            ("amqps://broker.example:0/", "port 0"),
            ("amqps://broker.example/ ", "white space"),
            ("amqps://broker\t.example/", "white space"),
            ("amqps://broker.example/\x00", "control characters"),
        ],
    )
    def test_a_malformed_address_is_refused(self, url: str, reason: str) -> None:
        with refused(SETTING, reason):
            tls.check_url(SETTING, url, self.AMQP)


class TestOptionsOfSomebodyElse:
    @pytest.mark.parametrize("value", [None, False, {}])
    def test_options_that_are_not_set_are_accepted(self, value: object, authority: Authority) -> None:
        tls.check_options("broker_use_ssl", value, tls.TLS(authority.certificate, None, None).amqp())

    def test_the_builders_own_options_are_accepted(self, authority: Authority) -> None:
        built = tls.TLS(authority.certificate, None, None)
        tls.check_options("broker_use_ssl", built.amqp(), built.amqp())

    def test_true_is_refused(self, authority: Authority) -> None:
        with refused("broker_use_ssl", "True verifies no host name"):
            tls.check_options("broker_use_ssl", True, tls.TLS(authority.certificate, None, None).amqp())

    @pytest.mark.parametrize(
        "value",
        [
            {"cert_reqs": ssl.CERT_REQUIRED, "ca_certs": "/etc/ca.pem"},
            {"ssl_version": 5},
            {"ssl_cert_reqs": ssl.CERT_NONE},
            1,
        ],
    )
    def test_options_set_by_hand_are_refused(self, value: object, authority: Authority) -> None:
        with refused("broker_use_ssl", "set by hand"):
            tls.check_options("broker_use_ssl", value, tls.TLS(authority.certificate, None, None).amqp())
