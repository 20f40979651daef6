"""Brokers and result backends that a provider manages: one account with a password, no client certificates, nothing
loaded, and on Redis no CONFIG and no ACL. What is weaker there is said; everything else holds.

The first tests are those of other modules, run here on such servers.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import amqp
import pytest
import redis
from celery import Celery

from stack import StackFailed
from stack.broker import ONE_ACCOUNT
from stack.process import Process

from ...project import Settings, errors, hardening, render, tls
from ...service import ROOT
from . import test_celery, test_reliability
from .everything import within
from .relay import Relay, presents
from .running import SOON, TASKS, Running
from .servers import REASONS, REFUSED, ping

#: What each party's settings give up here; the rest of WEAKER is about `system`, further down.
GIVEN_UP = {f"{place}_{what}" for place in ("broker", "result_backend") for what in ("auth=password", "topology=app")}
DEFAULT = "everything.default"


@pytest.fixture(scope="module")
def running(temporary: Path) -> Iterator[Running]:
    """Everything Celery can do, on servers as a provider lets them be."""
    with Running(temporary / "managed", managed=True) as running:
        yield running


# -- Celery as ever ---------------------------------------------------------------------------------------------------

test_canvas = test_celery.test_canvas
test_a_failing_header_fails_its_chord = test_celery.test_a_failing_header_fails_its_chord
test_a_task_that_has_to_wait_keeps_no_other_waiting = test_celery.test_a_task_that_has_to_wait_keeps_no_other_waiting
test_a_task_is_retried_as_often_as_it_fails = test_celery.test_a_task_is_retried_as_often_as_it_fails
test_a_retry_waits_and_keeps_its_caller = test_celery.test_a_retry_waits_and_keeps_its_caller
test_a_task_that_kills_its_process_ends_in_the_dead_letters = (
    test_reliability.test_a_task_that_kills_its_process_ends_in_the_dead_letters
)
test_a_killed_broker_loses_nothing = test_reliability.test_a_killed_broker_loses_nothing

# -- what does not depend on the broker -------------------------------------------------------------------------------


def test_a_forged_message_does_not_run_and_is_kept(running: Running, key: str) -> None:
    before = running.length("quarantine")
    headers = {"task": f"{TASKS}.effect", "id": uuid4().hex, "lang": "py", "argsrepr": "", "kwargsrepr": ""}
    body = json.dumps([[key], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    with running.client.connection_for_write() as connection, connection.Producer() as producer:
        producer.publish(
            body,
            exchange=running.client.hardening.broker.exchange,
            routing_key=DEFAULT,
            content_type="application/json",
            content_encoding="utf-8",
            headers=headers,
        )
    assert within(SOON, lambda: running.length("quarantine") == before + 1)
    assert running.task("add").delay(1, 2).get(timeout=SOON) == 3
    assert running.count(key) == 0
    assert running.worker.alive()


def test_who_shares_the_account_still_may_not_send_what_is_anothers(running: Running, key: str) -> None:
    shop = running.caller("shop")
    assert running.task("add", shop).delay(1, 2).get(timeout=SOON) == 3
    result = running.task("counted", shop).delay(key)
    with pytest.raises(errors.Refused, match=r"policy\.denied"):
        result.get(timeout=SOON)
    assert running.count(key) == 0


def test_a_result_of_another_caller_is_refused(running: Running) -> None:
    """The shared account reads every key, so only the result's own envelope can say whose it is."""
    result = running.task("add").delay(1, 2)
    assert result.get(timeout=SOON) == 3
    shop, client = running.caller("shop").backend, running.client.backend
    theirs = running.task("add", running.caller("shop")).delay(3, 4)
    assert theirs.get(timeout=SOON) == 7
    stored = client.client.get(client.get_key_for_task(result.id))
    assert stored
    shop.client.set(shop.get_key_for_task(theirs.id), stored)
    with pytest.raises(errors.ForeignResult):
        running.caller("shop").AsyncResult(theirs.id).get(timeout=SOON)


# -- the connections --------------------------------------------------------------------------------------------------

PLACES = {"broker": "broker_url", "result backend": "result_backend"}


