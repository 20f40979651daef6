"""The decision: may this origin, through this signer, send this task to this queue, how often, or give this command?

Guards against: a low-privilege signer that sends what it should not, itself or through a worker, or more than it
should; everything not allowed in topology.toml is denied. And against a right that was taken away and lives on until
every worker was restarted.
Rests on: identities from verified certificates, and on one file for all rules, which is looked at while it is used.
A message is counted for its origin and for the worker that relays it, by each worker's main process for itself.
Controls: AUT-1, AUT-2, AUT-3, AUT-4.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from fnmatch import translate
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from kombu.utils.limits import TokenBucket

from .errors import NotAllowed, RateExceeded
from .files import Watched
from .identity import Identity, Role
from .topology import Caller, Limit, Pool, Topology

if TYPE_CHECKING:
    from .claims import TaskClaims
    from .settings import Settings

#: Roles whose messages may carry a task at all. A monitor only watches.
_SENDERS = frozenset({Role.CLIENT, Role.BEAT, Role.WORKER, Role.OPERATOR})
_LOOK = ("ping", "clock", "stats", "active", "reserved", "scheduled", "revoked", "registered", "active_queues")
_WATCH: Mapping[str, tuple[str, ...]] = {**dict.fromkeys(_LOOK, ()), "heartbeat": (), "query_task": ("ids",)}
#: Commands that change something, with their arguments.
CHANGE: Mapping[str, tuple[str, ...]] = {
    "revoke": ("task_id", "terminate", "signal"),
    "terminate": ("task_id", "signal"),
    "revoke_by_stamped_headers": ("headers", "terminate", "signal"),
    "rate_limit": ("task_name", "rate_limit"),
    "time_limit": ("task_name", "soft", "hard"),
    "autoscale": ("max", "min"),
    **dict.fromkeys(("pool_grow", "pool_shrink"), ("n",)),
    **dict.fromkeys(("add_consumer", "cancel_consumer"), ("queue",)),
    **dict.fromkeys(("pool_restart", "shutdown"), ()),
}
#: Which role may give which command with which arguments, if topology.toml lets it; other arguments are dropped. Left
#: out are those that show the configuration (``conf``, ``report``), write files or take a worker's word (``hello``).
#: ``release`` is no command, but a right of the same kind: to release what was refused.
COMMANDS = {Role.MONITOR: _WATCH, Role.OPERATOR: {**_WATCH, **CHANGE, "release": ()}}
#: What is left of each limit, by its stanza.
Counted = MutableMapping[tuple[str, Limit], TokenBucket]
#: Answers that are remembered, of each kind.
_REMEMBERED = 4096


class Decision(NamedTuple):
    """Whether something is allowed, and by which key of topology.toml; ``where`` is empty if none is about it."""

    allowed: bool
    where: str


class _Names:
    """Patterns of names (``fnmatch``) as one: exact ones are looked up, and one expression stands for the others."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._exact = frozenset(patterns)
        wild = [translate(pattern) for pattern in sorted(self._exact) if "*" in pattern]
        self._match = re.compile("|".join(wild) or r"(?!)").match

    def __contains__(self, name: str) -> bool:
        return name in self._exact or self._match(name) is not None


class _Rule:
    """One stanza, made ready."""

    def __init__(self, stanza: Pool | Caller, topology: Topology, counted: Counted) -> None:
        self.where = f"{stanza.section}.{stanza.name}"
        self.sends, self.controls = _Names(stanza.sends), _Names(getattr(stanza, "controls", ()))
        self.queues = frozenset(topology.queue(name).broker_name for name in stanza.publishes_to)
        self.limits = [(_Names([limit.pattern]), self._bucket(limit, counted)) for limit in stanza.limits]

    def _bucket(self, limit: Limit, counted: Counted) -> TokenBucket:
        """So many at once, and then as they flow back."""
        return counted.setdefault((self.where, limit), TokenBucket(limit.messages / limit.seconds, limit.messages))


