"""Redis as the broker, as the stack runs it: its configuration, and who may do what, account by account."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from stack import Stack

from .relay import Relay, presents
from .servers import REASONS, REFUSED, Servers
from .test_backend_accounts import backend, permitted

pytestmark = pytest.mark.broker("redis")


def broker(stack: Stack, role: str, **options: Any) -> redis.Redis:
    """Connect to the broker as a role."""
    own = stack.environment(role)
    url = urlsplit(own["SECURE_CELERY_BROKER_URL"])
    password = Path(own["SECURE_CELERY_BROKER_PASSWORD_FILE"]).read_text()
    return backend(stack, role, **{"port": url.port, "username": url.username, "password": password, **options})


def test_the_configuration_is_in_force(servers: Stack) -> None:
    expected = {
        "port": "0",
        "bind": "127.0.0.1",
        "tls-auth-clients": "yes",
        "tls-protocols": "TLSv1.2 TLSv1.3",
        "maxmemory": str(1024 * 1024 * 1024),
        "maxmemory-policy": "noeviction",
        "maxclients": "1024",
        "proto-max-bulk-len": str(4 * 1024 * 1024),
        "enable-debug-command": "no",
        "enable-module-command": "no",
        "enable-protected-configs": "no",
        "appendonly": "yes",
        "appendfsync": "always",
    }
    for name, value in expected.items():
        assert servers.redis_broker("CONFIG", "GET", name) == f"{name}\n{value}"
    default = servers.redis_broker("ACL", "GETUSER", "default").splitlines()
    assert "off" in default
    assert "nopass" not in default


def test_there_is_no_account_but_the_topologys(servers: Stack) -> None:
    accounts = {servers.topology.account(role) for role in servers.topology.accounts}
    assert set(servers.redis_broker("ACL", "USERS").splitlines()) == accounts | {"default", "stack-administrator"}


# `{0}` is the application. What is read and what is taken away comes before it is written anew.
COMMANDS: dict[str, tuple[str, ...]] = {
    "send": ("LPUSH", "{0}.default", "spot check"),
    "give back": ("RPUSH", "{0}.default", "spot check"),
    "take": ("RPOP", "{0}.default"),
    "consume": ("BRPOP", "{0}.default", "0.01"),
    "look at a queue": ("LRANGE", "{0}.default", "0", "-1"),
    "change a queue": ("LSET", "{0}.default", "0", "forged"),
    "shorten a queue": ("LTRIM", "{0}.default", "0", "0"),
    "remove from a queue": ("LREM", "{0}.default", "0", "spot check"),
    "delete a queue": ("DEL", "{0}.default"),
    "expire a queue": ("EXPIRE", "{0}.default", "1"),
    "move a message": ("LMOVE", "{0}.default", "{0}.dead", "RIGHT", "LEFT"),
    "send with a priority": ("LPUSH", "{0}.default\x06\x163", "spot check"),
    "quarantine": ("LPUSH", "{0}.quarantine", "spot check"),
    "bound the quarantine": ("LTRIM", "{0}.quarantine", "0", "9"),
    "dead-letter": ("LPUSH", "{0}.dead", "spot check"),
    "count the quarantine": ("LLEN", "{0}.quarantine"),
    "read the quarantine": ("LRANGE", "{0}.quarantine", "0", "-1"),
    "read the dead letters": ("LRANGE", "{0}.dead", "0", "-1"),
    "empty the quarantine": ("LREM", "{0}.quarantine", "0", "spot check"),
    "empty the dead letters": ("LREM", "{0}.dead", "0", "spot check"),
    "take from the quarantine": ("RPOP", "{0}.quarantine"),
    "delete the quarantine": ("DEL", "{0}.quarantine"),
    "hold": ("HSET", "{0}:worker:unacked", "tag", "spot check"),
    "see what is held": ("HGET", "{0}:worker:unacked", "tag"),
    "see all that is held": ("HGETALL", "{0}:worker:unacked"),
    "let go": ("HDEL", "{0}:worker:unacked", "tag"),
    "say when": ("ZADD", "{0}:worker:unacked_index", "1", "tag"),
    "see when": ("ZRANGE", "{0}:worker:unacked_index", "0", "-1"),
    "forget when": ("ZREM", "{0}:worker:unacked_index", "tag"),
    "hold for another pool": ("HSET", "{0}:other:unacked", "tag", "spot check"),
    "delete what is held": ("DEL", "{0}:worker:unacked"),
    "send to another application": ("LPUSH", "other.default", "spot check"),
    "consume another application": ("BRPOP", "other.default", "0.01"),
    "write anything": ("SET", "{0}:mine", "1"),
    "bind": ("SADD", "_kombu.binding.{0}", "x"),
    "broadcast": ("PUBLISH", "/0.celery.pidbox", "x"),
    "listen": ("PSUBSCRIBE", "/0.celery.pidbox"),
    "listen to all": ("PSUBSCRIBE", "*"),
    "command": ("PUBLISH", "/.{0}.celery.control", "x"),
    "reply": ("PUBLISH", "/.{0}.celery.replies/operator", "x"),
    "reply to nobody": ("PUBLISH", "/.{0}.celery.replies/client", "x"),
    "report": ("PUBLISH", "/.{0}.celery.events/worker.heartbeat", "x"),
    "hear commands": ("PSUBSCRIBE", "/.{0}.celery.control"),
    "hear operators' replies": ("PSUBSCRIBE", "/.{0}.celery.replies/operator"),
    "hear monitors' replies": ("PSUBSCRIBE", "/.{0}.celery.replies/monitor"),
    "hear all replies": ("PSUBSCRIBE", "/.{0}.celery.replies/*"),
    "hear events": ("PSUBSCRIBE", "/.{0}.celery.events/*"),
    "hear all": ("PSUBSCRIBE", "/.{0}.celery.*"),
    "list": ("KEYS", "*"),
    "scan": ("SCAN", "0"),
    "run script": ("EVAL", "return 1", "0"),
    "load script": ("SCRIPT", "LOAD", "return 1"),
    "configure": ("CONFIG", "GET", "*"),
    "accounts": ("ACL", "LIST"),
    "flush": ("FLUSHALL",),
    "monitor": ("MONITOR",),
    "debug": ("DEBUG", "SLEEP", "0"),
    "clients": ("CLIENT", "LIST"),
    "replicate": ("REPLICAOF", "127.0.0.1", "1"),
    "save": ("SAVE",),
    "rewrite": ("BGREWRITEAOF",),
    "shut down": ("SHUTDOWN", "NOSAVE"),
    "load module": ("MODULE", "LOAD", "/tmp/x.so"),
    "information": ("INFO",),
    "dump": ("DUMP", "{0}.default"),
    "rename": ("RENAME", "{0}.default", "{0}.dead"),
    "another database": ("SELECT", "1"),
}
WORKER = {
    *("send", "give back", "take", "consume", "quarantine", "bound the quarantine", "dead-letter"),
    *("hold", "see what is held", "let go", "say when", "see when", "forget when"),
    *("reply", "report", "hear commands"),
}
OPERATOR = {name for name in COMMANDS if re.match("(count|read|empty) the", name)}
OPERATOR |= {"send", "command", "hear operators' replies", "hear events"}
MONITOR = {"command", "hear monitors' replies", "hear events"}
MAY = {"client": {"send"}, "beat": {"send"}, "worker": WORKER, "operator": OPERATOR, "monitor": MONITOR}


@pytest.mark.parametrize("role", MAY)
def test_an_account_may_use_exactly_these_commands(servers: Stack, application: str, role: str) -> None:
    assert permitted(lambda: broker(servers, role), COMMANDS, application) == MAY[role]


@pytest.mark.parametrize(
    "login", [{"username": None, "password": None}, {"password": "guess"}, {"username": "default"}]
)
def test_the_broker_wants_the_accounts_own_password(servers: Stack, login: dict[str, Any]) -> None:
    with pytest.raises((redis.AuthenticationError, redis.ResponseError)), broker(servers, "client", **login) as client:
        client.ping()


def test_a_password_is_for_one_role_and_one_server(servers: Stack, application: str) -> None:
    for client in (
        broker(servers, "client", username=f"{application}.worker"),
        broker(servers, "client", port=backend(servers, "client").connection_pool.connection_kwargs["port"]),
    ):
        with pytest.raises(redis.AuthenticationError), client:
            client.ping()


@pytest.mark.parametrize("wrong", [None, *REASONS])
def test_the_certificate_of_the_broker_is_verified(servers: Stack, wrong: str | None) -> None:
    known = Servers(servers)
    port = urlsplit(known.settings["broker_url"]).port or 0
    with Relay(port, known.client, presents(known.certificates[wrong or "right"])) as relay:
        app = known.hardened(broker_url=f"rediss://{known.account}@127.0.0.1:{relay.port}/0")
        connection = app.connection_for_write()
        if wrong is None:
            assert connection.default_channel.client.ping()
            return
        with pytest.raises(REFUSED, match=REASONS[wrong]):
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
        assert b"AUTH" not in relay.received
        assert known.password.encode() not in relay.received
