"""Reads ``topology.toml``: queues, worker pools, callers, and what each may send.

Guards against: rights that are written down twice and drift apart, and a slip of the pen that widens a right unnoticed.
Rests on: one file from which broker permissions, backend accounts and the message policy all come; anything the file
says that is not understood is refused, never skipped. A caller that is another service is one exact identity, in the
reader's own environment: development, staging and production never call each other.
Controls: BRK-6, AUT-1, AUT-3.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .errors import ConfigurationRefused, InvalidIdentity
from .identity import TRUST_DOMAIN, Identity, Role

#: Roles of the SPIFFE ID that belong to one kind of stanza; under the other it would name somebody else.
_CALLER_ROLES = frozenset({"client", "beat", "monitor", "operator"})
_POOL_ROLES = frozenset({"worker"})
#: What may carry the messages. Another one would have no intake and no rendered rights.
_BROKERS = ("rabbitmq", "redis")
#: Names that the application gives to its own two queues of refused and of failed messages.
RESERVED_QUEUES = frozenset({"dead", "quarantine"})

# No dot, which separates words in a routing key. An account's name is a certificate's common name: 64 octets (X.520).
_APPLICATION = re.compile(r"[a-z](?:[a-z0-9-]{0,38}[a-z0-9])?")
#: Stands in a caller's identity for the environment, which is that of whoever reads the file.
_ENVIRONMENT = "{environment}"
_NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,21}[a-z0-9])?")
# A first character that is no wildcard: `*` alone would also name Celery's built-in tasks.
_TASK_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_.*-]*")
#: Who gives commands to workers, and reads their replies and events.
CONTROLLERS = (Role.OPERATOR.value, Role.MONITOR.value)
_RATE = re.compile(r"([1-9][0-9]{0,5})/([smh])")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_Table = dict[str, Any]
#: What pub/sub channels start with, in any database.
FANOUT_PREFIX = "/."


@dataclass(frozen=True)
class Queue:
    """A queue of the application. ``max_length_bytes`` bounds what a flood may store in it."""

    name: str
    broker_name: str
    delivery_limit: int = 5
    max_length_bytes: int = 1024 * 1024 * 1024


class Limit(NamedTuple):
    """At most so many ``messages`` with tasks that match ``pattern`` in so many ``seconds``."""

    pattern: str
    messages: int
    seconds: int


@dataclass(frozen=True)
class Caller:
    """Someone who sends: ``sends`` are patterns of task names (``fnmatch``), ``queues`` where to.

    ``identity`` is set if it is another service; ``controls`` are patterns of commands.
    """

    name: str
    sends: tuple[str, ...]
    queues: tuple[str, ...]
    identity: Identity | None = None
    limits: tuple[Limit, ...] = ()
    controls: tuple[str, ...] = ()
    section = "callers"

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
    limits: tuple[Limit, ...] = ()
    section = "pools"

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
    trust_domain: str | None = None

    @classmethod
    def load(cls, path: Path) -> Topology:
        """Read and check a topology file.

        Raises:
            ConfigurationRefused: the file cannot be read, or says something that is unknown or inconsistent.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            reason, fix = f"cannot be read ({error.strerror})", "name a readable topology.toml"
            raise ConfigurationRefused(str(path), reason, fix, "config.topology") from error
        return cls.parse(str(path), content)

    @classmethod
    def parse(cls, file: str, content: bytes) -> Topology:
        """Check what a topology file holds.

        Args:
            file: its name, for the refusal, which says the line too.
            content: of it.

        Raises:
            ConfigurationRefused: it says something that is unknown or inconsistent.
        """
        try:
            document = tomllib.loads(text := content.decode("utf-8"))
        except ValueError as error:  # TOML and UTF-8 errors; the message has line and column
            reason = f"is not valid TOML ({error})"
            raise ConfigurationRefused(file, reason, "correct that line", "config.topology") from error
        return _Reader(file, text).topology(document)

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

    def celery(self, what: str) -> str:
        """The exchange of Celery's ``control``, ``replies`` or ``events``. No queue can have a name with two dots."""
        return f"{self.application}.celery.{what}"

    @property
    def accounts(self) -> Mapping[str, Pool | Caller]:
        """Pools, then callers, by name."""
        return {**self.pools, **self.callers}

    def audience(self, own: Identity) -> str:
        """What is sent to this application is addressed to, in the environment of ``own``."""
        domain = self.trust_domain or own.trust_domain
        return replace(own, trust_domain=domain, application=self.application).audience

    def stanza(self, signer: Identity, own: Identity) -> Pool | Caller | None:
        """The stanza that is about ``signer``, in the environment of ``own``; None if there is none."""
        if signer.audience == self.audience(own):
            rules: Mapping[str, Pool | Caller] = self.pools if signer.role is Role.WORKER else self.callers
            found = rules.get(signer.account)
            return None if isinstance(found, Caller) and found.identity else found
        written = replace(signer, environment=_ENVIRONMENT)
        callers = self.callers.values() if signer.environment == own.environment else ()
        return next((caller for caller in callers if caller.identity == written), None)

    def account(self, role: str) -> str:
        """The account of a pool or caller at broker and backend; also its client certificate's common name."""
        return f"{self.application}.{role}"

    def held(self, pool: str) -> tuple[str, str]:
        """On Redis, the keys of what a pool's workers hold and of when they last said so.

        Pools have different rights, so no pool gives back what another one held.
        """
        return f"{self.application}:{pool}:unacked", f"{self.application}:{pool}:unacked_index"

    @property
    def replays(self) -> str:
        """Prefix of the keys that say which messages have run."""
        return f"{self.application}:replay:"

    def broker_name(self, queue: str) -> str:
        """The broker's name of a queue that is called by either name; an unknown one is returned as it is."""
        return next((known.broker_name for known in self.queues if known.name == queue), queue)

    def queue(self, name: str) -> Queue:
        """The queue with this short name (``KeyError`` if there is none)."""
        return {queue.name: queue for queue in self.queues}[name]


