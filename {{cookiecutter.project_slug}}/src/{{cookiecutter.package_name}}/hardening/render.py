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
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from kombu.transport import native_delayed_delivery as delayed

from .errors import ConfigurationRefused
from .identity import Role
from .topology import CONTROLLERS, FANOUT_PREFIX, Caller, Pool, Topology

DEFINITIONS = Path("deploy/rabbitmq/definitions.json")
ACL = Path("deploy/redis/users.acl")
BROKER_ACL = Path("deploy/redis/broker.acl")
#: For each caller that is another service: what it has to know.
CONTRACTS = Path("deploy/callers")

#: Bounds for what is kept for people to look at, and for what waits for its ETA; a flood must not fill the disk.
QUARANTINE_BYTES = 64 * 1024 * 1024
DEAD_BYTES = 256 * 1024 * 1024
DELAYED_BYTES = 256 * 1024 * 1024
#: One account's connections and channels at a time, so that a stolen key cannot use up the broker.
ACCOUNT_LIMITS = {"max-connections": 512, "max-channels": 4096}

#: How often an operator may look at what is kept; more than anybody will.
_LOOKS = 1_000_000
_NOTHING = "^$"
#: Names that RabbitMQ gives to queues and to nothing else. One that an account could choose could be an exchange's too,
#: and a queue behind that exchange could dead-letter with any routing key.
_OWN_QUEUE = r"amq\.gen-.+"
#: An empty hash matches no password: the account logs in with its certificate or not at all.
_NO_PASSWORD = {"password_hash": "", "hashing_algorithm": "rabbit_password_hashing_sha256"}
_KEPT = {"durable": True, "auto_delete": False}
#: kombu's exchanges for delayed messages, longest delay first; each hands over to the next one.
_LEVELS = [delayed.level_name(level) for level in range(delayed.MAX_LEVEL, -1, -1)]
_DELAYED = [*_LEVELS, delayed.CELERY_DELAYED_DELIVERY_EXCHANGE]

Definition = dict[str, Any]


def definitions(topology: Topology) -> Definition:
    """RabbitMQ definitions, in the form of ``rabbitmqctl export_definitions``."""
    vhost, roles = topology.vhost, topology.accounts.values()
    account = {**_NO_PASSWORD, "tags": "", "limits": ACCOUNT_LIMITS}
    policy = {"vhost": vhost, "name": "delayed-length", "pattern": "^celery_delayed_", "apply-to": "queues"}
    return {
        "vhosts": [{"name": vhost}],
        "users": [{"name": topology.account(role.name), **account} for role in roles],
        "permissions": [_permission(topology, role) for role in roles],
        "topic_permissions": [rule for role in roles for rule in _topic_permissions(topology, role)],
        "policies": [policy | {"definition": {"max-length-bytes": DELAYED_BYTES}, "priority": 0}],
        "exchanges": _exchanges(topology),
        "queues": list(_queues(topology)),
        "bindings": list(_bindings(topology)),
    }


def _permission(topology: Topology, role: Pool | Caller) -> Definition:
    writes = [topology.exchange, delayed.level_name(delayed.MAX_LEVEL)] if role.publishes_to else []
    reads = []
    if isinstance(role, Pool):
        writes += [topology.quarantine, topology.celery("replies"), topology.celery("events")]
        reads = [*(topology.queue(name).broker_name for name in role.queues), topology.celery("control")]
    elif role.name in CONTROLLERS:
        writes += [topology.celery("control")]
        reads = [topology.celery("replies"), topology.celery("events")]
        reads += [topology.dead, topology.quarantine] if role.name == "operator" else []
    own = [_OWN_QUEUE] if reads else []
    rule = {"user": topology.account(role.name), "vhost": topology.vhost, "configure": _one_of(own)}
    return rule | {"write": _one_of(writes + own), "read": _one_of(reads + own)}


def _topic_permissions(topology: Topology, role: Pool | Caller) -> Iterator[Definition]:
    # Without a topic permission RabbitMQ allows every routing key: there is one for each exchange of `_permission`.
    rule = {"user": topology.account(role.name), "vhost": topology.vhost, "read": _NOTHING}
    keys = [topology.queue(name).broker_name for name in role.publishes_to]
    if keys:
        prefix = r"([01]\.)" + "{" + str(delayed.MAX_NUMBER_OF_BITS_TO_USE) + "}"
        yield rule | {"exchange": topology.exchange, "write": _one_of(keys)}
        yield rule | {"exchange": delayed.level_name(delayed.MAX_LEVEL), "write": _one_of(keys, prefix)}
    if isinstance(role, Pool):
        yield rule | {"exchange": topology.quarantine, "write": _one_of([topology.quarantine])}
        yield rule | {"exchange": topology.celery("replies"), "write": _one_of(_controllers(topology))}
        yield rule | {"exchange": topology.celery("events"), "write": r"^[a-z]+\.[a-z.]+$"}
    elif role.name in CONTROLLERS:
        yield rule | {"exchange": topology.celery("replies"), "write": _NOTHING, "read": _one_of([role.name])}
        yield rule | {"exchange": topology.celery("events"), "write": _NOTHING, "read": "^#$"}


