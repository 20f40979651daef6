"""Messages as they lie on the wire, and connections that write any bytes there: AMQP's, and Redis's lists.

Below kombu and Celery on purpose: an attacker is not bound to what a client library would send. On Redis a message is
what somebody pushed onto a list, and kombu's JSON envelope is a habit, not a rule.
"""

from __future__ import annotations

import base64
import json
import ssl
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import amqp
import kombu
import redis
from amqp.basic_message import Message as BasicMessage
from amqp.exceptions import AccessRefused, NotFound

from stack.pki import Pair

Mangle = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Message:
    """A message at rest. `properties` have AMQP's names; Celery's headers are among them as `application_headers`."""

    body: bytes
    properties: dict[str, Any]
    exchange: str
    routing_key: str
    task_id: str = ""
    mangle: Mangle | None = field(default=None, compare=False)

    @property
    def headers(self) -> dict[str, Any]:
        """Celery's message headers."""
        return dict(self.properties.get("application_headers") or {})

    def with_headers(self, /, **headers: Any) -> Message:
        """The same message under other headers; the body, and any signature in it, stays as it is."""
        return self.with_properties(application_headers={**self.headers, **headers})

    def without_headers(self, *names: str) -> Message:
        """The same message, some headers gone."""
        kept = {name: value for name, value in self.headers.items() if name not in names}
        return self.with_properties(application_headers=kept)

    def with_properties(self, **properties: Any) -> Message:
        """The same message under other properties; None takes one away."""
        merged = {**self.properties, **properties}
        return replace(self, properties={name: value for name, value in merged.items() if value is not None})

    def with_body(self, body: bytes, content_type: str | None = None) -> Message:
        """Another body under the same headers."""
        message = replace(self, body=body)
        return message.with_properties(content_type=content_type) if content_type else message

    def rewritten(self, mangle: Mangle) -> Message:
        """Rewrite what is sent, as no client library would: AMQP's encoded properties, or all of Redis's item."""
        return replace(self, mangle=mangle)


class Wire(ABC):
    """One account's connection to the broker, over TLS with its client certificate."""

    @abstractmethod
    def publish(self, message: Message) -> bool:
        """Publish and wait until the broker has it; False when the account may not."""

    @abstractmethod
    def seen(self, message: Any, exchange: str, routing_key: str) -> Message:
        """A message that kombu is about to hand to this broker."""

    @abstractmethod
    def declare(self, queue: str) -> None:
        """Make a queue, where queues have to be made."""

    @abstractmethod
    def depth(self, queue: str) -> int:
        """How many messages wait in a queue, those at a consumer not counted."""

    @abstractmethod
    def drain(self, queue: str) -> list[Message]:
        """Take everything out of a queue. Raises `PermissionError`."""

    @abstractmethod
    def purge(self, queue: str) -> int:
        """Empty a queue, if there is one; how many messages were in it."""

    @abstractmethod
    def connection(self, kind: type[kombu.Connection] = kombu.Connection) -> kombu.Connection:
        """A connection of kombu's, or of an application's own kind, with the same rights; for what is no task."""

    @abstractmethod
    def close(self) -> None:
        """End the connection."""


class _Frame(BasicMessage):
    """A message whose encoded properties can be rewritten on the way to the socket."""

    mangle: Mangle | None = None

    def _serialize_properties(self) -> bytes:
        encoded: bytes = super()._serialize_properties()
        return self.mangle(encoded) if self.mangle else encoded


class Amqp(Wire):
    """RabbitMQ; the certificate names the account."""

    def __init__(self, host: str, vhost: str, ca: Path, client: Pair) -> None:
        self._options = {
            "host": host,
            "virtual_host": vhost,
            "login_method": "EXTERNAL",
            "confirm_publish": True,
            "connect_timeout": 5,
            "read_timeout": 10,
            "ssl": {
                "ca_certs": str(ca),
                "certfile": str(client.certificate),
                "keyfile": str(client.key),
                "cert_reqs": ssl.CERT_REQUIRED,
                "server_hostname": host.rpartition(":")[0],
            },
        }
        self._connection: Any = None
        self._channel: Any = None

    def channel(self) -> Any:
        """An open channel; a refusal by the broker closes the old one."""
        if self._connection is None or not self._connection.connected:
            self._connection = amqp.Connection(**self._options)
            self._connection.connect()
            self._channel = None
        if self._channel is None or not self._channel.is_open:
            self._channel = self._connection.channel()
        return self._channel

    def publish(self, message: Message) -> bool:
        """See `Wire`."""
        frame = _Frame(message.body, **message.properties)
        frame.mangle = message.mangle
        try:
            self.channel().basic_publish(frame, message.exchange, message.routing_key, mandatory=True)
        except (AccessRefused, NotFound):
            self.close()
            return False
        return True

    def seen(self, message: Any, exchange: str, routing_key: str) -> Message:
        """See `Wire`."""
        body = message.body if isinstance(message.body, bytes) else message.body.encode()
        return Message(body, dict(message.properties), exchange, routing_key)

    def declare(self, queue: str) -> None:
        """See `Wire`."""
        self.channel().queue_declare(queue, durable=True, auto_delete=False)

    def depth(self, queue: str) -> int:
        """See `Wire`."""
        return int(self.channel().queue_declare(queue, passive=True).message_count)

    def drain(self, queue: str) -> list[Message]:
        """See `Wire`."""
        taken = []
        try:
            while (got := self.channel().basic_get(queue, no_ack=True)) is not None:
                info = got.delivery_info
                body = got.body.encode() if isinstance(got.body, str) else bytes(got.body or b"")
                taken.append(Message(body, dict(got.properties), info["exchange"], info["routing_key"]))
        except AccessRefused as error:
            self.close()
            raise PermissionError from error
        return taken

    def purge(self, queue: str) -> int:
        """See `Wire`."""
        try:
            return int(self.channel().queue_purge(queue))
        except NotFound:
            self.close()
            return 0

    def connection(self, kind: type[kombu.Connection] = kombu.Connection) -> kombu.Connection:
        """See `Wire`."""
        options = self._options
        return kind(
            f"amqps://{options['host']}/{options['virtual_host']}",
            login_method="EXTERNAL",
            ssl=options["ssl"],
            transport_options={"confirm_publish": True},
        )

    def close(self) -> None:
        """See `Wire`."""
        if self._connection is not None:
            self._connection.collect()
        self._connection = self._channel = None


