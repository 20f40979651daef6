"""Renders the broker's and the backend's access rules from ``topology.toml``.

Guards against: rights at the broker that nobody reviewed. The files are committed: a wider right is a line in a diff.
Rests on: RabbitMQ's permissions *and* topic permissions (write on an exchange alone would reach every queue bound to
it), operator-declared queues (no account may declare), and Redis 7 ACLs with read-only keys and selectors. Redis knows
no sender: whoever may push to a queue may push anything, which the gate judges.
Controls: BRK-1, BRK-2, BRK-3, BRK-6, AUT-2.

``python -m <package>.hardening.render`` writes the files, ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kombu.transport.native_delayed_delivery import (
    CELERY_DELAYED_DELIVERY_EXCHANGE,
    MAX_LEVEL,
    MAX_NUMBER_OF_BITS_TO_USE,
    level_name,
)

from .errors import ConfigurationRefused
from .identity import Role
from .topology import Caller, Pool, Topology

DEFINITIONS = Path("deploy/rabbitmq/definitions.json")
ACL = Path("deploy/redis/users.acl")
BROKER_ACL = Path("deploy/redis/broker.acl")

#: Bounds for what is kept for people to look at, and for what waits for its ETA; a flood must not fill the disk.
QUARANTINE_BYTES = 64 * 1024 * 1024
DEAD_BYTES = 256 * 1024 * 1024
DELAYED_BYTES = 256 * 1024 * 1024
#: One account's connections and channels at a time, so that a stolen key cannot use up the broker.
ACCOUNT_LIMITS = {"max-connections": 512, "max-channels": 4096}

_NOTHING = "^$"

Definition = dict[str, Any]


def definitions(topology: Topology) -> Definition:
    """RabbitMQ definitions, in the form of ``rabbitmqctl export_definitions``."""
    vhost = topology.vhost
    return {
        "vhosts": [{"name": vhost}],
        "users": [_user(topology.account(name)) for name in topology.accounts],
        "permissions": [_permission(topology, role) for role in topology.accounts.values()],
        "topic_permissions": [
            rule for role in topology.accounts.values() for rule in _topic_permissions(topology, role)
        ],
        "policies": [
            {
                "vhost": vhost,
                "name": "delayed-length",
                "pattern": "^celery_delayed_",
                "apply-to": "queues",
                "definition": {"max-length-bytes": DELAYED_BYTES},
                "priority": 0,
            }
        ],
        "exchanges": [_exchange(vhost, name) for name in _exchange_names(topology)],
        "queues": [*_queues(topology), *(_delay_queue(vhost, level) for level in range(MAX_LEVEL, -1, -1))],
        "bindings": list(_bindings(topology)),
    }


def _user(account: str) -> Definition:
    # An empty hash matches no password: the account logs in with its certificate or not at all.
    return {
        "name": account,
        "password_hash": "",
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": "",
        "limits": ACCOUNT_LIMITS,
    }


def _permission(topology: Topology, role: Pool | Caller) -> Definition:
    writes = [topology.exchange, level_name(MAX_LEVEL)] if role.publishes_to else []
    if isinstance(role, Pool):
        writes.append(topology.quarantine)
    return {
        "user": topology.account(role.name),
        "vhost": topology.vhost,
        "configure": _NOTHING,
        "write": _one_of(writes),
        "read": _one_of(_reads(topology, role)),
    }


def _reads(topology: Topology, role: Pool | Caller) -> list[str]:
    if isinstance(role, Pool):
        return [topology.queue(name).broker_name for name in role.queues]
    return [topology.dead, topology.quarantine] if role.name == "operator" else []


def _topic_permissions(topology: Topology, role: Pool | Caller) -> Iterator[Definition]:
    # Without a topic permission RabbitMQ allows every routing key: there is one for each exchange of `_permission`.
    rule = {"user": topology.account(role.name), "vhost": topology.vhost, "read": _NOTHING}
    keys = [topology.queue(name).broker_name for name in role.publishes_to]
    if keys:
        prefix = r"([01]\.)" + "{" + str(MAX_NUMBER_OF_BITS_TO_USE) + "}"
        yield rule | {"exchange": topology.exchange, "write": _one_of(keys)}
        yield rule | {"exchange": level_name(MAX_LEVEL), "write": _one_of(keys, prefix)}
    if isinstance(role, Pool):
        yield rule | {"exchange": topology.quarantine, "write": _one_of([topology.quarantine])}


def _one_of(names: list[str], prefix: str = "") -> str:
    # Names are letters, digits, hyphens, underscores and dots: only the dot needs an escape.
    if not names:
        return _NOTHING
    escaped = [name.replace(".", r"\.") for name in names]
    return f"^{prefix}{escaped[0]}$" if len(escaped) == 1 else f"^{prefix}({'|'.join(escaped)})$"


def _exchange_names(topology: Topology) -> list[str]:
    levels = [level_name(level) for level in range(MAX_LEVEL, -1, -1)]
    # Dead letters and quarantine have exchanges of their own, named like their queues: topic permissions do not look at
    # the CC and BCC headers of a message, which route it within its exchange.
    return [topology.exchange, topology.dead, topology.quarantine, *levels, CELERY_DELAYED_DELIVERY_EXCHANGE]


def _exchange(vhost: str, name: str) -> Definition:
    return {
        "name": name,
        "vhost": vhost,
        "type": "topic",
        "durable": True,
        "auto_delete": False,
        "internal": False,
        "arguments": {},
    }


def _queue(vhost: str, name: str, **arguments: str | int) -> Definition:
    arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
    return {
        "name": name,
        "vhost": vhost,
        "durable": True,
        "auto_delete": False,
        "arguments": {"x-queue-type": "quorum", **arguments},
    }


def _queues(topology: Topology) -> Iterator[Definition]:
    for queue in topology.queues:
        yield _queue(
            topology.vhost,
            queue.broker_name,
            x_delivery_limit=queue.delivery_limit,
            x_max_length_bytes=queue.max_length_bytes,
            x_overflow="reject-publish",
            x_dead_letter_exchange=topology.dead,
            x_dead_letter_routing_key=topology.dead,
            x_dead_letter_strategy="at-least-once",
        )
    # When full, dead letters stay where they came from. Of refused messages, which a stranger can cause, the oldest go.
    yield _queue(topology.vhost, topology.dead, x_max_length_bytes=DEAD_BYTES, x_overflow="reject-publish")
    yield _queue(topology.vhost, topology.quarantine, x_max_length_bytes=QUARANTINE_BYTES, x_overflow="drop-head")


def _delay_queue(vhost: str, level: int) -> Definition:
    return _queue(
        vhost,
        level_name(level),
        x_overflow="reject-publish",
        x_message_ttl=2**level * 1000,  # milliseconds
        x_dead_letter_exchange=level_name(level - 1) if level else CELERY_DELAYED_DELIVERY_EXCHANGE,
        x_dead_letter_strategy="at-least-once",
    )


def _bindings(topology: Topology) -> Iterator[Definition]:
    """Each delay level waits where its bit is 1 and passes on where it is 0; the last hands over to the application."""
    vhost = topology.vhost
    for level in range(MAX_LEVEL, -1, -1):
        skip = "*." * (MAX_LEVEL - level)
        following = level_name(level - 1) if level else CELERY_DELAYED_DELIVERY_EXCHANGE
        yield _binding(vhost, level_name(level), "queue", level_name(level), f"{skip}1.#")
        yield _binding(vhost, level_name(level), "exchange", following, f"{skip}0.#")
    for queue in topology.queues:
        key = f"#.{queue.broker_name}"
        yield _binding(vhost, CELERY_DELAYED_DELIVERY_EXCHANGE, "exchange", topology.exchange, key)
        yield _binding(vhost, topology.exchange, "queue", queue.broker_name, key)
    for name in (topology.dead, topology.quarantine):
        yield _binding(vhost, name, "queue", name, name)


def _binding(vhost: str, source: str, destination_type: str, destination: str, routing_key: str) -> Definition:
    return {
        "source": source,
        "vhost": vhost,
        "destination": destination,
        "destination_type": destination_type,
        "routing_key": routing_key,
        "arguments": {},
    }


def definitions_text(topology: Topology) -> str:
    """The definitions as JSON with one object on each line, so that a changed right is a changed line."""
    sections = [
        f"  {json.dumps(section)}: [\n" + ",\n".join(f"    {json.dumps(item)}" for item in items) + "\n  ]"
        for section, items in definitions(topology).items()
    ]
    return "{\n" + ",\n".join(sections) + "\n}\n"


#: To log in and to see whether the connection lives. redis-py also tells its version (CLIENT SETINFO), and goes on
#: without; Redis 7.0 does not know that command and would refuse the whole file.
_CONNECT = "+hello +ping"
#: `GroupResult.restore` and `.get()`: a look at the key, and being told on the channel of the same name.
_READ = "+get +mget +subscribe +unsubscribe"
_WORK = (
    "+set +setex +del +expire +incr +incrby +publish +multi +exec +discard +watch +unwatch"
    # A chord's counters are kept by Celery's Lua scripts, and its results in a sorted set or a list.
    " +eval +evalsha +script|load +exists +zadd +zcount +zrange +rpush +llen +lrange +sadd +sismember"
)


def acl_text(topology: Topology) -> str:
    """The Redis ACL file. ``resetpass``: nobody can log in until a deployment puts in the hash of a password."""
    return "user default off resetpass resetkeys resetchannels -@all\n" + "".join(
        f"user {topology.account(role.name)} on resetpass resetkeys resetchannels -@all {_acl(topology, role)}\n"
        for role in topology.accounts.values()
    )


def broker_acl_text(topology: Topology) -> str:
    """The ACL file of a Redis that is the broker: a server of its own, so that no right reaches the results too.

    When it starts again, Redis checks each transaction of its append-only file against `default`, and leaves out what
    that may not do: acknowledged messages would run again, and dead letters be gone. So `default`, as which nobody can
    log in, may write to the application's keys.
    """
    own = topology.application
    loads = f"~{own}.* ~{own}:* resetchannels -@all +@write +multi +exec"
    return f"user default off resetpass resetkeys {loads}\n" + "".join(
        f"user {topology.account(role.name)} on resetpass resetkeys resetchannels -@all {rules}\n"
        for role in topology.accounts.values()
        for rules in (" ".join(_broker_rules(topology, role)),)
    )


def _broker_rules(topology: Topology, role: Pool | Caller) -> Iterator[str]:
    """A selector for each kind of key: what may be done to one may not be done to another."""
    yield _CONNECT
    refused = (topology.quarantine, topology.dead)
    if isinstance(role, Pool):
        yield "+multi +exec +discard +unwatch"
        # A message whose worker is gone is pushed back to where it came from.
        yield _selector("+brpop +rpop +lpush +rpush", "~", (topology.broker_name(name) for name in role.queues))
        yield _selector("+hset +hget +hdel +zadd +zrem +zrange +watch", "~", topology.held(role.name))
        yield _selector("+lpush +ltrim", "%W~", refused)
    if role.publishes_to:
        yield _selector("+lpush", "%W~", (topology.broker_name(name) for name in role.publishes_to))
    if role.name == "operator":
        yield _selector("+llen +lrange +rpop", "~", refused)


def _selector(commands: str, access: str, keys: Iterable[str]) -> str:
    return f"({' '.join((commands, *(access + key for key in keys)))})"


def _acl(topology: Topology, role: Pool | Caller) -> str:
    if not role.sends and not isinstance(role, Pool):
        return _CONNECT
    owner = "*" if isinstance(role, Pool) else f"{_namespace(role)}:*"
    task, group = (f"{topology.application}:celery-{kind}-meta-{owner}" for kind in ("task", "taskset"))
    if isinstance(role, Pool):
        return f"{_CONNECT} {_READ} {_WORK} ~{task} ~{group} &{task}"
    # Who sends reads its own results and may drop them. It saves groups and sets and clears a chord's counters.
    return f"{_CONNECT} {_READ} %R~{task} %R~{group} &{task} (+set +del %W~{group}) (+del %W~{task})"


def _namespace(caller: Caller) -> str:
    """Where this caller's ids lie, as ``ownership.namespace`` says."""
    return caller.name if caller.name in set(Role) else f"{Role.CLIENT}.{caller.name}"