def _controllers(topology: Topology) -> list[str]:
    return [name for name in topology.callers if name in CONTROLLERS]


def _one_of(names: list[str], prefix: str = "") -> str:
    # Names are letters, digits, hyphens, underscores and dots: only the dot needs an escape.
    if not names:
        return _NOTHING
    escaped = [name if name == _OWN_QUEUE else name.replace(".", r"\.") for name in names]
    return f"^{prefix}{escaped[0]}$" if len(escaped) == 1 else f"^{prefix}({'|'.join(escaped)})$"


def _exchanges(topology: Topology) -> list[Definition]:
    # Dead letters and quarantine have exchanges of their own, named like their queues: topic permissions do not look at
    # the CC and BCC headers of a message, which route it within its exchange.
    own = [topology.exchange, topology.dead, topology.quarantine, topology.celery("replies"), topology.celery("events")]
    kinds = {**dict.fromkeys([*own, *_DELAYED], "topic"), topology.celery("control"): "fanout"}
    rest = {**_KEPT, "internal": False, "arguments": {}}
    return [{"name": name, "vhost": topology.vhost, "type": kind, **rest} for name, kind in kinds.items()]


def _queue(vhost: str, name: str, **arguments: str | int) -> Definition:
    arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
    return {"name": name, "vhost": vhost, **_KEPT, "arguments": {"x-queue-type": "quorum", **arguments}}


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
    # RabbitMQ 4 would drop what an operator has looked at twenty times.
    dead = (topology.dead, DEAD_BYTES, "reject-publish")
    for name, kept, overflow in (dead, (topology.quarantine, QUARANTINE_BYTES, "drop-head")):
        yield _queue(topology.vhost, name, x_max_length_bytes=kept, x_overflow=overflow, x_delivery_limit=_LOOKS)
    for skipped, (level, following) in enumerate(pairwise(_DELAYED)):
        yield _queue(
            topology.vhost,
            level,
            x_overflow="reject-publish",
            x_message_ttl=2 ** (delayed.MAX_LEVEL - skipped) * 1000,  # milliseconds
            x_dead_letter_exchange=following,
            x_dead_letter_strategy="at-least-once",
        )


def _bindings(topology: Topology) -> Iterator[Definition]:
    """Each delay level waits where its bit is 1 and passes on where it is 0; the last hands over to the application."""
    vhost = topology.vhost
    for skipped, (level, following) in enumerate(pairwise(_DELAYED)):
        yield _binding(vhost, level, "queue", level, f"{'*.' * skipped}1.#")
        yield _binding(vhost, level, "exchange", following, f"{'*.' * skipped}0.#")
    for queue in topology.queues:
        key = f"#.{queue.broker_name}"
        yield _binding(vhost, delayed.CELERY_DELAYED_DELIVERY_EXCHANGE, "exchange", topology.exchange, key)
        yield _binding(vhost, topology.exchange, "queue", queue.broker_name, key)
    for name in (topology.dead, topology.quarantine):
        yield _binding(vhost, name, "queue", name, name)


def _binding(vhost: str, source: str, destination_type: str, destination: str, routing_key: str) -> Definition:
    bound = {"source": source, "vhost": vhost, "destination": destination, "destination_type": destination_type}
    return {**bound, "routing_key": routing_key, "arguments": {}}


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
_NONE = "resetpass resetkeys resetchannels -@all"
#: The replay guard's, for its own keys; its scripts use `get`, `set`, `exists` and `del`.
_CLAIM = "+set +get +del +exists +eval"
#: `GroupResult.restore` and `.get()`: a look at the key, and being told on the channel of the same name.
_READ = "+get +mget +subscribe +unsubscribe"
_WORK = (
    "+set +setex +del +expire +incr +incrby +publish +multi +exec +discard +watch +unwatch"
    # A chord's counters are kept by Celery's Lua scripts, and its results in a sorted set or a list.
    " +eval +evalsha +script|load +exists +zadd +zcount +zrange +rpush +llen +lrange +sadd +sismember"
)


def acl_text(topology: Topology) -> str:
    """The Redis ACL file. ``resetpass``: nobody can log in until a deployment puts in the hash of a password."""
    return f"user default off {_NONE}\n" + _users(topology, _acl)


