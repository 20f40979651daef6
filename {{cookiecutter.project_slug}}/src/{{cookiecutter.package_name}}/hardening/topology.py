"""Reads ``topology.toml``: queues, worker pools, callers, and what each may send.

Guards against: rights that are written down twice and drift apart, and a slip of the pen that widens a right unnoticed.
Rests on: one file from which broker permissions, backend accounts and the message policy all come; anything the file
says that is not understood is refused, never skipped.
Controls: BRK-6, AUT-1, AUT-3.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import ConfigurationRefused

#: Roles of the SPIFFE ID that belong to one kind of stanza; under the other it would name somebody else.
_CALLER_ROLES = frozenset({"client", "beat", "monitor", "operator"})
_POOL_ROLES = frozenset({"worker"})
#: What may carry the messages. Another one would have no intake and no rendered rights.
_BROKERS = ("rabbitmq", "redis")
#: Names that the application gives to its own two queues of refused and of failed messages.
RESERVED_QUEUES = frozenset({"dead", "quarantine"})

# No dot, which separates words in a routing key. An account's name is a certificate's common name: 64 octets (X.520).
_APPLICATION = re.compile(r"[a-z](?:[a-z0-9-]{0,38}[a-z0-9])?")
_NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,21}[a-z0-9])?")
# A first character that is no wildcard: `*` alone would also name Celery's built-in tasks.
_TASK_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_.*-]*")


@dataclass(frozen=True)
class Queue:
    """A queue of the application. ``max_length_bytes`` bounds what a flood may store in it."""

    name: str
    broker_name: str
    delivery_limit: int = 5
    max_length_bytes: int = 1024 * 1024 * 1024


@dataclass(frozen=True)
class Caller:
    """Someone who sends: ``sends`` are patterns of task names (``fnmatch``), ``queues`` where to."""

    name: str
    sends: tuple[str, ...]
    queues: tuple[str, ...]

    @property
    def publishes_to(self) -> tuple[str, ...]:
        """The short names of the queues it may publish to."""
        return self.queues if self.sends else ()


@dataclass(frozen=True)
class Pool:
    """Workers that share an account: they consume ``queues`` and send ``sends`` to ``sends_to``."""

    name: str
    sends: tuple[str, ...]
    queues: tuple[str, ...]
    sends_to: tuple[str, ...]

    @property
    def publishes_to(self) -> tuple[str, ...]:
        """The short names of the queues it may publish to."""
        return self.sends_to if self.sends else ()


@dataclass(frozen=True)
class Topology:
    """Everything that ``topology.toml`` says."""

    application: str
    queues: tuple[Queue, ...]
    pools: Mapping[str, Pool]
    callers: Mapping[str, Caller]
    broker: str = "rabbitmq"

    @classmethod
    def load(cls, path: Path) -> Topology:
        """Read and check a topology file.

        Raises:
            ConfigurationRefused: the file cannot be read, or says something that is unknown or inconsistent.
        """
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationRefused(
                str(path), f"cannot be read ({error.strerror})", "name a readable topology.toml", "config.topology"
            ) from error
        except ValueError as error:  # TOML and UTF-8 errors; the message has line and column
            raise ConfigurationRefused(
                str(path), f"is not valid TOML ({error})", "correct that line", "config.topology"
            ) from error
        return _Reader(str(path)).topology(document)

    @property
    def vhost(self) -> str:
        """The broker's virtual host: one per application."""
        return self.application

    @property
    def exchange(self) -> str:
        """The topic exchange that every task message is published to."""
        return self.application

    @property
    def quarantine(self) -> str:
        """Queue and routing key of refused messages."""
        return f"{self.application}.quarantine"

    @property
    def dead(self) -> str:
        """Queue and routing key of messages that were delivered too often."""
        return f"{self.application}.dead"

    @property
    def accounts(self) -> Mapping[str, Pool | Caller]:
        """Pools, then callers, by name."""
        return {**self.pools, **self.callers}

    def account(self, role: str) -> str:
        """The account of a pool or caller at broker and backend; also its client certificate's common name."""
        return f"{self.application}.{role}"

    def held(self, pool: str) -> tuple[str, str]:
        """On Redis, the keys of what a pool's workers hold and of when they last said so.

        Pools have different rights, so no pool gives back what another one held.
        """
        return f"{self.application}:{pool}:unacked", f"{self.application}:{pool}:unacked_index"

    def broker_name(self, queue: str) -> str:
        """The broker's name of a queue that is called by either name; an unknown one is returned as it is."""
        return next((known.broker_name for known in self.queues if known.name == queue), queue)

    def queue(self, name: str) -> Queue:
        """The queue with this short name (``KeyError`` if there is none)."""
        for queue in self.queues:
            if queue.name == name:
                return queue
        raise KeyError(name)


