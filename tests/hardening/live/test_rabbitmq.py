"""RabbitMQ as the stack runs it: what it listens to, its limits, and who may do what, account by account."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import amqp
import pytest

from stack import Stack, StackFailed

from ...service import ROOT

pytestmark = pytest.mark.broker("rabbitmq")

DELAYED = "0." * 27 + "1."


def test_the_broker_has_no_plain_listener_and_no_other_login(servers: Stack) -> None:
    listeners = json.loads(servers.rabbitmqctl("status", "--formatter", "json"))["listeners"]
    assert {listener["protocol"] for listener in listeners} == {"amqp/ssl", "clustering"}
    assert servers.rabbitmqctl("eval", "application:get_env(rabbit, auth_mechanisms).").strip() == "{ok,['EXTERNAL']}"
    plugins = servers.rabbitmqctl("eval", "rabbit_plugins:active().").strip()
    assert plugins == "[rabbitmq_auth_mechanism_ssl]"


def test_the_broker_has_no_account_but_the_topologys(servers: Stack) -> None:
    users = json.loads(servers.rabbitmqctl("list_users", "--formatter", "json"))
    assert {user["user"] for user in users} == {servers.topology.account(role) for role in servers.topology.accounts}
    assert all(not user["tags"] for user in users)


def test_the_brokers_limits_are_in_force(servers: Stack, application: str) -> None:
    for name in ("max_message_size", "connection_max", "channel_max", "consumer_timeout"):
        [configured] = re.findall(
            rf"^{name}\s*=\s*(\d+)$", (ROOT / "deploy/rabbitmq/rabbitmq.conf").read_text(), re.MULTILINE
        )
        assert servers.rabbitmqctl("eval", f"application:get_env(rabbit, {name}).").strip() == f"{{ok,{configured}}}"
    limits = json.loads(
        servers.rabbitmqctl("list_user_limits", "--user", f"{application}.client", "--formatter", "json")
    )
    assert "max-connections" in str(limits)
    queues = servers.rabbitmqctl("-p", application, "list_queues", "name", "policy", "--formatter", "json")
    bounded = {queue["name"] for queue in json.loads(queues) if queue["policy"] == "delayed-length"}
    assert bounded == {f"celery_delayed_{level}" for level in range(28)}


def test_definitions_that_the_broker_does_not_load_are_noticed(temporary: Path) -> None:
    def wrong_argument(definitions: dict[str, Any]) -> dict[str, Any]:
        definitions["queues"][0]["arguments"]["x-max-length-bytes"] = "many"
        return definitions

    # RabbitMQ 3.10 starts with half of them and says nothing; 4.0 does not start.
    with pytest.raises(StackFailed, match=r"did not load all of its definitions|rabbitmq ended"):
        Stack(ROOT, temporary / "half", definitions=wrong_argument).up(worker=False)


# -- who may do what at the broker ------------------------------------------------------------------------------------


def login(stack: Stack, role: str, authority: Stack | None = None, **options: Any) -> amqp.Connection:
    """Log in to the broker with the certificate of a role, perhaps of another stack."""
    environment, own = (authority or stack).environment(role), stack.environment(role)
    host, vhost = own["SECURE_CELERY_BROKER_URL"].removeprefix("amqps://").split("/")
    connection = amqp.Connection(
        host,
        virtual_host=vhost,
        confirm_publish=True,
        connect_timeout=10,
        read_timeout=10,
        ssl={
            "ca_certs": own["SECURE_CELERY_TLS_CA"],
            "certfile": environment["SECURE_CELERY_TLS_CERTIFICATE"],
            "keyfile": environment["SECURE_CELERY_TLS_KEY"],
            "cert_reqs": ssl.CERT_REQUIRED,
            "server_hostname": "127.0.0.1",
        },
        **{"login_method": "EXTERNAL", **options},
    )
    connection.connect()
    return connection


def publish(exchange: str, key: str) -> Callable[[Any, str], None]:
    def act(channel: Any, application: str) -> None:
        name, routing_key = exchange.format(application), key.format(application)
        channel.basic_publish_confirm(amqp.Message("spot check"), name, routing_key, mandatory=True, confirm_timeout=10)

    return act


def publish_unrouted(exchange: str, key: str) -> Callable[[Any, str], None]:
    def act(channel: Any, application: str) -> None:
        channel.basic_publish_confirm(amqp.Message("spot check"), exchange.format(application), key, confirm_timeout=10)

    return act


def hear(exchange: str, key: str) -> Callable[[Any, str], None]:
    def act(channel: Any, application: str) -> None:
        queue = channel.queue_declare("", exclusive=True, auto_delete=True).queue
        channel.queue_bind(queue, exchange.format(application), key)

    return act


def read(queue: str) -> Callable[[Any, str], None]:
    return lambda channel, application: channel.basic_get(queue.format(application), no_ack=True)


ACTIONS: dict[str, Callable[[Any, str], None]] = {
    "send": publish("{}", "{}.default"),
    "send later": publish("celery_delayed_27", DELAYED + "{}.default"),
    "quarantine": publish("{}.quarantine", "{}.quarantine"),
    "quarantine as a task": publish("{}", "{}.quarantine"),
    "quarantine later": publish("celery_delayed_27", DELAYED + "{}.quarantine"),
    "dead-letter": publish("{}.dead", "{}.dead"),
    "dead-letter as a task": publish("{}", "{}.dead"),
    "other key": publish("{}", "other.default"),
    "skip levels of delay": publish("celery_delayed_26", DELAYED + "{}.default"),
    "deliver delayed": publish("celery_delayed_delivery", "{}.default"),
    "default exchange": publish("", "{}.default"),
    "built-in exchange": publish("amq.topic", "{}.default"),
    "consume": lambda channel, application: channel.basic_consume(f"{application}.default"),
    "read": read("{}.default"),
    "read dead": read("{}.dead"),
    "read quarantine": read("{}.quarantine"),
    "read delayed": read("celery_delayed_27"),
    "purge": lambda channel, application: channel.queue_purge(f"{application}.default"),
    "delete": lambda channel, application: channel.queue_delete(f"{application}.default"),
    "declare queue": lambda channel, application: channel.queue_declare("mine"),
    "declare queue named newline": lambda channel, application: channel.queue_declare("\n"),
    "declare unnamed queue": lambda channel, application: channel.queue_declare(""),
    "declare exchange": lambda channel, application: channel.exchange_declare("mine", "topic"),
    "delete exchange": lambda channel, application: channel.exchange_delete(application),
    "bind": lambda channel, application: channel.queue_bind(
        f"{application}.dead", application, f"{application}.default"
    ),
    "bind exchange": lambda channel, application: channel.exchange_bind(application, "amq.topic", "#"),
    "command": publish_unrouted("{}.celery.control", ""),
    "reply": publish_unrouted("{}.celery.replies", "operator"),
    "reply to nobody": publish_unrouted("{}.celery.replies", "client"),
    "report": publish_unrouted("{}.celery.events", "worker.heartbeat"),
    "report oddly": publish_unrouted("{}.celery.events", "#"),
    "hear commands": hear("{}.celery.control", ""),
    "hear operators' replies": hear("{}.celery.replies", "operator"),
    "hear monitors' replies": hear("{}.celery.replies", "monitor"),
    "hear all replies": hear("{}.celery.replies", "#"),
    "hear events": hear("{}.celery.events", "#"),
    "hear tasks": hear("{}", "#"),
    "hear nothing": lambda channel, application: channel.queue_declare("", exclusive=True),
    "hear by a name": lambda channel, application: channel.queue_declare("amq.gen-mine"),
    "declare an exchange like a queue": lambda channel, application: channel.exchange_declare("amq.gen-mine", "fanout"),
    "dead-letter by a queue": lambda channel, application: channel.queue_declare(
        "", exclusive=True, arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{application}.dead"}
    ),
}
SENDER = {"send", "send later"}
# RabbitMQ takes line ends off a name, and an empty one asks for a name of the broker's making.
LISTENER = {"hear nothing", "declare unnamed queue", "declare queue named newline"}
MAY = {
    "client": SENDER,
    "beat": SENDER,
    # Who may read a queue may also empty it.
    "worker": SENDER | LISTENER | {"quarantine", "consume", "read", "purge", "reply", "report", "hear commands"},
    "operator": SENDER
    | LISTENER
    | {"read dead", "read quarantine", "command", "hear operators' replies", "hear events"},
    "monitor": LISTENER | {"command", "hear monitors' replies", "hear events"},
}


@pytest.mark.parametrize("role", MAY)
def test_an_account_may_do_exactly_this(servers: Stack, application: str, role: str) -> None:
    done = set()
    with login(servers, role) as connection:
        for name, act in ACTIONS.items():
            channel = connection.channel()
            try:
                act(channel, application)
            except amqp.AccessRefused:  # which closes the channel
                continue
            channel.close()
            done.add(name)
    assert done == MAY[role]


def drained(stack: Stack, application: str) -> int:
    """Take what lies in quarantine and dead letters; how many messages it was."""
    with login(stack, "operator") as connection:
        channel, taken = connection.channel(), 0
        for queue in (f"{application}.quarantine", f"{application}.dead"):
            while channel.basic_get(queue, no_ack=True) is not None:
                taken += 1
    return taken


def test_copies_that_a_sender_asks_for_reach_neither_quarantine_nor_dead_letters(
    servers: Stack, application: str
) -> None:
    """RabbitMQ routes by these headers too, and asks no topic permission for it: evidence could be pushed out."""
    drained(servers, application)
    with login(servers, "client") as connection:
        channel = connection.channel()
        for header in ("CC", "BCC"):
            copies = {header: [f"{application}.quarantine", f"{application}.dead"]}
            message = amqp.Message("copied", application_headers=copies)
            channel.basic_publish_confirm(message, application, f"{application}.default", confirm_timeout=10)
    assert drained(servers, application) == 0


def test_a_message_too_large_is_refused(servers: Stack, application: str) -> None:
    with login(servers, "client") as connection:
        channel = connection.channel()
        with pytest.raises(amqp.PreconditionFailed):
            channel.basic_publish_confirm(
                amqp.Message("x" * (4 * 1024 * 1024 + 1)), application, f"{application}.default"
            )


def test_a_password_is_no_way_in(servers: Stack, application: str) -> None:
    for name, password in (("guest", "guest"), (f"{application}.worker", "")):
        with pytest.raises((amqp.AccessRefused, amqp.ConnectionError, ConnectionError, OSError)):
            login(servers, "client", login_method="PLAIN", userid=name, password=password)


def test_the_certificate_is_the_account(servers: Stack) -> None:
    pair = servers.pki.tls.client("stranger")
    own = servers.environment("client")
    servers.environment = lambda role: {  # type: ignore[method-assign]
        **own,
        "SECURE_CELERY_TLS_CERTIFICATE": str(pair.certificate),
        "SECURE_CELERY_TLS_KEY": str(pair.key),
    }
    try:
        with pytest.raises((amqp.AccessRefused, amqp.ConnectionError, ConnectionError, OSError)):
            login(servers, "client")
    finally:
        del servers.environment