def broker_acl_text(topology: Topology) -> str:
    """The ACL file of a Redis that is the broker: a server of its own, so that no right reaches the results too.

    When it starts again, Redis checks each transaction of its append-only file against `default`, and leaves out what
    that may not do: acknowledged messages would run again, and dead letters be gone. So `default`, as which nobody can
    log in, may write to all keys: some may be of another service that shares the server.
    """
    loads = "~* resetchannels -@all +@write +multi +exec"
    return f"user default off resetpass resetkeys {loads}\n" + _users(topology, _broker_rules)


def _users(topology: Topology, rules: Callable[[Topology, Pool | Caller], Iterable[str]]) -> str:
    return "".join(
        " ".join((f"user {topology.account(role.name)} on", _NONE, *rules(topology, role))) + "\n"
        for role in topology.accounts.values()
    )


def _broker_rules(topology: Topology, role: Pool | Caller) -> Iterator[str]:
    """A selector for each kind of key: what may be done to one may not be done to another."""
    yield _CONNECT
    refused, channel = (topology.quarantine, topology.dead), f"&{FANOUT_PREFIX}"
    if isinstance(role, Pool):
        yield "+multi +exec +discard +unwatch"
        # A message whose worker is gone is pushed back to where it came from.
        yield _selector("+brpop +rpop +lpush +rpush", "~", (topology.broker_name(name) for name in role.queues))
        yield _selector("+hset +hget +hdel +zadd +zrem +zrange +watch", "~", topology.held(role.name))
        yield _selector("+lpush +ltrim", "%W~", refused)
        yield _selector("+psubscribe +punsubscribe", channel, [topology.celery("control")])
        replies = [f"{topology.celery('replies')}/{name}" for name in _controllers(topology)]
        yield _selector("+publish", channel, [*replies, f"{topology.celery('events')}/*"])
    elif role.name in CONTROLLERS:
        yield _selector("+publish", channel, [topology.celery("control")])
        heard = [f"{topology.celery('replies')}/{role.name}", f"{topology.celery('events')}/*"]
        yield _selector("+psubscribe +punsubscribe", channel, heard)
    if role.publishes_to:
        yield _selector("+lpush", "%W~", (topology.broker_name(name) for name in role.publishes_to))
    if role.name == "operator":
        yield _selector("+llen +lrange +lrem", "~", refused)


def _selector(commands: str, access: str, keys: Iterable[str]) -> str:
    return f"({' '.join((commands, *(access + key for key in keys)))})"


def _acl(topology: Topology, role: Pool | Caller) -> list[str]:
    if not role.sends and not isinstance(role, Pool):
        return [_CONNECT]
    owner = "*" if isinstance(role, Pool) else f"{_namespace(role)}:*"
    task, group = (f"{topology.application}:celery-{kind}-meta-{owner}" for kind in ("task", "taskset"))
    if isinstance(role, Pool):
        replays = _selector(_CLAIM, "~", [f"{topology.replays}*"])
        return [_CONNECT, _READ, _WORK, f"~{task} ~{group} &{task}", replays]
    # Who sends reads its own results and may drop them. It saves groups and sets and clears a chord's counters.
    return [_CONNECT, _READ, f"%R~{task} %R~{group} &{task} (+set +del %W~{group}) (+del %W~{task})"]


def _namespace(caller: Caller) -> str:
    """Where this caller's ids lie, as ``Identity.namespace`` says."""
    if caller.identity:
        return caller.identity.namespace("")
    return caller.name if caller.name in set(Role) else f"{Role.CLIENT}.{caller.name}"


def contract_text(topology: Topology, caller: Caller) -> str:
    """What another service has to know of this one to call it: a topology file that says this and no more."""
    queues = "".join(f"\n[queues.{name}]\n" for name in caller.queues)
    return f"""# For {caller.name}: what it may send to {topology.application}. Rendered; not for editing.
application = "{topology.application}"
trust_domain = "{topology.trust_domain}"
broker = "{topology.broker}"
{queues}
[callers.{caller.name}]
identity = "{caller.identity}"
queues = {json.dumps(caller.queues)}
sends = {json.dumps(caller.sends)}
"""


def rendered(topology: Topology) -> dict[Path, str]:
    """Every rendered file's text, by its path in the project."""
    broker, text = (BROKER_ACL, broker_acl_text) if topology.broker == "redis" else (DEFINITIONS, definitions_text)
    services = [caller for caller in topology.callers.values() if caller.identity]
    contracts = {CONTRACTS / f"{caller.name}.toml": contract_text(topology, caller) for caller in services}
    return {broker: text(topology), ACL: acl_text(topology), **contracts}


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
    project = options.project
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
