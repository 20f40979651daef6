"""Redis as the result backend: who may do what, account by account."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from stack import Stack


def backend(stack: Stack, role: str, **options: Any) -> redis.Redis:
    environment = stack.environment(role)
    account, _, rest = environment["SECURE_CELERY_RESULT_BACKEND"].removeprefix("rediss://").partition("@")
    arguments: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": int(rest.partition(":")[2].partition("/")[0]),
        "username": account,
        "password": Path(environment["SECURE_CELERY_RESULT_BACKEND_PASSWORD_FILE"]).read_text(),
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": 10,
        "protocol": 2,  # in which the answer to SUBSCRIBE is an answer
        "ssl": True,
        "ssl_ca_certs": environment["SECURE_CELERY_TLS_CA"],
        "ssl_certfile": environment["SECURE_CELERY_TLS_CERTIFICATE"],
        "ssl_keyfile": environment["SECURE_CELERY_TLS_KEY"],
    }
    return redis.Redis(**{**arguments, **options})


# `{0}` is the application, `{1}` the role: a task id starts with its owner.
COMMANDS = {
    "read own result": ("GET", "{0}:celery-task-meta-{1}:1"),
    "read own results": ("MGET", "{0}:celery-task-meta-{1}:1", "{0}:celery-taskset-meta-{1}:1"),
    "hear of own result": ("SUBSCRIBE", "{0}:celery-task-meta-{1}:1"),
    "delete own result": ("DEL", "{0}:celery-task-meta-{1}:1"),
    "save own group": ("SET", "{0}:celery-taskset-meta-{1}:1", "group"),
    "start own chord": ("SET", "{0}:celery-taskset-meta-{1}:1.s", "2"),
    "fill own chord": ("ZADD", "{0}:celery-taskset-meta-{1}:1.j", "1", "forged"),
    "write own result": ("SETEX", "{0}:celery-task-meta-{1}:1", "60", "forged"),
    "announce own result": ("PUBLISH", "{0}:celery-task-meta-{1}:1", "forged"),
    "read another's result": ("GET", "{0}:celery-task-meta-other:1"),
    "hear of another's result": ("SUBSCRIBE", "{0}:celery-task-meta-other:1"),
    "delete another's result": ("DEL", "{0}:celery-task-meta-other:1"),
    "write another's result": ("SETEX", "{0}:celery-task-meta-other:1", "60", "forged"),
    "save another's group": ("SET", "{0}:celery-taskset-meta-other:1", "group"),
    "start another's chord": ("SET", "{0}:celery-taskset-meta-other:1.s", "2"),
    "hear of everything": ("PSUBSCRIBE", "{0}:celery-task-meta-*"),
    "read another application": ("GET", "other:celery-task-meta-{1}:1"),
    "hear of another application": ("SUBSCRIBE", "other:celery-task-meta-{1}:1"),
    "write another application": ("SET", "other:celery-task-meta-{1}:1", "forged"),
    "read replay": ("GET", "{0}:replay:1"),
    "claim replay": ("EVAL", "return redis.call('SET', KEYS[1], 'x', 'EX', 9)", "1", "{0}:replay:1"),
    "forget replay": ("DEL", "{0}:replay:1"),
    "claim another application's": ("SET", "other:replay:1", "x"),
    "write anything": ("SET", "{0}:mine", "1"),
    "list": ("KEYS", "*"),
    "scan": ("SCAN", "0"),
    "run script": ("EVAL", "return 1", "0"),
    "script another application": ("EVAL", "return redis.call('GET', 'other:x')", "0"),
    "configure": ("CONFIG", "GET", "*"),
    "accounts": ("ACL", "LIST"),
    "flush": ("FLUSHALL",),
    "monitor": ("MONITOR",),
    "debug": ("DEBUG", "SLEEP", "0"),
    "clients": ("CLIENT", "LIST"),
    "replicate": ("REPLICAOF", "127.0.0.1", "1"),
    "save": ("SAVE",),
    "shut down": ("SHUTDOWN", "NOSAVE"),
    "load module": ("MODULE", "LOAD", "/tmp/x.so"),
    "information": ("INFO",),
    "rename": ("RENAME", "{0}:celery-task-meta-{1}:1", "{0}:celery-task-meta-{1}:2"),
    "another database": ("SELECT", "1"),
}
CALLER = {
    "read own result",
    "read own results",
    "hear of own result",
    "delete own result",
    "save own group",
    "start own chord",
}
COMMANDS_MAY = {
    "client": CALLER,
    "beat": CALLER,
    "operator": CALLER,
    "worker": {name for name in COMMANDS if re.search("result|group|chord|script$|replay$", name)},
    "monitor": set(),
}


def permitted(connect: Callable[[], redis.Redis], commands: dict[str, tuple[str, ...]], *words: str) -> set[str]:
    """Try each command on a connection of its own; the names of those that the server does not refuse for rights."""
    done = set()
    for name, command in commands.items():
        with connect() as client:
            assert client.ping()
            try:
                client.execute_command(*(part.format(*words) for part in command))
            except redis.ResponseError as error:
                if not re.search("NOPERM|permission|not allowed|can't access", str(error)):
                    raise
                continue
            done.add(name)
    return done


@pytest.mark.parametrize("role", COMMANDS_MAY)
def test_an_account_may_use_exactly_these_commands(servers: Stack, application: str, role: str) -> None:
    assert permitted(lambda: backend(servers, role), COMMANDS, application, role) == COMMANDS_MAY[role]


@pytest.mark.parametrize(
    "login", [{"username": None, "password": None}, {"password": "guess"}, {"username": "default"}]
)
def test_the_backend_wants_the_accounts_own_password(servers: Stack, login: dict[str, Any]) -> None:
    with pytest.raises((redis.AuthenticationError, redis.ResponseError)), backend(servers, "client", **login) as client:
        client.ping()


def test_one_role_cannot_use_the_passwords_of_another(servers: Stack, application: str) -> None:
    with (
        pytest.raises(redis.AuthenticationError),
        backend(servers, "client", username=f"{application}.worker") as client,
    ):
        client.ping()
