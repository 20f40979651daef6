"""The replay guard: a signed message runs once, however often it is published.

Guards against: a captured message that is published again while it waits, while it runs or after it ran.
Rests on: a store in which each message that was admitted is *claimed* by one worker and then *done*, until every gate
refuses it as expired. A claim holds while its worker renews its lease; then a redelivered message takes it over, as it
does one that was given back. What cannot be decided (the claimant lives, or the store is away) is kept aside, one copy
of each message, unacknowledged and so never lost, and looked at again each second.
*Done* is on its way to the store before the acknowledgement is to the broker. A worker killed between the two: the
message is redelivered and refused, it has run. Killed before both: it runs again.
Not guarded: a store that lost its memory lets each message that is not expired run once more; and a worker that does
nothing for longer than its lease cannot keep a copy of what it runs from another.
Controls: SIG-5.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from hashlib import blake2b
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import redis
from redis.connection import parse_url

from . import audit
from .errors import Replayed
from .tls import TLS, VerifiedSSLConnection

if TYPE_CHECKING:
    from kombu.utils.limits import TokenBucket

    from .settings import Settings

#: Seconds after which what a killed worker had claimed may run elsewhere.
LEASE = 15
#: Seconds to wait for the store, and between attempts to reach it.
_ANSWER_TIMEOUT, _PAUSE = 5, 1
#: Messages kept aside that one look asks about.
_AT_ONCE = 100
#: Answers of a store about a claim.
OURS, HELD, DONE = "ours", "held", "done"
#: Before the name of a worker, which no message's name begins with.
WORKER = "worker:"


def late(settings: Settings) -> int:
    """Return for how long an expired message can still be released, in seconds: so long it is known whether it ran."""
    return settings.message_max_age // 4


class ReplayStore(Protocol):
    """Where claims are kept; all workers of an application share one. Any error means that it is away."""

    def claim(self, name: str, worker: str, seconds: int) -> str:
        """Claim a message for a living worker: ``OURS``, or ``HELD`` by another living one, or ``DONE``."""

    def done(self, name: str, seconds: int) -> None:
        """Say that a message is never to run again; must not wait or raise, and be kept until the store can be told."""

    def release(self, name: str, worker: str) -> None:
        """Give back a worker's claim, if it still has it; like ``done``."""

    def renew(self, worker: str, seconds: int) -> bool:
        """Let a worker, which is a claim on itself, live for so long; return whether it still did."""


class Claim:
    """The right to run one message, which a worker holds until it has settled it."""

    def __init__(self, guard: Guard, name: str, until: float, message: Any) -> None:
        self._guard, self._until = guard, until
        self.name, self.message, self.since = name, message, 0.0
        self.counted: Collection[TokenBucket] = ()

    @property
    def seconds(self) -> int:
        """How long the store must know of it."""
        return max(1, int(self._until - time.time()))

    def holds(self) -> bool:
        """Say, when the task is about to start, whether it may; if not, the message is kept aside.

        The store is asked only if the lease may have lapsed since.
        """
        guard = self._guard
        if self.since > guard.lapsed and time.monotonic() < guard.renewed + LEASE:
            return True
        if (verdict := guard.ask(self)) != OURS:
            guard.held.pop(self.name, None)
            guard.keep_aside(self, verdict)
        return verdict == OURS

    def settle(self, *, again: bool = False) -> None:
        """End it, with the message done or to be delivered again; the first time counts."""
        guard = self._guard
        if guard.held.get(self.name) is not self:
            return
        del guard.held[self.name]
        if again:
            guard.store.release(self.name, guard.worker)
            for bucket in self.counted:
                # It did not run; more than it holds, kombu's bucket would keep for good.
                bucket.can_consume(max(-1, bucket._get_tokens() - bucket.capacity))
        else:
            guard.store.done(self.name, self.seconds)


