"""TLS on the wire: with each wrong certificate, protocol and client, against the real RabbitMQ and the real Redis.

What Celery's own settings let pass is in ``test_tls_of_celery``.
"""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import kombu
import pytest

from stack import Stack
from stack.backend import Backend
from stack.pki import Pair
from stack.process import wait_until
from stack.record import free_ports

from ...project import hardening, tls
from ...service import ROOT
from .relay import Relay, presents
from .servers import PROTOCOLS, REASONS, REFUSED, Reached, Servers, reach


@pytest.fixture(scope="module")
def servers(stack: Stack) -> Servers:
    return Servers(stack)


@pytest.fixture(scope="class")
def rabbitmq(stack: Stack) -> Iterator[Callable[[Pair], None]]:
    """Make the running RabbitMQ present another certificate: exchanging its files saves a start for each."""
    folder = stack.folder / "pki/tls"
    files = Pair(folder / "rabbitmq.pem", folder / "rabbitmq-key.pem")
    own = files.certificate.read_bytes(), files.key.read_bytes()

    def present(certificate: bytes, key: bytes) -> None:
        files.certificate.write_bytes(certificate)
        files.key.write_bytes(key)
        stack.rabbitmqctl("eval", "ssl:clear_pem_cache().")

    yield lambda pair: present(pair.certificate.read_bytes(), pair.key.read_bytes())
    present(*own)


class TestServerCertificate:
    """The servers themselves, with each certificate."""

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_the_right_one_connects_with_everything_verified(self, servers: Servers, protocol: str) -> None:
        reached = servers.ours(protocol, servers.ports[protocol])
        assert reached.version == "TLSv1.3"
        assert reached.context.verify_mode is ssl.CERT_REQUIRED
        assert reached.context.check_hostname
        assert reached.context.minimum_version is ssl.TLSVersion.TLSv1_2
        assert reached.context.maximum_version is ssl.TLSVersion.MAXIMUM_SUPPORTED
        assert all(cipher["aead"] for cipher in reached.context.get_ciphers())
        assert reached.context.cert_store_stats()["x509"] == 1  # the configured CA and no other

    @pytest.mark.parametrize("wrong", [None, *REASONS])
    def test_rabbitmq_with_a_wrong_one_is_refused(
        self, servers: Servers, rabbitmq: Callable[[Pair], None], wrong: str | None
    ) -> None:
        rabbitmq(servers.certificates[wrong or "right"])
        _expect(wrong, lambda: servers.ours("amqp", servers.ports["amqp"]))

    @pytest.mark.parametrize("wrong", [None, *REASONS])
    def test_redis_with_a_wrong_one_is_refused(self, servers: Servers, wrong: str | None) -> None:
        stack, port = servers.stack, free_ports(1)[0]
        backend = Backend(ROOT, stack.folder / f"redis-{wrong}", port, stack.account)
        rules = (f"user {servers.account} on resetpass -@all +ping",)
        backend.configure(rules, servers.ca, servers.certificates[wrong or "right"])
        password = backend.password_file(servers.account)
        process = backend.start(stack.folder / f"redis-{wrong}.log")
        try:
            wait_until(lambda: _listens(port), f"Redis (see {process.log})", 10)
            _expect(wrong, lambda: servers.ours("redis", port, result_backend_password_file=password))
        finally:
            process.stop()


def _expect(wrong: str | None, connect: Callable[[], Reached]) -> None:
    if wrong is None:
        connect()
        return
    with pytest.raises(REFUSED, match=REASONS[wrong]):
        connect()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