class Policy:
    """Decides from the topology of one application in one environment.

    The answer for each (signer, task, queue) is remembered, and a first one is looked up: no cost grows with the rules.

    Args:
        counted: what has been counted until now; it is gone on with.
    """

    def __init__(self, topology: Topology, own: Identity, counted: Counted | None = None) -> None:
        self._topology, self._own = topology, own
        self._audience = topology.audience(own)
        counted = {} if counted is None else counted
        self._rules = {stanza.name: _Rule(stanza, topology, counted) for stanza in topology.accounts.values()}
        self._rule = lru_cache(maxsize=_REMEMBERED)(self._find)
        self.decide = lru_cache(maxsize=_REMEMBERED)(self._decide)
        self._buckets = lru_cache(maxsize=_REMEMBERED)(self._matching)

    def check(self, signer: Identity, origin: Identity, task: str, queue: str | None) -> None:
        """Return if both the signer and the origin may; ``queue`` is a name on the broker, None any of theirs.

        Raises:
            NotAllowed: one of them may not.
        """
        if origin != signer and not signer.works_for(self._audience):
            raise NotAllowed("only a worker sends on behalf of another")
        for identity in {signer, origin}:
            if not self.decide(identity, task, queue).allowed:
                raise NotAllowed(f"{identity.role} may not send this task to this queue")

    def admit(self, claims: TaskClaims) -> Collection[TokenBucket]:
        """Count a message that is about to be admitted; return what it was taken from.

        Raises:
            RateExceeded: its signer or its origin has had as many as it may; the message is counted for none.
        """
        buckets = {each for who in (claims.iss, claims.origin) for each in self._buckets(who, claims.task.name)}
        if any(bucket.expected_time() for bucket in buckets):
            raise RateExceeded
        for bucket in buckets:
            bucket.can_consume()
        return buckets

    def decide_command(self, identity: Identity, method: str) -> Decision:
        """Decide whether a command of remote control may be given."""
        rule = self._rule(identity)
        allowed = rule is not None and method in rule.controls and method in COMMANDS.get(identity.role, ())
        return Decision(allowed, f"{rule.where}.controls" if rule else "")

    def _find(self, identity: Identity) -> _Rule | None:
        stanza = self._topology.stanza(identity, self._own)
        return self._rules[stanza.name] if stanza else None

    def _decide(self, identity: Identity, task: str, queue: str | None) -> Decision:
        rule = self._rule(identity)
        if rule is None or identity.role not in _SENDERS:
            return Decision(False, rule.where if rule else "")
        if task not in rule.sends:
            return Decision(False, f"{rule.where}.sends")
        if queue not in {None, *rule.queues}:
            return Decision(False, f"{rule.where}.queues")
        return Decision(True, f"{rule.where}.sends")

    def _matching(self, uri: str, task: str) -> list[TokenBucket]:
        rule = self._rule(Identity.parse(uri))
        return [bucket for names, bucket in rule.limits if task in names] if rule else []


class Rules(Watched):
    """The policy as topology.toml says now; another one takes force as a whole, or not at all."""

    def __init__(self, settings: Settings) -> None:
        """Read the topology.

        Raises:
            ConfigurationRefused: as ``Settings.read_topology``.
        """
        super().__init__("policy", [settings.topology], topology=self._load)
        self._settings, self._own = settings, settings.credentials.signer.identity
        self.topology = settings.read_topology()  # as it was at the start
        self._counted: Counted = {}
        self._policy = Policy(self.topology, self._own, self._counted)

    @property
    def policy(self) -> Policy:
        """Who may send what."""
        self.look()
        return self._policy

    def _load(self) -> str | None:
        topology = self._settings.read_topology()
        self._policy = Policy(topology, self._own, self._counted)
        if _until_restart(topology) == _until_restart(self.topology):
            return None
        return "rights are as the file says; queues, pools and broker stay as they are until a restart"


def _until_restart(topology: Topology) -> object:
    consumed = {pool.name: pool.queues for pool in topology.pools.values()}
    return topology.queues, consumed, topology.broker
