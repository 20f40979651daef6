"""harden(): what holds afterwards, and what undoes it is found."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
from celery import Celery
from kombu import Exchange, Queue
from kombu.serialization import registry

from ...project import Settings, consumer, errors, hardening, intake, producer, results
from .hardened import _app, _refused, client, own, pki, stock_decoders, worker

__all__ = ["client", "own", "pki", "stock_decoders", "worker"]

# --- effective configuration ------------------------------------------------------------------------------------------


def test_every_setting_has_the_safe_value(worker: Settings, own: str) -> None:
    conf = _app(worker).conf
    expected = {
        "broker_url": worker.broker_url,
        "broker_read_url": worker.broker_url,
        "broker_write_url": worker.broker_url,
        "broker_login_method": "EXTERNAL",
        "broker_transport_options": {"confirm_publish": True},
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_compression": None,
        "result_compression": None,
        "result_extended": False,
        "task_protocol": 2,
        "task_always_eager": False,
        "task_send_sent_event": False,
        "worker_send_task_events": False,
        "control_exchange": f"{own}.celery.control",
        "event_exchange": f"{own}.celery.events",
        "task_create_missing_queues": False,
        "task_default_exchange": own,
        "task_default_exchange_type": "topic",
        "task_default_queue": f"{own}.default",
        "task_default_routing_key": f"{own}.default",
        "worker_detect_quorum_queues": True,
        "worker_consumer": consumer.HardenedConsumer,
        "security_key": str(worker.security_key),
        "security_certificate": str(worker.security_certificate),
        "security_cert_store": str(worker.security_cert_store),
        "security_digest": "sha256",
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_ignore_result": True,
        "task_time_limit": 300,
        "task_soft_time_limit": 270,
        "worker_prefetch_multiplier": 1,
        "worker_max_tasks_per_child": 1000,
        "worker_max_memory_per_child": 512 * 1024,
        "worker_eta_task_limit": 2_000,
        "result_expires": 3600,
    }
    assert {name: getattr(conf, name) for name in expected} == expected
    assert conf.result_backend_transport_options["global_keyprefix"] == f"{own}:"


def test_broker_and_backend_verify_their_servers(worker: Settings) -> None:
    conf = _app(worker).conf
    broker, backend = conf.broker_use_ssl, conf.redis_backend_use_ssl
    assert (broker["cert_reqs"], broker["server_hostname"]) == (ssl.CERT_REQUIRED, None)
    assert (backend["ssl_cert_reqs"], backend["ssl_check_hostname"]) == (ssl.CERT_REQUIRED, True)
    assert broker["ca_certs"] == backend["ssl_ca_certs"] == str(worker.tls_ca)
    assert broker["tls_minimum_version"] == backend["ssl_min_version"] == ssl.TLSVersion.TLSv1_2


def test_every_queue_is_a_quorum_queue_of_the_topology_that_nobody_declares(worker: Settings, own: str) -> None:
    app = _app(worker)
    (queue,) = app.conf.task_queues
    assert (queue.name, queue.routing_key, queue.no_declare) == (f"{own}.default", f"{own}.default", True)
    assert (queue.exchange.name, queue.exchange.type, queue.exchange.no_declare) == (own, "topic", True)
    assert queue.queue_arguments == {"x-queue-type": "quorum"}
    with pytest.raises(KeyError):
        app.amqp.queues["made-up"]


def test_every_part_is_ours(worker: Settings) -> None:
    app = _app(worker)
    assert isinstance(app.amqp, producer.SigningAMQP)
    assert isinstance(app.backend, results.SignedRedisBackend)
    for connection in (app.connection(), app.connection_for_read(), app.connection_for_write()):
        assert isinstance(connection, intake.Connection)
        assert isinstance(connection.transport, intake.AmqpTransport)
    assert isinstance(app.pool.connection, intake.Connection)


def test_the_applications_own_choices_stay_where_they_are_safe(worker: Settings) -> None:
    app = Celery("harden", set_as_current=False)
    app.conf.update(task_time_limit=20, result_expires=60, task_ignore_result=False, task_acks_late=False)
    hardening.harden(app, worker)
    assert (app.conf.task_time_limit, app.conf.result_expires) == (20, 60)
    assert (app.conf.task_ignore_result, app.conf.task_acks_late) == (False, False)
    assert app.conf.task_soft_time_limit is None
    app.hardening.check(app)


@pytest.mark.parametrize(
    "insecure",
    [
        {"accept_content": ["pickle", "json"]},
        {"result_accept_content": ["pickle"]},
        {"task_serializer": "pickle"},
        {"result_serializer": "pickle"},
        {"event_serializer": "pickle"},
        {"broker_url": "amqp://plain"},
        {"broker_read_url": "amqp://plain"},
        {"broker_write_url": "amqp://plain"},
        {"result_backend": "redis://plain"},
        {"result_backend": "db+sqlite:////tmp/x"},
        {"task_always_eager": True},
        {"task_protocol": 1},
        {"task_send_sent_event": True},
        {"control_exchange": "celery"},
        {"event_exchange": "celeryev"},
        {"task_create_missing_queues": True},
        {"task_queues": [Queue("x", Exchange("x"))]},
        {"task_compression": "gzip"},
        {"result_extended": True},
        {"broker_login_method": "PLAIN"},
        {"broker_transport_options": {"confirm_publish": False}},
        {"worker_consumer": "celery.worker.consumer:Consumer"},
        {"result_backend_transport_options": {"global_keyprefix": ""}},
    ],
    ids=lambda insecure: next(iter(insecure)),
)
class TestAnInsecureSetting:
    def test_made_before_is_replaced(self, worker: Settings, insecure: dict[str, Any]) -> None:
        app = Celery("harden", set_as_current=False)
        app.config_from_object(insecure)
        hardening.harden(app, worker)
        for name, value in insecure.items():
            assert getattr(app.conf, name) != value
        app.hardening.check(app)

    def test_made_afterwards_stops_the_worker_by_name(self, worker: Settings, insecure: dict[str, Any]) -> None:
        app = _app(worker)
        app.conf.update(insecure)
        refusal = _refused(app)
        assert refusal.setting == next(iter(insecure))
        assert refusal.code == "config.changed"

    def test_made_afterwards_stops_the_first_message(self, client: Settings, insecure: dict[str, Any]) -> None:
        app = _app(client)
        app.conf.update(insecure)
        with pytest.raises(errors.ConfigurationRefused):
            _ = app.amqp.send_task_message


def test_a_value_changed_in_place_is_found(worker: Settings) -> None:
    app = _app(worker)
    app.conf.accept_content.append("pickle")
    assert _refused(app).setting == "accept_content"
    app = _app(worker)
    app.conf.broker_use_ssl["cert_reqs"] = ssl.CERT_NONE
    assert _refused(app).setting == "broker_use_ssl"


@pytest.mark.parametrize("force", [True, False])
def test_a_configuration_loaded_afterwards_is_found(worker: Settings, force: bool) -> None:
    app = _app(worker)
    app.config_from_object({"accept_content": ["pickle"]}, force=force)
    assert _refused(app).code == "config.changed"


@pytest.mark.parametrize(
    "name", ["CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND"]
)
def test_celerys_own_environment_is_refused(worker: Settings, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """``celery -b amqp://...`` sets one, and Celery prefers it to its configuration."""
    monkeypatch.setenv(name, "redis://plain")
    with pytest.raises(errors.ConfigurationRefused) as caught:
        _app(worker)
    assert caught.value.setting == name
    monkeypatch.delenv(name)
    app = _app(worker)
    monkeypatch.setenv(name, "redis://plain")
    assert _refused(app).code == "config.changed"


