"""What Celery's own TLS settings let pass, row by row, and what this project makes of the same setting.

These connections send no client certificate, so a relay stands between them and the real server. A row that begins to
fail in its first half means that Celery has changed: look whether the control is still needed.
"""

from __future__ import annotations

import ssl
from typing import Any

import kombu
import pytest
import redis
from celery import Celery

from stack import Stack

from ...project import errors, tls
from .relay import presents
from .servers import REASONS, REFUSED, Reached, Servers, ping, reach

AMQPS, REDISS = frozenset({"amqps"}), frozenset({"rediss"})


@pytest.fixture(scope="module")
def servers(stack: Stack) -> Servers:
    return Servers(stack)


@pytest.fixture
def public(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's store trusts the servers' CA, as it trusts every public one."""
    monkeypatch.setenv("SSL_CERT_FILE", str(servers.ca))


@pytest.fixture
def foreign_is_public(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's store trusts the CA that is not the servers'."""
    monkeypatch.setenv("SSL_CERT_FILE", str(servers.certificates["foreign"].certificate.with_name("ca.pem")))


def broker(servers: Servers, certificate: str, options: Any) -> Reached:
    """Connect to RabbitMQ with Celery's own ``broker_use_ssl``."""
    with servers.relay("amqp", presents(servers.certificates[certificate])) as relay:
        url = servers.address("amqp", relay.port)
        return reach(kombu.Connection(url, ssl=options, login_method="EXTERNAL"))


def redis_broker(servers: Servers, certificate: str, options: Any, query: str = "") -> Any:
    """Connect to Redis as a broker with Celery's own ``broker_use_ssl``."""
    at_once = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
    with (
        servers.relay("redis", presents(servers.certificates[certificate])) as relay,
        kombu.Connection(
            servers.with_password(relay.port) + query, ssl=options, transport_options=at_once
        ) as connection,
    ):
        return connection.default_channel.client.ping()


def backend(servers: Servers, certificate: str, options: Any, query: str = "") -> Any:
    """Connect to Redis as a result backend with Celery's own ``redis_backend_use_ssl``."""
    with servers.relay("redis", presents(servers.certificates[certificate])) as relay:
        app = Celery("stock", backend=servers.with_password(relay.port) + query, set_as_current=False)
        app.conf.redis_backend_use_ssl = options
        return app.backend.client.ping()


def refused(words: str) -> pytest.RaisesExc[errors.ConfigurationRefused]:
    return pytest.raises(errors.ConfigurationRefused, match=words)


class TestRabbitMQ:
    @pytest.mark.usefixtures("public")
    @pytest.mark.parametrize("options", [None, True])
    def test_amqps_and_true_verify_no_host_name(self, servers: Servers, options: Any) -> None:
        assert not broker(servers, "wrong-host", options).context.check_hostname
        with pytest.raises(REFUSED, match=REASONS["foreign"]):
            broker(servers, "foreign", options)
        with refused("True verifies no host name"):
            tls.check_options("broker_use_ssl", True, servers.built.amqp())

    def test_a_ca_alone_verifies_no_host_name(self, servers: Servers) -> None:
        options = {"ca_certs": str(servers.ca), "cert_reqs": ssl.CERT_REQUIRED}
        assert not broker(servers, "wrong-host", options).context.check_hostname
        with pytest.raises(REFUSED, match=REASONS["wrong-host"]):
            broker(servers, "wrong-host", {**options, "server_hostname": "127.0.0.1"})
        with refused("set by hand"):
            tls.check_options("broker_use_ssl", options, servers.built.amqp())

    @pytest.mark.filterwarnings("ignore:ssl.PROTOCOL_TLSv1_2")
    @pytest.mark.parametrize("wrong", REASONS)
    def test_a_protocol_version_verifies_nothing(self, servers: Servers, wrong: str) -> None:
        options = {"ssl_version": ssl.PROTOCOL_TLSv1_2}
        assert broker(servers, wrong, options).context.verify_mode is ssl.CERT_NONE
        with refused("set by hand"):
            tls.check_options("broker_use_ssl", options, servers.built.amqp())

    def test_localhost_is_another_name_for_127_0_0_1(self, servers: Servers) -> None:
        """The certificate of a broker that is called localhost needs the address among its names."""
        named = servers.stack.pki.tls.server("named", ("localhost",))
        for pair, accepted in ((servers.certificates["right"], True), (named, False)):
            with servers.relay("amqp", presents(pair)) as relay:
                url = servers.address("amqp", relay.port, "localhost")
                connection = servers.hardened(broker_url=url).connection_for_write()
                if accepted:
                    reach(connection)
                else:
                    with pytest.raises(REFUSED, match=REASONS["wrong-host"]):
                        reach(connection)


class TestRedis:
    @pytest.mark.parametrize("wrong", REASONS)
    def test_rediss_as_a_broker_verifies_nothing(
        self, servers: Servers, wrong: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert redis_broker(servers, wrong, None)
        assert "defaulting to insecure SSL behaviour" in caplog.text

    def test_rediss_as_a_result_backend_refuses_to_guess(self, servers: Servers) -> None:
        with pytest.raises(ValueError, match="must have parameter ssl_cert_reqs"):
            backend(servers, "right", None)

    @pytest.mark.parametrize("scheme", ["redis", "rediss"])
    def test_true_sends_the_password_in_plain_text(self, servers: Servers, scheme: str) -> None:
        with servers.relay("redis") as relay:
            with kombu.Connection(servers.with_password(relay.port, scheme), ssl=True) as connection:
                assert connection.default_channel.client.ping()
            assert servers.password.encode() in relay.received
        with refused("does not encrypt at all with Redis"):
            tls.check_options("broker_use_ssl", True, servers.built.redis())

    def test_a_protected_broker_leaves_the_backend_plain(self, servers: Servers) -> None:
        with servers.relay("redis") as relay:
            app = Celery("stock", backend=servers.with_password(relay.port, "redis"), set_as_current=False)
            app.conf.broker_use_ssl = servers.built.amqp()
            assert app.backend.client.ping()
            assert servers.password.encode() in relay.received
        with refused("redis:// is not a protected connection; use rediss://"):
            servers.hardened(result_backend="redis://127.0.0.1/0")

    @pytest.mark.parametrize("wrong", REASONS)
    def test_a_parameter_in_the_url_overrides_the_settings(self, servers: Servers, wrong: str) -> None:
        parameter = "?ssl_cert_reqs=none"
        with pytest.raises(REFUSED, match=REASONS[wrong]):
            backend(servers, wrong, servers.built.redis())
        with pytest.raises(REFUSED, match=REASONS[wrong]):
            redis_broker(servers, wrong, servers.built.redis())
        assert backend(servers, wrong, servers.built.redis(), parameter)
        assert redis_broker(servers, wrong, servers.built.redis(), parameter)
        with refused("overrides the settings"):
            tls.check_url("result_backend", servers.address("redis", 6379) + parameter, REDISS)

    def test_a_parameter_in_the_url_switches_the_host_name_off(
        self, servers: Servers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parameter = "?ssl_check_hostname=false"
        assert backend(servers, "wrong-host", servers.built.redis(), parameter)
        # As a broker, the parameter replaces all settings, the CA included: what is left is the system's store.
        with pytest.raises(REFUSED, match=REASONS["foreign"]):
            redis_broker(servers, "wrong-host", servers.built.redis(), parameter)
        monkeypatch.setenv("SSL_CERT_FILE", str(servers.ca))
        assert redis_broker(servers, "wrong-host", servers.built.redis(), parameter)
        with refused("overrides the settings"):
            tls.check_url("result_backend", servers.address("redis", 6379) + parameter, REDISS)

    @pytest.mark.usefixtures("foreign_is_public")
    def test_a_ca_is_trusted_beside_the_systems_and_not_instead(self, servers: Servers) -> None:
        assert backend(servers, "foreign", servers.built.redis())
        with (
            servers.relay("redis", presents(servers.certificates["foreign"])) as relay,
            pytest.raises(REFUSED, match=REASONS["foreign"]),
        ):
            servers.ours("redis", relay.port)

    @pytest.mark.parametrize("wrong", REASONS)
    def test_our_connection_verifies_whatever_the_settings_say(self, servers: Servers, wrong: str) -> None:
        """Also with what a later change of the configuration would set."""
        with servers.relay("redis", presents(servers.certificates[wrong])) as relay:
            app = servers.hardened(result_backend=servers.address("redis", relay.port))
            app.conf.redis_backend_use_ssl = {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_ca_certs": str(servers.ca)}
            with pytest.raises(REFUSED, match=REASONS[wrong]):
                ping(app)


class TestSentinel:
    """Discovery connects by itself. Redis behind the relay is no sentinel, but answers one that reaches it."""

    def _discover(self, servers: Servers, port: int, **options: Any) -> None:
        app = Celery("stock", backend=f"sentinel://127.0.0.1:{port}", set_as_current=False)
        app.conf.redis_backend_use_ssl = servers.built.redis()
        app.conf.result_backend_transport_options = {"master_name": "results", **options}
        sentinel = app.backend._get_sentinel_instance(**app.backend.connparams)
        with pytest.raises(redis.RedisError):
            sentinel.discover_master("results")

    def test_discovery_is_plain_text_unless_told_otherwise(self, servers: Servers) -> None:
        with servers.relay("redis") as relay:
            self._discover(servers, relay.port, sentinel_kwargs={"retry": None})
            assert relay.received.startswith(b"*")  # a Redis command, readable to all

    def test_discovery_with_our_options_verifies_the_sentinel(self, servers: Servers) -> None:
        options = {**servers.built.sentinel(), "retry": None}
        with servers.relay("redis", presents(servers.certificates["right"])) as relay:
            self._discover(servers, relay.port, sentinel_kwargs=options)
            assert relay.received.startswith(b"*")  # what the relay found inside TLS
        for wrong in REASONS:
            with servers.relay("redis", presents(servers.certificates[wrong])) as relay:
                self._discover(servers, relay.port, sentinel_kwargs=options)
                assert not relay.received