class _Reader:
    """Turns the parsed TOML into dataclasses; every complaint says where in which file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def refuse(self, where: str, reason: str, fix: str) -> ConfigurationRefused:
        return ConfigurationRefused(f"{self.file}: {where}", reason, fix, "config.topology")

    def topology(self, document: dict[str, Any]) -> Topology:
        self.known_keys("top level", document, {"application", "broker", "queues", "pools", "callers"})
        application = document.get("application")
        if not isinstance(application, str) or not _APPLICATION.fullmatch(application):
            raise self.refuse(
                "application",
                "is missing or not a name",
                "write a lower-case letter, then up to 39 letters, digits or inner hyphens",
            )
        broker = document.get("broker", "rabbitmq")
        if broker not in _BROKERS:
            raise self.refuse("broker", "is none that this project can use", f"write one of {', '.join(_BROKERS)}")
        queues = tuple(
            self.queue(application, name, stanza) for name, stanza in self.stanzas("queues", document, needed=True)
        )
        names = frozenset(queue.name for queue in queues)
        pools = {name: self.pool(name, stanza, names) for name, stanza in self.stanzas("pools", document, needed=True)}
        callers = {name: self.caller(name, stanza, names) for name, stanza in self.stanzas("callers", document)}
        for name in sorted((pools.keys() & (callers.keys() | _CALLER_ROLES)) | (callers.keys() & _POOL_ROLES)):
            raise self.refuse(
                name, "cannot be both a worker pool and a caller, which would share an account", "rename one of the two"
            )
        for name in sorted(names.difference(*(pool.queues for pool in pools.values()))):
            raise self.refuse(
                f"queues.{name}", "is consumed by no worker pool", "add it to a pool's queues or remove it"
            )
        return Topology(application, queues, MappingProxyType(pools), MappingProxyType(callers), broker)

    def queue(self, application: str, name: str, stanza: dict[str, Any]) -> Queue:
        where = f"queues.{name}"
        self.known_keys(where, stanza, {"delivery_limit", "max_length_bytes"})
        if name in RESERVED_QUEUES:
            raise self.refuse(where, "is a name that the application uses itself", "choose another name")
        for key, value in stanza.items():
            if type(value) is not int or value < 1:  # bool is an int to isinstance
                raise self.refuse(f"{where}.{key}", "is not a positive whole number", "write one, without quotes")
        return Queue(name, f"{application}.{name}", **stanza)

    def pool(self, name: str, stanza: dict[str, Any], queues: frozenset[str]) -> Pool:
        where = f"pools.{name}"
        self.known_keys(where, stanza, {"queues", "sends", "sends_to"})
        consumes = self.queue_names(where, "queues", stanza, queues)
        if not consumes:
            raise self.refuse(f"{where}.queues", "is missing or empty", "name the queues that the pool consumes")
        sends_to = self.queue_names(where, "sends_to", stanza, queues) if "sends_to" in stanza else consumes
        return Pool(name, self.task_patterns(where, stanza), consumes, sends_to)

    def caller(self, name: str, stanza: dict[str, Any], queues: frozenset[str]) -> Caller:
        where = f"callers.{name}"
        self.known_keys(where, stanza, {"queues", "sends"})
        caller = Caller(name, self.task_patterns(where, stanza), self.queue_names(where, "queues", stanza, queues))
        if bool(caller.sends) != bool(caller.queues):
            raise self.refuse(
                where,
                "has only one of sends and queues",
                "name both, or leave both empty for a caller that sends nothing",
            )
        return caller

    def task_patterns(self, where: str, stanza: dict[str, Any]) -> tuple[str, ...]:
        patterns = self.strings(f"{where}.sends", stanza.get("sends", []))
        for pattern in patterns:
            if not _TASK_PATTERN.fullmatch(pattern):
                raise self.refuse(
                    f"{where}.sends",
                    f"{pattern!r} is not a task name, or starts with a wildcard",
                    "write a task's name, where * stands for any characters after the first one",
                )
        return patterns

    def queue_names(self, where: str, key: str, stanza: dict[str, Any], known: frozenset[str]) -> tuple[str, ...]:
        names = self.strings(f"{where}.{key}", stanza.get(key, []))
        for name in names:
            if name not in known:
                raise self.refuse(
                    f"{where}.{key}", f"names {name!r}, which is no queue", f"add [queues.{name}] or correct the name"
                )
        return names

    def strings(self, where: str, value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refuse(where, "is not a list of strings", 'write a list such as ["default"]')
        if len(set(value)) != len(value):
            raise self.refuse(where, "names something twice", "remove the repetition")
        return tuple(value)

    def stanzas(
        self, section: str, document: dict[str, Any], *, needed: bool = False
    ) -> list[tuple[str, dict[str, Any]]]:
        table = document.get(section, {})
        if not isinstance(table, dict) or not all(isinstance(stanza, dict) for stanza in table.values()):
            raise self.refuse(section, "is not a table of tables", f"write [{section}.<name>]")
        if needed and not table:
            raise self.refuse(section, "is missing or empty", f"add one [{section}.<name>]")
        for name in table:
            if not _NAME.fullmatch(name):
                raise self.refuse(
                    f"{section}.{name!r}",
                    "is not a name",
                    "write a lower-case letter, then up to 22 letters, digits or inner hyphens",
                )
        return list(table.items())

    def known_keys(self, where: str, table: dict[str, Any], known: set[str]) -> None:
        for key in table.keys() - known:
            raise self.refuse(where, f"has the unknown key {key!r}", f"use one of {', '.join(sorted(known))}")