def own(running: Running) -> dict[str, Any]:
    """The client's settings."""
    environment = running.stack.environment("client")
    return {name.removeprefix("SECURE_CELERY_").lower(): value for name, value in environment.items()}


def connect(running: Running, place: str, port: int | None = None, **values: Any) -> None:
    """Connect to a server, or to another port in its place, and log in."""
    given = {**own(running), **values}
    if port:
        given[PLACES[place]] = given[PLACES[place]].replace(f":{urlsplit(given[PLACES[place]]).port}", f":{port}")
    app = Celery("client", set_as_current=False)
    hardening.harden(app, Settings(**given))
    if place == "broker":
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            connection.default_channel.close()
    else:
        ping(app)


def passwords(running: Running) -> list[bytes]:
    return [Path(own(running)[f"{place}_password_file"]).read_bytes() for place in ("broker", "result_backend")]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def relayed(running: Running, place: str, server: ssl.SSLContext | None) -> Relay:
    """Put a relay in front of a server: what it presents is all that differs."""
    port = urlsplit(own(running)[PLACES[place]]).port
    return Relay(port or 0, running.stack.pki.tls.client("relay"), server)


def test_the_right_server_is_let_have_the_password(running: Running, place: str) -> None:
    connect(running, place)
    with relayed(running, place, presents(running.stack.pki.tls.server("right", ("127.0.0.1",)))) as relay:
        connect(running, place, relay.port)
        assert any(password in relay.received for password in passwords(running))  # so that its absence below counts