def rendered(topology: Topology) -> dict[Path, str]:
    """Every rendered file's text, by its path in the project."""
    broker = (
        {BROKER_ACL: broker_acl_text(topology)}
        if topology.broker == "redis"
        else {DEFINITIONS: definitions_text(topology)}
    )
    return {**broker, ACL: acl_text(topology)}


def stale(project: Path) -> list[Path]:
    """The rendered files that do not say what ``topology.toml`` says."""
    files = rendered(Topology.load(project / "topology.toml"))
    return [
        path
        for path, text in files.items()
        if not (project / path).is_file() or (project / path).read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 when all is well, 1 when a file is stale, 2 when the topology is refused."""
    parser = argparse.ArgumentParser(description="Render access rules from topology.toml.")
    parser.add_argument("--check", action="store_true", help="only compare; exit with 1 if a file is stale")
    parser.add_argument("--project", type=Path, default=Path(), help="the folder that holds topology.toml")
    options = parser.parse_args(arguments)
    project: Path = options.project
    try:
        outdated = stale(project)
        if not options.check:
            for path, text in rendered(Topology.load(project / "topology.toml")).items():
                (project / path).parent.mkdir(parents=True, exist_ok=True)
                (project / path).write_text(text, encoding="utf-8")
    except ConfigurationRefused as refused:
        print(refused, file=sys.stderr)
        return 2
    for path in outdated:
        print(f"{path} is not what topology.toml says; run make topology" if options.check else f"wrote {path}")
    return 1 if options.check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