def test_addresses_given_to_the_constructor_are_replaced(worker: Settings) -> None:
    app = _app(worker, broker="amqp://plain", backend="redis://plain")
    app.hardening.check(app)
    assert isinstance(app.backend, results.SignedRedisBackend)


@pytest.mark.parametrize("name", ["broker_use_ssl", "redis_backend_use_ssl"])
def test_tls_options_set_by_hand_are_refused(worker: Settings, name: str) -> None:
    for value in (True, {"cert_reqs": ssl.CERT_NONE}, {"ssl_version": ssl.PROTOCOL_TLSv1_2}):
        app = Celery("harden", set_as_current=False)
        app.conf[name] = value
        with pytest.raises(errors.ConfigurationRefused) as caught:
            hardening.harden(app, worker)
        assert caught.value.setting == name
        assert caught.value.code == "config.tls"


# --- order ------------------------------------------------------------------------------------------------------------


def test_what_was_made_before_is_made_again(worker: Settings) -> None:
    app = Celery("harden", set_as_current=False)
    before = (app.amqp, app.backend, app.pool)
    assert not isinstance(before[0], producer.SigningAMQP)
    hardening.harden(app, worker)
    assert isinstance(app.amqp, producer.SigningAMQP)
    assert isinstance(app.backend, results.SignedRedisBackend)
    assert app.pool is not before[2]
    app.hardening.check(app)


def test_harden_twice_is_refused(worker: Settings) -> None:
    app = _app(worker)
    with pytest.raises(errors.ConfigurationRefused, match="twice"):
        hardening.harden(app, worker)


def test_a_refused_application_is_left_as_it_was(worker: Settings) -> None:
    app = Celery("harden", set_as_current=False)
    app.conf.broker_use_ssl = True
    with pytest.raises(errors.ConfigurationRefused):
        hardening.harden(app, worker)
    assert getattr(app, "hardening", None) is None
    assert not isinstance(app.amqp, producer.SigningAMQP)
    app.conf.broker_use_ssl = None
    hardening.harden(app, worker)
    app.hardening.check(app)


def test_another_digest_is_refused(worker: Settings) -> None:
    app = Celery("harden", set_as_current=False)
    app.conf.security_digest = "md5"
    with pytest.raises(errors.ConfigurationRefused) as caught:
        hardening.harden(app, worker)
    assert caught.value.setting == "security_digest"


# --- stock signing ----------------------------------------------------------------------------------------------------


def test_setup_security_afterwards_is_refused(worker: Settings) -> None:
    app = _app(worker)
    with pytest.raises(errors.ConfigurationRefused) as caught:
        app.setup_security()
    assert caught.value.code == "config.stock-signing"
    app.hardening.check(app)


def test_stock_signing_put_back_in_another_way_is_found(worker: Settings) -> None:
    """Celery's own module function, or another application of the process."""
    app = _app(worker)
    app.hardening.check(app)
    registry.register("auth", lambda _: b"", lambda _: None, content_type="application/data")
    assert _refused(app).code == "config.stock-signing"