class Guard:
    """Decides which copy of a message runs; one for each worker.

    Args:
        store: shared by all workers of the application.
        settings: ``replay_on_outage`` and ``clock_skew``.
    """

    def __init__(self, store: ReplayStore, settings: Settings) -> None:
        self.store, self._accept = store, settings.replay_on_outage == "accept"
        self._margin = late(settings) + 2 * settings.clock_skew + 60
        self.worker = uuid.uuid4().hex
        self.held: dict[str, Claim] = {}
        self._aside: dict[str, tuple[Any, Any]] = {}
        self.renewed = self.lapsed = float("-inf")
        self._away = False
        self._qos: Any = None

    def claim(self, message: Any, claims: Any, *scope: str) -> Claim | None:
        """Return the claim of a verified message, or None when it is kept aside.

        Args:
            message: as it was delivered; RabbitMQ's redelivered flag is on it.
            claims: its ``iss``, ``jti`` and ``exp`` count. Signers choose ``jti``, so it is theirs alone.
            scope: for whom it is claimed, where several shall each run it.

        Raises:
            Replayed: it ran, or this copy of it is not needed.
        """
        key = "\n".join((claims.iss, claims.jti, *scope))
        claim = Claim(self, blake2b(key.encode(), digest_size=16).hexdigest(), claims.exp + self._margin, message)
        verdict = HELD if claim.name in self.held else self.ask(claim)
        if verdict == OURS:
            self.held[claim.name] = claim
            return claim
        # RabbitMQ says what it has delivered before: of a message that is held, anything else is a copy. Redis cannot.
        copied = verdict == HELD and not (message.delivery_info or {}).get("redelivered", True)
        if verdict == DONE or copied or claim.name in self._aside:
            refusal = Replayed()
            refusal.claims = claims
            raise refusal
        self.keep_aside(claim, verdict)
        return None

    def connected(self, qos: Any, running: set[Claim]) -> None:
        """Begin with a new connection to the broker, which delivers again what it had delivered on the last one."""
        self._qos = qos
        self._aside.clear()
        for claim in {*self.held.copy().values()} - running:
            claim.settle(again=True)

    def tick(self, receive: Callable[[Any], None] | None) -> None:
        """Renew the lease, and hand what is kept aside to ``receive``; called each second, and never raises itself."""
        self._try(self._renew)
        if self._away or receive is None:
            return
        for name in list(self._aside)[:_AT_ONCE]:
            message, qos = self._aside.pop(name)
            if qos is not None:
                qos.decrement_eventually()
            receive(message)

    def end(self) -> None:
        """Give back what was not run: the worker ends."""
        self.store.release(WORKER + self.worker, self.worker)

    def keep_aside(self, claim: Claim, verdict: str | None) -> None:
        """Keep a message, unacknowledged, until the store says more of it."""
        # Without the store nothing can run, and the broker is to stop delivering. A copy must not make it stop.
        qos = self._qos if verdict == HELD else None
        if qos is not None:
            qos.increment_eventually()
        # A copy may be aside already when what was to start comes back.
        self._aside[uuid.uuid4().hex if claim.name in self._aside else claim.name] = claim.message, qos

    def ask(self, claim: Claim) -> str | None:
        """Ask the store; None while it is away."""
        if time.monotonic() > self.renewed + LEASE / 3:
            self._try(self._renew)
        verdict: str | None = self._try(self.store.claim, claim.name, self.worker, claim.seconds)
        if verdict is None and self._accept:
            verdict = OURS
        claim.since = time.monotonic()
        return verdict

    def _renew(self) -> None:
        now = time.monotonic()
        if not self.store.renew(self.worker, LEASE):
            self.lapsed = time.monotonic()
            for claim in self.held.copy().values():
                if self.store.claim(claim.name, self.worker, claim.seconds) == OURS:
                    claim.since = time.monotonic()
        self.renewed = now

    def _try(self, call: Callable[..., Any], *args: Any) -> Any:
        answer = error = None
        try:
            answer = call(*args)
        except Exception as caught:  # whatever it is, the store does not say what may run
            error = type(caught).__name__
        if self._away != bool(error):
            self._away = bool(error)
            audit.record(audit.Event.REPLAY_STORE_AWAY if error else audit.Event.REPLAY_STORE_BACK, error=error)
        return answer


_CLAIM = """
local holder = redis.call('GET', KEYS[1])
if holder == 'done' then return 'done' end
if holder and holder ~= ARGV[1] and redis.call('EXISTS', ARGV[3] .. holder) == 1 then return 'held' end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 'ours'
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class RedisStore:
    """Redis 7: a key for each message, and one for each worker that lives.

    One round trip for each claim. What need not be waited for is sent at once; its answer is read with the next.
    """

    def __init__(self, url: str, tls: TLS, prefix: str) -> None:
        options: dict[str, Any] = {**parse_url(url), **tls.redis()}  # type: ignore[no-untyped-call]  # redis-py
        options.pop("connection_class")
        self._connection = VerifiedSSLConnection(
            **options, driver_info=None, socket_connect_timeout=_ANSWER_TIMEOUT, socket_timeout=_ANSWER_TIMEOUT
        )
        self._prefix = prefix
        self._unanswered: deque[tuple[Any, ...]] = deque(maxlen=100_000)
        self._next_attempt = 0.0
        self._lock = Lock()

    def claim(self, name: str, worker: str, seconds: int) -> str:
        """See ``ReplayStore``."""
        return str(self._ask("EVAL", _CLAIM, 1, self._prefix + name, worker, seconds, self._prefix + WORKER), "ascii")

    def done(self, name: str, seconds: int) -> None:
        """See ``ReplayStore``."""
        self._tell("SET", self._prefix + name, DONE, "EX", seconds)

    def release(self, name: str, worker: str) -> None:
        """See ``ReplayStore``."""
        self._tell("EVAL", _RELEASE, 1, self._prefix + name, worker)

    def renew(self, worker: str, seconds: int) -> bool:
        """See ``ReplayStore``."""
        return self._ask("SET", self._prefix + WORKER + worker, worker, "EX", seconds, "GET") is not None

    def _tell(self, *command: Any) -> None:
        with self._lock:
            self._unanswered.append(command)
            if self._connection.is_connected:
                with suppress(redis.RedisError):  # then on the next connection, where all unanswered is sent again
                    self._connection.send_command(*command)  # type: ignore[no-untyped-call]  # redis-py

    def _ask(self, *command: Any) -> Any:
        with self._lock:
            if time.monotonic() < self._next_attempt:
                raise redis.ConnectionError
            try:
                commands = [command] if self._connection.is_connected else [*self._unanswered, command]
                self._connection.send_packed_command(self._connection.pack_commands(commands))  # type: ignore[no-untyped-call]  # redis-py
                while self._unanswered:
                    self._connection.read_response()
                    self._unanswered.popleft()
                return self._connection.read_response()
            except BaseException:
                self._connection.disconnect()  # type: ignore[no-untyped-call]  # redis-py
                self._next_attempt = time.monotonic() + _PAUSE
                raise