@pytest.mark.parametrize("wrong", ["foreign", "wrong-host", "plain"])
def test_a_wrong_server_does_not_see_the_password(
    running: Running, place: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT", 1.0)
    pki = running.stack.pki
    server = {
        "foreign": lambda: presents(pki.authority("foreign").server("foreign", ("127.0.0.1",))),
        "wrong-host": lambda: presents(pki.tls.server("wrong-host", ("other.example", "127.0.0.2"))),
        "plain": lambda: None,
    }[wrong]()
    said = REASONS.get(wrong, r"(?i)wrong.version.number|is it a plain-text port")
    with relayed(running, place, server) as relay:
        with pytest.raises(REFUSED, match=said):
            connect(running, place, relay.port)
        assert not any(password in relay.received for password in passwords(running))


def test_a_wrong_password_is_no_way_in(running: Running, place: str, tmp_path: Path) -> None:
    wrong = tmp_path / "password"
    wrong.write_text("guessed")
    wrong.chmod(0o600)
    name = "broker_password_file" if place == "broker" else "result_backend_password_file"
    with pytest.raises((*REFUSED, amqp.AccessRefused, redis.AuthenticationError)):
        connect(running, place, **{name: wrong})


SYSTEM = {"broker_ca": "system", "result_backend_ca": "system", "tls_ca": None}


def test_the_systems_store_decides_whom_to_trust(running: Running, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSL_CERT_FILE is where OpenSSL looks for the system's store."""
    pki = running.stack.pki
    with pytest.raises(REFUSED, match=REASONS["foreign"]):
        connect(running, place, **SYSTEM)
    monkeypatch.setenv("SSL_CERT_FILE", str(pki.authority("elsewhere").certificate))
    with pytest.raises(REFUSED, match=REASONS["foreign"]):
        connect(running, place, **SYSTEM)
    monkeypatch.setenv("SSL_CERT_FILE", str(pki.tls.certificate))
    connect(running, place, **SYSTEM)
    other = presents(pki.tls.server("by-system", ("other.example",)))
    with relayed(running, place, other) as relay, pytest.raises(REFUSED, match=REASONS["wrong-host"]):
        connect(running, place, relay.port, **SYSTEM)


def test_tasks_run_with_the_systems_store(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(running.stack.pki.tls.certificate))
    environment = running.stack.environment("batch")
    del environment["SECURE_CELERY_TLS_CA"]
    environment |= {
        "SECURE_CELERY_BROKER_CA": "system",
        "SECURE_CELERY_RESULT_BACKEND_CA": "system",
        "SECURE_CELERY_REPLAY_ON_OUTAGE": "accept",
        "SSL_CERT_FILE": str(running.stack.pki.tls.certificate),
        "EFFECTS": str(running.effects),
    }
    worker = running.stack.start_worker(env=environment, name="by-system")
    try:
        app = Celery("client", set_as_current=False)
        hardening.harden(app, Settings(**{**own(running), **SYSTEM}))
        sent = app.send_task(f"{TASKS}.add", (1, 2), queue="slow", ignore_result=False)
        assert sent.get(timeout=SOON) == 3
        assert told(worker.log) == set(hardening.settings.WEAKER)
    finally:
        worker.stop()


# -- what is said -----------------------------------------------------------------------------------------------------


def told(log: Path) -> set[str]:
    """The weakenings of which a worker's log tells."""
    lines = [line for line in log.read_text().splitlines() if '"hardening.weakened"' in line]
    return {json.loads(line[line.index("{") :])["setting"].partition(":")[0] for line in lines}


def test_the_workers_log_says_what_is_weaker(running: Running) -> None:
    assert told(running.worker.log) == GIVEN_UP


def status(running: Running, environment: dict[str, str], shell: str = "") -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m stack status --folder {running.stack.folder} {shell}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={"PATH": os.defpath, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_status_says_what_is_weaker(running: Running) -> None:
    weak = status(running, running.stack.environment("client"))
    assert weak.returncode == 0, weak.stderr
    lines = [line.partition("weaker: ")[2] for line in weak.stdout.splitlines() if "weaker: " in line]
    assert {line.partition(":")[0] for line in lines} == GIVEN_UP
    assert "weaker" not in status(running, {}).stdout


def test_status_says_which_setting_would_stop_a_process(running: Running) -> None:
    environment = running.stack.environment("client")
    del environment["SECURE_CELERY_BROKER_PASSWORD_FILE"]
    done = status(running, environment)
    assert done.returncode == 1
    assert "SECURE_CELERY_BROKER_PASSWORD_FILE: is not set" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_status_into_a_pipe_that_closes_is_no_error(running: Running, reader: str) -> None:
    done = status(running, {"PYTHONUNBUFFERED": "1"}, f"| {{ {reader}; }}")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_password_is_in_no_environment_argument_or_log(running: Running) -> None:
    seen = [running.worker.log.read_bytes()]
    for pid, _ in Process.family(running.worker.process):
        seen += [Path(f"/proc/{pid}/{what}").read_bytes() for what in ("environ", "cmdline")]
    assert len(seen) > 3
    assert not any(password in each for password in passwords(running) for each in seen)


# -- RabbitMQ: the application declares -------------------------------------------------------------------------------


def shown(items: list[dict[str, Any]]) -> list[str]:
    for item in items:
        if "x-queue-type" in item.get("arguments", {}):
            item.pop("type", None)  # the export says it twice
        if item.get("internal") is False:
            del item["internal"]  # and this only if it is true
    return sorted(json.dumps(item, sort_keys=True) for item in items if item["vhost"] == "everything")


@pytest.fixture
def vhost(running: Running) -> Iterator[str]:
    """A virtual host where nothing is declared."""
    name = f"new-{uuid4().hex}"
    running.stack.rabbitmqctl("add_vhost", name)
    running.stack.rabbitmqctl("set_permissions", "-p", name, ONE_ACCOUNT, ".*", ".*", ".*")
    yield name
    running.stack.rabbitmqctl("delete_vhost", name)


def at(running: Running, role: str, vhost: str) -> dict[str, str]:
    """A role's environment at another virtual host."""
    environment = running.stack.environment(role)
    url = environment["SECURE_CELERY_BROKER_URL"].rpartition("/")[0]
    return {**environment, "SECURE_CELERY_BROKER_URL": f"{url}/{vhost}", "EFFECTS": str(running.effects)}


@pytest.mark.broker("rabbitmq")
def test_a_worker_declares_exactly_what_an_operator_would_load(running: Running) -> None:
    rendered = render.definitions(running.stack.topology)
    [policy] = rendered["policies"]
    limits = {f"x-{name}": value for name, value in policy["definition"].items()}
    for queue in rendered["queues"]:
        if queue["name"].startswith("celery_delayed_"):
            queue["arguments"] |= limits  # an application cannot make policies
    held = json.loads(running.stack.rabbitmqctl("export_definitions", "-"))
    for section in ("queues", "exchanges", "bindings"):
        # The worker's own queue for commands is named by the broker, and gone with the worker.
        lasting = [each for each in held[section] if not str(each.get("destination")).startswith("amq.gen-")]
        assert shown(lasting) == shown(rendered[section]), section
    assert held["policies"] == []


@pytest.mark.broker("rabbitmq")
def test_before_the_first_worker_a_caller_hears_what_is_missing(running: Running, vhost: str) -> None:
    app = Celery("client", set_as_current=False)
    given = {name.removeprefix("SECURE_CELERY_").lower(): value for name, value in at(running, "client", vhost).items()}
    del given["effects"]
    hardening.harden(app, Settings(**given))
    for _ in range(2):
        with pytest.raises(errors.ConfigurationRefused, match="start a worker first"):
            app.send_task(f"{TASKS}.add", (1, 2), queue="default", ignore_result=False)
    worker = running.stack.start_worker(env=at(running, "worker", vhost), name="first")
    try:
        assert app.send_task(f"{TASKS}.add", (1, 2), queue="default", ignore_result=False).get(timeout=SOON) == 3
    finally:
        worker.stop()
    again = running.stack.start_worker(env=at(running, "worker", vhost), name="second")
    again.stop()


@pytest.mark.broker("rabbitmq")
@pytest.mark.parametrize("different", ["a queue", "a right"])
def test_a_broker_that_holds_something_else_ends_the_start(running: Running, vhost: str, different: str) -> None:
    """As it does for an operator: with other limits the queue would not be what topology.toml says."""
    everything = own(running)
    if different == "a right":
        running.stack.rabbitmqctl("set_permissions", "-p", vhost, ONE_ACCOUNT, "^$", ".*", ".*")
    else:
        connection = amqp.Connection(
            urlsplit(everything["broker_url"]).netloc.rpartition("@")[2],
            userid=ONE_ACCOUNT,
            password=passwords(running)[0].decode(),
            virtual_host=vhost,
            ssl={"ca_certs": everything["tls_ca"], "cert_reqs": ssl.CERT_REQUIRED, "server_hostname": "127.0.0.1"},
        )
        with connection, connection.channel() as channel:
            arguments = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
            channel.queue_declare(DEFAULT, durable=True, auto_delete=False, arguments=arguments)
    reason = "ACCESS_REFUSED" if different == "a right" else "PRECONDITION_FAILED"
    with pytest.raises(StackFailed, match=rf"(?s)different ended.*BROKER_TOPOLOGY: the broker refuses.*{reason}"):
        running.stack.start_worker(env=at(running, "worker", vhost), name="different")


@pytest.mark.broker("rabbitmq")
def test_a_certificate_is_no_login_where_only_passwords_are(running: Running) -> None:
    client = running.stack.pki.tls.client("everything.client")
    given: dict[str, Any] = {"tls_certificate": client.certificate, "tls_key": client.key}
    given |= {"broker_auth": "certificate", "broker_password_file": None}
    with pytest.raises((amqp.AMQPError, OSError, *REFUSED)):
        connect(running, "broker", **given)


# -- Redis: no command that a provider keeps --------------------------------------------------------------------------


def denied(ask: Any) -> set[str]:
    """What kinds of things were asked for in vain, but for wrong passwords."""
    return set(re.findall(r"^reason\n(\w+)$", ask("ACL", "LOG"), re.MULTILINE)) - {"auth"}


@pytest.mark.parametrize("server", ["redis", pytest.param("redis-broker", marks=pytest.mark.broker("redis"))])
def test_nothing_asks_redis_for_what_a_provider_refuses(running: Running, server: str) -> None:
    ask = running.stack.redis if server == "redis" else running.stack.redis_broker
    assert running.task("add").delay(1, 2).get(timeout=SOON) == 3
    assert denied(ask) == set()
    app = running.caller("client")
    with app.connection_for_write() as connection:
        client = app.backend.client if server == "redis" else connection.default_channel.client
        for command in ("CONFIG GET maxmemory", "ACL LIST"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
    assert denied(ask) == {"command"}
    ask("ACL", "LOG", "RESET")
