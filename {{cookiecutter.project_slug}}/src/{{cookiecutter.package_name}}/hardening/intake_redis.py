"""The intake for Redis as a broker, where a message is whatever somebody pushed onto a list.

Guards against: a pushed ``garbage`` or ``[1]`` that ends the worker while it is parsed; a delivery tag, routing key or
redelivered flag that the sender chose, which would acknowledge another message or send a retry elsewhere; a broken
entry in the shared ``unacked`` hash that ends every worker that tries to restore it; a message that is lost with its
worker, or kept from the next one for an hour.
Rests on: every popped item being rebuilt here before kombu sees it. Redis cannot say who pushed it, so nothing of it is
believed but its body and content type, which the gate judges.
Controls: INT-1, SER-3, BRK-2, TLS-1.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty
from typing import Any, ClassVar

import redis
from kombu import Exchange
from kombu.transport import redis as kombu_redis

from .errors import Unparseable
from .identity import Identity
from .intake import address, queues, strip_compression
from .settings import Settings
from .tls import VerifiedSSLConnection
from .topology import FANOUT_PREFIX, Topology

#: Seconds after which Redis gives away what a worker holds that no longer says that it lives.
VISIBILITY_TIMEOUT = 60
#: Seconds to wait for any answer of Redis. No connection hangs on a server that has stopped.
ANSWER_TIMEOUT = 10
#: A count that no honest message reaches. Whoever may push to a queue may choose it, and shorten or prolong its own
#: message's way to the dead letters.
_MANY = 1_000
#: Messages kept in a queue that nobody consumes (dead letters, quarantine), and bytes if all are as long as the newest.
#: Redis counts no bytes of a list. The oldest go first.
KEPT_MESSAGES, KEPT_BYTES = 10_000, 64 * 1024 * 1024
#: Messages that one look at the lost ones gives back.
RESTORED_AT_ONCE = 100
_UNPARSED = "unparsed"
#: Options of the transport that are this layer's own.
_OPTIONS = ("dead_queue", "quarantine_queue", "delivery_limits")


def rebuild(item: bytes, queue: str) -> dict[str, Any]:
    """Return the message kombu shall see for an item popped from ``queue``; never raises.

    An item that is no message becomes one with an empty body and its raw bytes, base64, under ``unparsed``.
    """
    properties: dict[str, Any] = {
        "delivery_tag": str(uuid.uuid4()),
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": 0,
        "deliveries": 1,
    }
    try:
        message = json.loads(item)
        theirs = message["properties"]
        body = message["body"].encode("utf-8")
        if theirs.get("body_encoding") == "base64":
            body = base64.b64decode(body, validate=True)
        for name, least, most in (("priority", 0, 9), ("deliveries", 1, _MANY)):
            if isinstance(theirs.get(name), int):
                properties[name] = max(least, min(int(theirs[name]), most))
        content_type, content_encoding = message.get("content-type"), message.get("content-encoding")
        compressed = bool(message.get("headers") and message["headers"].get("compression"))
        if not isinstance(content_type, str | None) or not isinstance(content_encoding, str | None):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        body, content_type, content_encoding, compressed = b"", None, None, False
        properties[_UNPARSED] = base64.b64encode(item).decode("ascii")
    return {
        "body": base64.b64encode(body).decode("ascii"),
        "content-type": content_type,
        "content-encoding": content_encoding,
        "headers": {"compression": "refused"} if compressed else {},
        "properties": {**properties, "body_encoding": "base64"},
    }


def _last(newest: str) -> int:
    return max(1, min(KEPT_MESSAGES, KEPT_BYTES // len(newest))) - 1


class RedisMessage(kombu_redis.Channel.Message):
    """A popped message. ``refusal`` is set where the intake refuses it; ``unparsed`` keeps its raw bytes."""

    def __init__(self, payload: dict[str, Any], channel: Any = None, **kwargs: Any) -> None:
        """Build it from what :func:`rebuild` made."""
        self.unparsed = base64.b64decode(payload["properties"].get(_UNPARSED, ""))
        headers = dict(payload["headers"])
        self.refusal = Unparseable() if _UNPARSED in payload["properties"] else strip_compression(headers)
        super().__init__({**payload, "headers": headers}, channel=channel, **kwargs)
        self._raw = payload


class _Client(redis.Redis):
    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        reply: Any = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]  # redis-py
        if command_name == "BRPOP" and reply:
            key, item = reply
            return key, json.dumps(rebuild(item, key.decode("utf-8", "replace"))).encode("ascii")
        return reply


class _QoS(kombu_redis.QoS):
    """Keeps this worker's unacknowledged messages its own while it lives, so that a short timeout is enough.

    kombu's lock around the search for lost ones is left out: when its holder is killed it stays for five minutes, and
    each transaction watches what it changes anyway. Without memory, which a sender can fill, Redis refuses every
    transaction: so acknowledging is none, and giving back waits.
    """

    @contextmanager
    def pipe_or_acquire(self, pipe: Any = None, client: Any = None) -> Iterator[Any]:
        if pipe:
            yield pipe
        else:
            with self.channel.conn_or_acquire(client) as connected:
                yield connected.pipeline(transaction=False)

    def append(self, message: Any, delivery_tag: str) -> None:
        try:
            super().append(message, delivery_tag)
        except redis.exceptions.OutOfMemoryError:
            # It is ours already. Not to run it would lose it now, and not only if this worker is killed.
            kombu_redis.virtual.QoS.append(self, message, delivery_tag)

    def restore_visible(self, start: int = 0, num: int | None = None, interval: int = 0) -> None:
        now = time.time()
        # Not renewed, but nobody can take it either.
        with suppress(redis.exceptions.OutOfMemoryError), self.channel.conn_or_acquire() as client:
            if self._delivered:
                client.zadd(self.unacked_index_key, dict.fromkeys(self._delivered, now), xx=True)
            until = now - self.visibility_timeout
            late = client.zrange(self.unacked_index_key, 0, until, byscore=True, offset=0, num=RESTORED_AT_ONCE)
            for tag in late:
                self.restore_by_tag(tag, client)

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> Any:
        try:
            return super().restore_by_tag(tag, client, leftmost)
        except redis.exceptions.OutOfMemoryError:
            return None  # still noted: it is given back when there is memory
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, redis.exceptions.NoPermissionError):
            # Another worker's entry may be anything, also one for a queue that is not ours.
            return self._remove_from_indices(tag).execute()

    def restore_unacked(self, client: Any = None) -> None:
        self.channel.counts = False  # a worker that ends gives back what nobody has run
        try:
            super().restore_unacked(client)
        finally:
            self.channel.counts = True


class _Channel(kombu_redis.Channel):
    Message = RedisMessage
    QoS = _QoS
    connection_class = connection_class_ssl = VerifiedSSLConnection
    from_transport_options = (*kombu_redis.Channel.from_transport_options, *_OPTIONS)
    dead_queue = quarantine_queue = ""
    delivery_limits: ClassVar[dict[str, int]] = {}
    counts = True

    def _get_client(self) -> Any:
        super()._get_client()  # refuses a redis-py that is too old
        return _Client

    def _get(self, queue: str) -> dict[str, Any]:
        with self.conn_or_acquire() as client:
            item = client.rpop(queue)
        if item is None:
            raise Empty
        return rebuild(item, queue)

    # Nobody may count a queue, nor needs to.
    def _size(self, queue: str) -> int:
        return 0

    def queue_bind(self, queue: str, exchange: Any = None, routing_key: str = "", *_: Any, **__: Any) -> None:
        # Only fan-out queues are bound. kombu would also note it under keys that every account had to write to.
        self._fanout_queues[queue] = (exchange, routing_key.replace("#", "*"))

    def basic_consume(self, queue: str, *args: Any, **kwargs: Any) -> Any:
        tag = super().basic_consume(queue, *args, **kwargs)
        if queue in self.active_fanout_queues:
            # Now, and not with the first look for messages: an answer may come before that.
            if self.subclient.connection is None:
                self.subclient.connection = self.subclient.connection_pool.get_connection()
            self._subscribe()
        return tag

    def _handle_message(self, client: Any, response: Any) -> dict[str, Any]:
        handled: dict[str, Any] = super()._handle_message(client, response)
        if isinstance(handled["data"], bytes):
            handled["data"] = json.dumps(rebuild(handled["data"], ""))
        return handled

    def _deliver_fanout_message(self, message: Any, exchange: str) -> bool:
        # What comes after its consumer has gone is nobody's; kombu would take the KeyError for a lost connection.
        return exchange in self._fanout_to_queue and bool(super()._deliver_fanout_message(message, exchange))

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        super()._put(queue, message, **kwargs)
        if queue == self.quarantine_queue:
            with self.conn_or_acquire() as client:
                client.ltrim(queue, 0, _last(message["body"]))

    def _do_restore_message(
        self, payload: Any, exchange: str, routing_key: str, pipe: Any, leftmost: bool = False
    ) -> None:
        deliveries = int(payload["properties"]["deliveries"])
        body = json.dumps({**payload, "properties": {**payload["properties"], "deliveries": deliveries + self.counts}})
        if deliveries > self.delivery_limits.get(routing_key, 0) and self.counts:
            pipe.lpush(self.dead_queue, body)
            pipe.ltrim(self.dead_queue, 0, _last(body))
        else:
            (pipe.lpush if leftmost else pipe.rpush)(routing_key, body)


class RedisTransport(kombu_redis.Transport):
    """Redis over TLS, with the intake."""

    Channel = _Channel


class Redis:
    """One list for each queue, and what a pool's workers hold in a hash of the pool's own."""

    exchange = quarantine_exchange = ""

    def __init__(self, settings: Settings, topology: Topology, own: Identity) -> None:
        self._settings, self._topology, self._own = settings, topology, own
        self.early = settings.message_max_delay  # nothing is kept back until its time

    def configuration(self) -> dict[str, Any]:
        """Return the Celery settings that must hold."""
        held, since = self._topology.held(self._own.account)
        return {
            **address(self._settings.broker_address),
            "broker_use_ssl": self._settings.broker_tls.redis(),
            "broker_transport_options": {
                "visibility_timeout": VISIBILITY_TIMEOUT,
                "unacked_restore_interval": VISIBILITY_TIMEOUT / 6,
                "unacked_key": held,
                "unacked_index_key": since,
                "dead_queue": self._topology.dead,
                "quarantine_queue": self._topology.quarantine,
                "delivery_limits": {queue.broker_name: queue.delivery_limit for queue in self._topology.queues},
                "fanout_prefix": FANOUT_PREFIX,
                "priority_steps": [0],  # one list for each queue: a list for each priority would be a key more to guard
                "socket_connect_timeout": 5,
                "socket_timeout": ANSWER_TIMEOUT,
                "socket_keepalive": True,
            },
            **queues(self._topology, Exchange("", type="direct", no_declare=True), None),
        }

    def declare(self, connection: Any) -> None:
        """Do nothing: a list exists once it is pushed to."""

    def broadcast(self, what: str, kind: str) -> Exchange:
        """Return what stands for pub/sub channels; ``kind`` is RabbitMQ's."""
        return Exchange(self._topology.celery(what), "fanout")

    def quarantined(self, connection: Any) -> Iterator[tuple[bytes, Callable[[], Any]]]:
        """Yield each record in the quarantine, with what removes it.

        The newest comes first, counted from the oldest: what is added or removed meanwhile moves none of the next.
        """
        queue, client = self._topology.quarantine, connection.default_channel.client
        for at in range(-client.llen(queue), 0):
            for item in client.lrange(queue, at, at):
                yield base64.b64decode(rebuild(item, queue)["body"]), partial(client.lrem, queue, -1, item)
