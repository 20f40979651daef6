"""The intake for Redis as a broker, where a message is whatever somebody pushed onto a list.

Guards against: a pushed ``garbage`` or ``[1]`` that ends the worker while it is parsed; a delivery tag, routing key or
redelivered flag that the sender chose, which would acknowledge another message or send a retry elsewhere; a broken
entry in the shared ``unacked`` hash that ends every worker that tries to restore it.
Rests on: every popped item being rebuilt here before kombu sees it. Redis cannot say who pushed it, so nothing of it is
believed but its body and content type, which the gate judges.
Controls: INT-1, SER-3, BRK-2, TLS-1.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
import uuid
from typing import Any

import redis
from kombu.transport import redis as kombu_redis

from .errors import MessageRefused, Unparseable
from .intake import strip_compression
from .redis_tls import VerifiedSSLConnection

#: Deliveries of one message before it goes to the dead letters; RabbitMQ's queues have the same limit.
DELIVERY_LIMIT = 5
#: Messages kept in a queue that nobody consumes (dead letters, quarantine); the oldest go first.
KEPT_MESSAGES = 10_000
_UNPARSED = "unparsed"


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
        for name, most in (("priority", 9), ("deliveries", DELIVERY_LIMIT)):
            if isinstance(theirs.get(name), int):
                properties[name] = max(0, min(int(theirs[name]), most))
        content_type, content_encoding = message.get("content-type"), message.get("content-encoding")
        compressed = bool(message.get("headers") and message["headers"].get("compression"))
        if not isinstance(content_type, str | None) or not isinstance(content_encoding, str | None):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, binascii.Error):
        body, content_type, content_encoding, compressed = b"", None, None, False
        properties[_UNPARSED] = base64.b64encode(item).decode("ascii")
    return {
        "body": base64.b64encode(body).decode("ascii"),
        "content-type": content_type,
        "content-encoding": content_encoding,
        "headers": {"compression": "refused"} if compressed else {},
        "properties": {**properties, "body_encoding": "base64"},
    }


class RedisMessage(kombu_redis.Channel.Message):
    """A popped message. ``refusal`` is set where the intake refuses it; ``unparsed`` keeps its raw bytes."""

    refusal: MessageRefused | None = None
    unparsed: bytes = b""

    def __init__(self, payload: dict[str, Any], channel: Any = None, **kwargs: Any) -> None:
        """Build it from what :func:`rebuild` made."""
        self.unparsed = base64.b64decode(payload["properties"].get(_UNPARSED, ""))
        headers = dict(payload["headers"])
        self.refusal = Unparseable() if self.unparsed else strip_compression(headers)
        super().__init__({**payload, "headers": headers}, channel=channel, **kwargs)
        self._raw = payload


class _Client(redis.Redis):
    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        reply: Any = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]  # redis-py
        if command_name == "BRPOP" and reply:
            key, item = reply
            queue = key.decode("utf-8", "replace").partition(kombu_redis.Channel.sep)[0]
            return key, json.dumps(rebuild(item, queue)).encode("ascii")
        return reply


class _QoS(kombu_redis.QoS):
    """Keeps this worker's unacknowledged messages its own while it lives, so that a short timeout is enough."""

    def restore_visible(self, *args: Any, **kwargs: Any) -> Any:
        if self._delivered:
            with self.channel.conn_or_acquire() as client:
                client.zadd(self.unacked_index_key, dict.fromkeys(self._delivered, time.time()), xx=True)
        return super().restore_visible(*args, **kwargs)

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> Any:
        try:
            return super().restore_by_tag(tag, client, leftmost)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):  # another worker's entry may be anything
            return self._remove_from_indices(tag).execute()


class _Channel(kombu_redis.Channel):
    Message = RedisMessage
    QoS = _QoS
    connection_class_ssl = VerifiedSSLConnection
    supports_fanout = False

    def _get_client(self) -> Any:
        super()._get_client()  # refuses a redis-py that is too old
        return _Client

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        super()._put(queue, message, **kwargs)
        if queue.endswith((".dead", ".quarantine")):
            with self.conn_or_acquire() as client:
                client.ltrim(queue, 0, KEPT_MESSAGES - 1)

    def _do_restore_message(
        self, payload: Any, exchange: str, routing_key: str, pipe: Any, leftmost: bool = False
    ) -> None:
        deliveries = payload["properties"].get("deliveries", 1)
        payload["properties"]["deliveries"] = deliveries + 1
        if deliveries >= DELIVERY_LIMIT:
            application, _, _ = routing_key.rpartition(".")
            routing_key = f"{application}.dead"
        super()._do_restore_message(payload, "", routing_key, pipe, leftmost)


class RedisTransport(kombu_redis.Transport):
    """Redis over TLS, with the intake."""

    Channel = _Channel