def line_of(text: str, where: str) -> int:
    """Return the line of a valid TOML document on which a key, or the nearest that it is in, is first written.

    Args:
        text: the document. Its parser tells no lines, so each statement is parsed again under its table's header.
        where: the key's dotted path.
    """
    lines, header, statement, first = {"": 1}, "", "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        if number > first and not any(end in line for end in ("]", '"""', "'''")):
            continue
        with suppress(tomllib.TOMLDecodeError):  # it goes on in the next line
            for key in _keys(tomllib.loads(header + statement)):
                lines.setdefault(key, first)
            header = statement if statement.lstrip().startswith("[") else header
            statement, first = "", number + 1
    while where not in lines:
        where = where.rpartition(".")[0]
    return lines[where]


def _keys(table: Any, prefix: str = "") -> Iterator[str]:
    for key, value in table.items() if isinstance(table, dict) else ():
        yield prefix + key
        yield from _keys(value, f"{prefix}{key}.")


class _Reader:
    """Turns the parsed TOML into dataclasses; every complaint says where in which file."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text

    def refuse(self, where: str, reason: str, fix: str, at: str = "") -> ConfigurationRefused:
        """Return a complaint about ``where``; ``at`` is the key whose line to name, if it is another."""
        place = f"{self.file}, line {line_of(self.text, at or where)}: {where}"
        return ConfigurationRefused(place, reason, fix, "config.topology")

    def topology(self, document: _Table) -> Topology:
        self.known_keys("top level", document, {"application", "trust_domain", "broker", "queues", "pools", "callers"})
        application = document.get("application")
        if not isinstance(application, str) or not _APPLICATION.fullmatch(application):
            fix = "write a lower-case letter, then up to 39 letters, digits or inner hyphens"
            raise self.refuse("application", "is missing or not a name", fix)
        broker = document.get("broker", "rabbitmq")
        if broker not in _BROKERS:
            raise self.refuse("broker", "is none that this project can use", f"write one of {', '.join(_BROKERS)}")
        stanzas = self.stanzas("queues", document, needed=True)
        queues = tuple(self.queue(application, name, stanza) for name, stanza in stanzas)
        names = frozenset(queue.name for queue in queues)
        callers = {name: self.caller(name, stanza, names) for name, stanza in self.stanzas("callers", document)}
        foreign = [caller.identity for caller in callers.values() if caller.identity]
        if len(set(foreign)) < len(foreign) or application in {identity.application for identity in foreign}:
            raise self.refuse("callers", "have an identity twice, or one of this application", "remove it")
        domain = document.get("trust_domain")
        named = isinstance(domain, str) and re.fullmatch(TRUST_DOMAIN, domain)
        if not named and (foreign or domain is not None):
            reason = "is missing or not a trust domain, and other services must know whose results to believe"
            raise self.refuse("trust_domain", reason, "write that of this application's own signing certificates")
        # Without pools it is what another service gets to know, and says nothing of our own callers either.
        ours = not foreign or len(foreign) < len(callers) or "pools" in document
        pools = {name: self.pool(name, stanza, names) for name, stanza in self.stanzas("pools", document, needed=ours)}
        for name in sorted((pools.keys() & (callers.keys() | _CALLER_ROLES)) | (callers.keys() & _POOL_ROLES)):
            at, reason = f"callers.{name}", "cannot be both a worker pool and a caller, which would share an account"
            raise self.refuse(name, reason, "rename one of the two", at if name in callers else f"pools.{name}")
        for name in sorted(names.difference(*(pool.queues for pool in pools.values()))) if ours else ():
            raise self.refuse(f"queues.{name}", "is consumed by no pool", "add it to a pool's queues or remove it")
        return Topology(application, queues, MappingProxyType(pools), MappingProxyType(callers), broker, domain)

    def queue(self, application: str, name: str, stanza: _Table) -> Queue:
        where = f"queues.{name}"
        self.known_keys(where, stanza, {"delivery_limit", "max_length_bytes"})
        if name in RESERVED_QUEUES:
            raise self.refuse(where, "is a name that the application uses itself", "choose another name")
        for key, value in stanza.items():
            if type(value) is not int or value < 1:  # bool is an int to isinstance
                raise self.refuse(f"{where}.{key}", "is not a positive whole number", "write one, without quotes")
        return Queue(name, f"{application}.{name}", **stanza)

    def pool(self, name: str, stanza: _Table, queues: frozenset[str]) -> Pool:
        where = f"pools.{name}"
        self.known_keys(where, stanza, {"queues", "sends", "sends_to", "rate"})
        consumes = self.queue_names(where, "queues", stanza, queues)
        if not consumes:
            raise self.refuse(f"{where}.queues", "is missing or empty", "name the queues that the pool consumes")
        sends_to = self.queue_names(where, "sends_to", stanza, queues) if "sends_to" in stanza else consumes
        return Pool(name, self.task_patterns(where, stanza), consumes, sends_to, self.limits(where, stanza))

    def caller(self, name: str, stanza: _Table, queues: frozenset[str]) -> Caller:
        where = f"callers.{name}"
        self.known_keys(where, stanza, {"queues", "sends", "identity", "rate", "controls"})
        sends, sends_to = self.task_patterns(where, stanza), self.queue_names(where, "queues", stanza, queues)
        identity, limits = self.identity(where, name, stanza.get("identity")), self.limits(where, stanza)
        controls = self.strings(f"{where}.controls", stanza.get("controls", []))
        if controls and name not in CONTROLLERS:
            raise self.refuse(f"{where}.controls", f"is only for {' and '.join(CONTROLLERS)}", "remove it")
        caller = Caller(name, sends, sends_to, identity, limits, controls)
        if not (sends and sends_to) and (sends or sends_to or caller.identity):
            fix = "name both, or leave both empty for a caller of this application that sends nothing"
            raise self.refuse(where, "lacks sends or queues", fix)
        return caller

    def identity(self, where: str, name: str, text: object) -> Identity | None:
        if text is None:
            return None
        if name in set(Role):
            raise self.refuse(where, "is one of our own, so it has no identity", "rename it, or remove the identity")
        with suppress(InvalidIdentity):
            identity = replace(Identity.parse(str(text).replace(_ENVIRONMENT, "any")), environment=_ENVIRONMENT)
            if str(identity) == text and identity.role not in {Role.OPERATOR, Role.MONITOR}:
                return identity
        reason = "is not one client, worker or beat of another service in the environment of whoever reads this"
        fix = f"write spiffe://<trust domain>/{_ENVIRONMENT}/<application>/<role>[/<name>], braces and all"
        raise self.refuse(f"{where}.identity", reason, fix)

    def task_patterns(self, where: str, stanza: _Table) -> tuple[str, ...]:
        patterns = self.strings(f"{where}.sends", stanza.get("sends", []))
        for pattern in patterns:
            if not _TASK_PATTERN.fullmatch(pattern):
                reason = f"{pattern!r} is not a task name, or starts with a wildcard"
                fix = "write a task's name, where * stands for any characters after the first one"
                raise self.refuse(f"{where}.sends", reason, fix)
        return patterns

    def limits(self, where: str, stanza: _Table) -> tuple[Limit, ...]:
        rates = stanza.get("rate", {})
        limits = []
        for pattern, rate in (rates if isinstance(rates, dict) else {"*": rates}).items():
            written = _RATE.fullmatch(rate) if isinstance(rate, str) else None
            if written is None or (pattern != "*" and not _TASK_PATTERN.fullmatch(pattern)):
                reason = f"{rate!r} for {pattern!r} is no limit"
                fix = 'write "100/m" (s, m, h), or { "a.task" = "5/m" }'
                raise self.refuse(f"{where}.rate", reason, fix, f"{where}.rate.{pattern}")
            limits.append(Limit(pattern, int(written[1]), _SECONDS[written[2]]))
        return tuple(limits)

    def queue_names(self, where: str, key: str, stanza: _Table, known: frozenset[str]) -> tuple[str, ...]:
        names = self.strings(f"{where}.{key}", stanza.get(key, []))
        for name in names:
            if name not in known:
                fix = f"add [queues.{name}] or correct the name"
                raise self.refuse(f"{where}.{key}", f"names {name!r}, which is no queue", fix)
        return names

    def strings(self, where: str, value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refuse(where, "is not a list of strings", 'write a list such as ["default"]')
        if len(set(value)) != len(value):
            raise self.refuse(where, "names something twice", "remove the repetition")
        return tuple(value)

    def stanzas(self, section: str, document: _Table, *, needed: bool = False) -> list[tuple[str, _Table]]:
        table = document.get(section, {})
        if not isinstance(table, dict) or not all(isinstance(stanza, dict) for stanza in table.values()):
            raise self.refuse(section, "is not a table of tables", f"write [{section}.<name>]")
        if needed and not table:
            raise self.refuse(section, "is missing or empty", f"add one [{section}.<name>]")
        for name in table:
            if not _NAME.fullmatch(name):
                fix = "write a lower-case letter, then up to 22 letters, digits or inner hyphens"
                raise self.refuse(f"{section}.{name!r}", "is not a name", fix, f"{section}.{name}")
        return list(table.items())

    def known_keys(self, where: str, table: _Table, known: set[str]) -> None:
        for key in table.keys() - known:
            at = key if where == "top level" else f"{where}.{key}"
            raise self.refuse(where, f"has the unknown key {key!r}", f"use one of {', '.join(sorted(known))}", at)