class Redis(Wire):
    """Redis, where a queue is a list, and a broadcast goes to a channel.

    `held` are the keys of what workers have taken and not acknowledged; with `broadcasts` channels' names begin.
    """

    def __init__(
        self,
        host: str,
        database: str,
        ca: Path,
        client: Pair,
        account: str,
        password: str,
        held: tuple[str, str],
        broadcasts: str,
    ) -> None:
        self._url = f"rediss://{account}:{password}@{host}/{database}"
        self._tls = {
            "ssl_ca_certs": str(ca),
            "ssl_certfile": str(client.certificate),
            "ssl_keyfile": str(client.key),
            "ssl_cert_reqs": ssl.CERT_REQUIRED,
            "ssl_check_hostname": True,
        }
        self.held, self.since = held
        self._broadcasts = broadcasts
        self.client: Any = redis.Redis.from_url(self._url, **self._tls)

    def publish(self, message: Message) -> bool:
        """Push it onto the list of its routing key."""
        properties = dict(message.properties)
        envelope = {
            "body": base64.b64encode(message.body).decode(),
            "content-type": properties.pop("content_type", None),
            "content-encoding": properties.pop("content_encoding", None),
            "headers": properties.pop("application_headers", {}),
            "properties": {
                "delivery_tag": str(uuid.uuid4()),
                "delivery_info": {"exchange": message.exchange, "routing_key": message.routing_key},
                "priority": 0,
                "body_encoding": "base64",
                **properties,
            },
        }
        item = json.dumps(envelope).encode()
        try:
            self.client.lpush(message.routing_key, message.mangle(item) if message.mangle else item)
        except redis.exceptions.NoPermissionError:
            return False
        return True

    def seen(self, message: Any, exchange: str, routing_key: str) -> Message:
        """See `Wire`."""
        body = message["body"] if isinstance(message["body"], bytes) else message["body"].encode()
        properties = {name: value for name, value in message["properties"].items() if name != "delivery_info"}
        properties |= {
            "content_type": message["content-type"],
            "content_encoding": message["content-encoding"],
            "application_headers": message["headers"],
            "delivery_tag": str(uuid.uuid4()),
        }
        return Message(body, properties, exchange, routing_key)

    def declare(self, queue: str) -> None:
        """A list is there once something is pushed onto it."""

    def depth(self, queue: str) -> int:
        """See `Wire`."""
        return int(self.client.llen(queue))

    def drain(self, queue: str) -> list[Message]:
        """See `Wire`."""
        taken = []
        try:
            while (item := self.client.rpop(queue)) is not None:
                taken.append(_parsed(json.loads(item), queue))
        except redis.exceptions.NoPermissionError as error:
            raise PermissionError from error
        return taken

    def purge(self, queue: str) -> int:
        """See `Wire`."""
        waiting = self.depth(queue)
        self.client.delete(queue)
        return waiting

    def holds(self, message: Message) -> bool:
        """Whether Redis knows that a worker has this message, and would give it to another."""
        held = (json.loads(entry) for entry in self.client.hvals(self.held))
        return any(_parsed(payload, "").body == message.body for payload, *_ in held)

    def hold(self, entry: str) -> None:
        """Write down that a worker has held this for ever."""
        self.client.hset(self.held, "tag", entry)
        self.client.zadd(self.since, {"tag": 1})

    def tags(self) -> list[str]:
        """The delivery tags of what workers hold."""
        return [tag.decode() for tag in self.client.hkeys(self.held)]

    def forget_held(self) -> None:
        """Forget what workers hold that are gone."""
        self.client.delete(self.held, self.since)

    def connection(self, kind: type[kombu.Connection] = kombu.Connection) -> kombu.Connection:
        """See `Wire`."""
        return kind(self._url, ssl=self._tls, transport_options={"fanout_prefix": self._broadcasts})

    def close(self) -> None:
        """See `Wire`."""
        self.client.close()


def _parsed(payload: dict[str, Any], queue: str) -> Message:
    properties = payload["properties"]
    body = payload["body"]
    encoded = properties.get("body_encoding") == "base64"
    return Message(base64.b64decode(body) if encoded else body.encode(), {}, "", queue)