class TestProtocol:
    """What the connection itself must be; a relay offers what the servers' own configuration does not."""

    @pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
    def test_a_server_with_tls_11_at_most_is_refused(self, servers: Servers, protocol: str) -> None:
        old = presents(servers.certificates["right"])
        old.set_ciphers("ALL:@SECLEVEL=0")  # the level at which OpenSSL 3 still speaks it
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        lenient = ssl.create_default_context(cafile=servers.ca)
        lenient.set_ciphers("ALL:@SECLEVEL=0")
        lenient.minimum_version = ssl.TLSVersion.TLSv1
        with servers.relay(protocol, old) as relay:
            with socket.create_connection(("127.0.0.1", relay.port)) as plain:
                lenient.wrap_socket(plain, server_hostname="127.0.0.1").close()
            with pytest.raises(REFUSED):
                servers.ours(protocol, relay.port)
            assert relay.versions == ["TLSv1.1"]  # the lenient client's: no other handshake was completed

    def test_a_server_with_weak_ciphers_is_refused(self, servers: Servers, protocol: str) -> None:
        weak = presents(servers.certificates["right"])
        weak.maximum_version = ssl.TLSVersion.TLSv1_2
        weak.set_ciphers("ECDHE-ECDSA-AES128-SHA256")  # CBC mode: not authenticated encryption
        usual = ssl.create_default_context(cafile=servers.ca)
        with servers.relay(protocol, weak) as relay:
            with socket.create_connection(("127.0.0.1", relay.port)) as plain:
                usual.wrap_socket(plain, server_hostname="127.0.0.1").close()
            with pytest.raises(REFUSED):
                servers.ours(protocol, relay.port)
            assert relay.versions == ["TLSv1.2"]

    def test_a_server_with_tls_12_and_strong_ciphers_connects(self, servers: Servers, protocol: str) -> None:
        strong = presents(servers.certificates["right"])
        strong.maximum_version = ssl.TLSVersion.TLSv1_2
        with servers.relay(protocol, strong) as relay:
            assert servers.ours(protocol, relay.port).version == "TLSv1.2"

    def test_a_plain_text_server_is_refused_and_learns_nothing(
        self, servers: Servers, protocol: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT", 1.0)
        with servers.relay(protocol) as relay:
            with pytest.raises(REFUSED, match=r"(?i)wrong.version.number|is it a plain-text port"):
                servers.ours(protocol, relay.port)
            assert relay.received.startswith(b"\x16\x03")  # a TLS handshake record
            assert servers.account.encode() not in relay.received
            assert servers.password.encode() not in relay.received


GREETINGS = {"amqp": b"AMQP\0\0\x09\x01", "redis": b"PING\r\n"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
class TestClientCertificate:
    """The servers talk to nobody who has no certificate of the right CA."""

    def _talk(self, servers: Servers, protocol: str, pair: Pair | None) -> bytes:
        context = ssl.create_default_context(cafile=servers.ca)
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        with socket.create_connection(("127.0.0.1", servers.ports[protocol]), 10) as plain:
            protected = context.wrap_socket(plain, server_hostname="127.0.0.1")
            protected.sendall(GREETINGS[protocol])
            return protected.recv(1)

    def test_a_client_of_the_right_ca_is_answered(self, servers: Servers, protocol: str) -> None:
        assert self._talk(servers, protocol, servers.client)

    @pytest.mark.parametrize("kind", ["none", "foreign", "expired"])
    def test_every_other_client_is_refused(self, servers: Servers, protocol: str, kind: str) -> None:
        now, pki, name = datetime.now(UTC), servers.stack.pki, f"{protocol}-{kind}"
        pair = None
        if kind == "foreign":
            pair = pki.authority(name).client(servers.account)
        elif kind == "expired":
            pair = pki.tls.client(name, (now - timedelta(days=2), now - timedelta(days=1)))
        # The server's alert, or what is left of the connection if that came first.
        with pytest.raises(OSError, match=r"(?i)certificate|unknown.ca|EOF|reset|broken pipe"):
            self._talk(servers, protocol, pair)


@pytest.fixture(scope="module")
def second(stack: Stack) -> Pair:
    """The certificate of a broker at 127.0.0.2."""
    return stack.pki.tls.server("second", ("127.0.0.2",))


class TestFailover:
    """Two brokers, at 127.0.0.1 and 127.0.0.2; the second one's certificate names only one of them."""

    def _connect(self, connection: kombu.Connection, first: Relay, was_up: bool) -> Reached:
        if was_up:
            connection.ensure_connection(max_retries=1)
        first.close()
        connection.close()
        return reach(connection)

    def _urls(self, servers: Servers, first: Relay, second: Relay) -> str:
        return f"{servers.address('amqp', first.port)};{servers.address('amqp', second.port, '127.0.0.2')}"

    @pytest.mark.parametrize("was_up", [True, False])
    def test_celery_checks_the_second_broker_against_the_first_ones_name(
        self, servers: Servers, second: Pair, was_up: bool
    ) -> None:
        options = {"ca_certs": str(servers.ca), "cert_reqs": ssl.CERT_REQUIRED, "server_hostname": None}

        def connect(pair: Pair) -> Reached:
            first = servers.relay("amqp", presents(servers.certificates["right"]))
            with servers.relay("amqp", presents(pair), "127.0.0.2") as other:
                urls = self._urls(servers, first, other)
                with kombu.Connection(urls, ssl=dict(options), login_method="EXTERNAL") as connection:
                    return self._connect(connection, first, was_up)

        connect(servers.certificates["right"])  # presented by the second broker, whose name it does not have
        with pytest.raises(REFUSED, match=r"certificate is not valid for '127\.0\.0\.1'"):
            connect(second)

    @pytest.mark.parametrize("was_up", [True, False])
    def test_ours_checks_every_broker_against_its_own_name(self, servers: Servers, second: Pair, was_up: bool) -> None:
        def connect(pair: Pair) -> Reached:
            first = servers.relay("amqp", presents(servers.certificates["right"]))
            with servers.relay("amqp", presents(pair), "127.0.0.2") as other:
                app = servers.hardened(broker_url=self._urls(servers, first, other))
                with app.connection_for_write() as connection:
                    return self._connect(connection, first, was_up)

        connect(second)
        with pytest.raises(REFUSED, match=r"certificate is not valid for '127\.0\.0\.2'"):
            connect(servers.certificates["right"])


class TestStart:
    """A worker does not start with settings that would leave a connection unprotected; it says why in one sentence."""

    @pytest.mark.parametrize(
        ("setting", "value", "words"),
        [
            ("BROKER_URL", "amqp://127.0.0.1/x", "is not a protected connection; use amqps://"),
            ("BROKER_URL", "amqps://127.0.0.1/x;amqp://127.0.0.2/x", "is not a protected connection"),
            ("BROKER_URL", "amqps://guest:guest@127.0.0.1/x", "the address holds a password"),
            ("RESULT_BACKEND", "redis://127.0.0.1/0", "is not a protected connection; use rediss://"),
            ("RESULT_BACKEND", "rediss://127.0.0.1/0?ssl_cert_reqs=none", "overrides the settings"),
            ("TLS_CERTIFICATE", None, "is not set"),
            ("TLS_CA", "ca.pem", "relative path"),
        ],
    )
    def test_an_insecure_setting_ends_the_start(
        self, servers: Servers, tmp_path: Path, setting: str, value: str | None, words: str
    ) -> None:
        name = f"SECURE_CELERY_{setting}"
        environment = {**servers.stack.environment("worker"), name: value}
        self._refused({key: each for key, each in environment.items() if each is not None}, f"{name}: ", words)

    def test_a_key_that_everyone_can_read_ends_the_start(self, servers: Servers, tmp_path: Path) -> None:
        key = tmp_path / "key.pem"
        key.write_bytes(servers.client.key.read_bytes())
        key.chmod(0o644)
        environment = {**servers.stack.environment("client"), "SECURE_CELERY_TLS_KEY": str(key)}
        self._refused(environment, f"{tls.KEY_SETTING}: ", "every user of this host can access")

    def _refused(self, environment: dict[str, str], *words: str) -> None:
        package = hardening.__name__.partition(".")[0]
        done = subprocess.run(
            [sys.executable, "-m", "celery", "-A", f"{package}.app", "worker"],
            env={"PATH": os.defpath, "PYTHONPATH": str(ROOT / "src"), **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode != 0
        sentence = done.stderr.strip().splitlines()[-1]
        assert sentence.startswith("Refused to start. ")
        for word in words:
            assert word in sentence
