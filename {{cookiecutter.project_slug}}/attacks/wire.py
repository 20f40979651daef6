"""Messages as they lie on the wire, and a connection that writes any bytes there.

Below kombu and Celery on purpose: an attacker is not bound to what a client library would send.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import amqp
from amqp.basic_message import Message as BasicMessage
from amqp.exceptions import AccessRefused, NotFound

Mangle = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Message:
    """A message at rest. `properties` are AMQP's; Celery's headers are among them as `application_headers`."""

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
        """The same message under other AMQP properties; None takes one away."""
        merged = {**self.properties, **properties}
        return replace(self, properties={name: value for name, value in merged.items() if value is not None})

    def with_body(self, body: bytes, content_type: str | None = None) -> Message:
        """Another body under the same headers."""
        message = replace(self, body=body)
        return message.with_properties(content_type=content_type) if content_type else message

    def with_raw_properties(self, mangle: Mangle) -> Message:
        """Rewrite the encoded properties: what no client library would write."""
        return replace(self, mangle=mangle)


class _Frame(BasicMessage):
    """A message whose encoded properties can be rewritten on the way to the socket."""

    mangle: Mangle | None = None

    def _serialize_properties(self) -> bytes:
        encoded: bytes = super()._serialize_properties()
        return self.mangle(encoded) if self.mangle else encoded


class Wire:
    """One account's connection to the broker, over TLS with its client certificate."""

    def __init__(self, host: str, vhost: str, ca: Path, certificate: Path, key: Path) -> None:
        self._options = {
            "host": host,
            "virtual_host": vhost,
            "login_method": "EXTERNAL",
            "confirm_publish": True,
            "connect_timeout": 5,
            "read_timeout": 10,
            "ssl": {
                "ca_certs": str(ca),
                "certfile": str(certificate),
                "keyfile": str(key),
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
        """Publish and wait for the broker's confirmation; False when the account may not."""
        frame = _Frame(message.body, **message.properties)
        frame.mangle = message.mangle
        try:
            self.channel().basic_publish(frame, message.exchange, message.routing_key, mandatory=True)
        except (AccessRefused, NotFound):
            self.close()
            return False
        return True

    def depth(self, queue: str) -> int:
        """How many messages wait in a queue, those at a consumer not counted."""
        return int(self.channel().queue_declare(queue, passive=True).message_count)

    def drain(self, queue: str) -> list[Message]:
        """Take everything out of a queue."""
        taken = []
        while (got := self.channel().basic_get(queue, no_ack=True)) is not None:
            info = got.delivery_info
            body = got.body.encode() if isinstance(got.body, str) else bytes(got.body or b"")
            taken.append(Message(body, dict(got.properties), info["exchange"], info["routing_key"]))
        return taken

    def purge(self, queue: str) -> int:
        """Empty a queue, if there is one; how many messages were in it."""
        try:
            return int(self.channel().queue_purge(queue))
        except NotFound:
            self.close()
            return 0

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.collect()
        self._connection = self._channel = None
