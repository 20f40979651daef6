"""The intake: the transport, made unable to fail on what it delivers.

Guards against: messages that kill the worker or loop for ever before any consumer code runs. An AMQP timestamp of 2^62
in a header raises OSError in the parser, which Celery takes for a lost connection; a routing key that is no UTF-8 ends
the worker; a ``compression`` header expands 290 KB to a gigabyte, or loses the message when its method is unknown; a
content encoding of ``punycode`` keeps the worker busy for a minute per megabyte of body.
Also here: what Celery has to be told for RabbitMQ. No account may declare anything (where an operator can see to that),
and nothing is published to the default exchange, which reaches every queue.
Rests on: every message passing py-amqp's frame handler and the channel's ``Message`` class. What cannot be parsed is
delivered without its properties and carries its refusal; the gate quarantines it. Bodies stay bytes.
Controls: INT-1, SER-3, TLS-1, BRK-1, BRK-6, BRK-7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from struct import pack
from typing import Any, ClassVar

import kombu.connection
from amqp import basic_message, method_framing, spec
from amqp.exceptions import ChannelError, NotFound
from amqp.serialization import loads
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from kombu.transport import memory, pyamqp
from kombu.utils.imports import symbol_by_name

from .errors import Compressed, ConfigurationRefused, MessageRefused, Unparseable
from .identity import Identity
from .settings import PREFIX, Settings
from .topology import Topology

#: Seconds to wait for the broker to confirm a message.
CONFIRM_TIMEOUT = 10
_METHOD, _CONTENT_HEADER = 1, 2  # AMQP 0-9-1 section 4.2.3, frame types
_DELIVER = pack(">HH", *spec.Basic.Deliver)
_PROPERTIES = 12  # bytes before the property flags: class, weight, body size


def frame_handler(connection: Any, callback: Callable[..., None]) -> Callable[[Any], Any]:
    """Wrap py-amqp's frame handler: what of a delivery does not parse is left out of it instead of raising."""
    unparsed: dict[int, bytes] = {}

    def on_method(channel: int, method: Any, arguments: bytes, content: Any) -> None:
        if content is not None and channel in unparsed:
            content.unparsed = unparsed.pop(channel)
        callback(channel, method, arguments, content)

    on_frame = method_framing.frame_handler(connection, on_method)

    def on_checked_frame(frame: tuple[int, int, Any]) -> Any:
        kind, channel, payload = frame
        if kind == _CONTENT_HEADER:
            parsable = _parses(basic_message.Message().inbound_header, payload)
            rest = _PROPERTIES
        elif kind == _METHOD and payload[:4] == _DELIVER:
            parsable = _parses(loads, "sLbss", payload, 4)
            rest = 4 + 1 + payload[4] + 8 + 1  # method, consumer tag (ours), delivery tag, redelivered flag
        else:
            return on_frame(frame)
        if not parsable:
            # Two zero bytes are no properties in a header, and an empty exchange and routing key in a delivery.
            unparsed[channel] = unparsed.get(channel, b"") + bytes(payload[rest:])
            payload = bytes(payload[:rest]) + b"\0\0"
        return on_frame((kind, channel, payload))

    return on_checked_frame


def _parses(parser: Callable[..., Any], *arguments: Any) -> bool:
    """Whether it does; a routing key may be any bytes, too, and a topic binding may match them."""
    try:
        parser(*arguments)
    except Exception:  # struct.error, OSError, OverflowError, UnicodeDecodeError ...: whatever a parser raises
        return False
    return True


class AmqpMessage(pyamqp.Message):
    """A delivered message. ``refusal`` is set where the intake refuses it; ``unparsed`` keeps properties' raw bytes."""

    def __init__(self, msg: Any, channel: Any = None, **kwargs: Any) -> None:
        """Build it; never raises on what the message holds."""
        self.unparsed = getattr(msg, "unparsed", b"")
        self.refusal = Unparseable() if self.unparsed else strip_compression(msg.properties.get("application_headers"))
        super().__init__(msg, channel=channel, **kwargs)


class _AmqpChannel(pyamqp.Channel):
    Message = AmqpMessage

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Decoding a body would let the message choose the codec, before anything of it is checked.
        super().__init__(*args, **{**kwargs, "auto_decode": False})

    def basic_publish_confirm(self, *args: Any, **kwargs: Any) -> Any:
        """Publish, and wait until the broker has confirmed the message or said that it cannot route it.

        Raises:
            ConfigurationRefused: the exchange does not exist.
            amqp.exceptions.ChannelError: it cannot be routed. The broker confirms such a message after returning it;
                py-amqp raises at once, and leaves the confirmation to the next message, which may not deserve it.
            kombu.exceptions.OperationalError: no answer. A broker short of memory or disk stops reading.
        """
        if kwargs.get("confirm_timeout") == 0:  # for what must not keep the worker waiting
            return self._basic_publish(*args, **kwargs)
        returned: list[Exception] = []

        def on_return(error: Exception, *_: Any) -> None:
            returned.append(error)

        handlers = self.events["basic_return"]
        handlers.add(on_return)
        timeout = kwargs.pop("confirm_timeout", None) or CONFIRM_TIMEOUT
        try:
            confirmed = super().basic_publish_confirm(*args, confirm_timeout=timeout, **kwargs)
        except NotFound as error:
            reason = f"the broker there has not been told what topology.toml says ({error.reply_text})"
            fix = f"load the operator's definitions; with {PREFIX}BROKER_TOPOLOGY=app, start a worker first"
            raise ConfigurationRefused(PREFIX + "BROKER_URL", reason, fix, "config.topology") from error
        except TimeoutError:
            self.connection.collect()  # a late answer would count for the next message
            raise OperationalError(f"the broker has not confirmed the message in {timeout} s") from None
        finally:
            handlers.discard(on_return)
        if returned:
            raise returned[0]
        return confirmed


class _AmqpConnection(pyamqp.Connection):
    Channel = _AmqpChannel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "frame_handler": frame_handler})


class AmqpTransport(pyamqp.SSLTransport):
    """AMQP over TLS, with the intake."""

    Connection = _AmqpConnection


class MemoryMessage(memory.Channel.Message):
    """A message of the in-memory transport."""

    unparsed = b""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        """Build it."""
        self.refusal = strip_compression(payload.get("headers"))
        super().__init__(payload, channel=channel, **kwargs)


class _MemoryChannel(memory.Channel):
    Message = MemoryMessage


class MemoryTransport(memory.Transport):
    """kombu's in-memory transport, with the intake; only tests may use it (see ``Settings.broker_schemes``)."""

    Channel = _MemoryChannel


class Connection(kombu.Connection):
    """A broker connection that only ever uses a transport with the intake, also after a failover."""

    ssl: Any
    transports: ClassVar[dict[str, str]] = {
        "amqps": f"{__name__}:AmqpTransport",
        "rediss": f"{__name__}_redis:RedisTransport",
        "memory": f"{__name__}:MemoryTransport",
    }

    def get_transport_cls(self) -> type:
        """Return the transport for the URL's scheme.

        Raises:
            ConfigurationRefused: there is none with an intake.
        """
        if self.transport_cls not in self.transports:
            reason = f"there is no intake for {self.transport_cls}://"
            raise ConfigurationRefused("broker_url", reason, "use amqps:// or rediss://", "config.tls")
        transport: type = symbol_by_name(self.transports[self.transport_cls])
        return transport

    def _init_params(self, *args: Any, **kwargs: Any) -> None:
        super()._init_params(*args, **kwargs)
        if isinstance(self.ssl, dict) and self.transport_cls == "amqps":
            # kombu writes the first broker's name into the dict, and would check every other broker against it.
            self.ssl = {**self.ssl, "server_hostname": None}

    def Pool(self, limit: int | None = None, **kwargs: Any) -> kombu.connection.ConnectionPool:  # noqa: N802  # kombu's name
        """Return a pool of connections like this one; kombu's own makes connections of its own class."""
        return _Pool(self, limit, **kwargs)


class _PooledConnection(kombu.connection.PooledConnection, Connection):
    pass


class _Pool(kombu.connection.ConnectionPool):
    def new(self) -> _PooledConnection:
        return _PooledConnection(self, **dict(self.connection._info(resolve=False)))


class RabbitMQ:
    """A topic exchange of the application's own, quorum queues, login by certificate, confirmed publishing."""

    def __init__(self, settings: Settings, topology: Topology, own: Identity) -> None:
        self._settings, self._topology, self._own = settings, topology, own
        self.exchange, self.quarantine_exchange = topology.exchange, topology.quarantine
        # Seconds before its time that a message may come: delays are of whole ones. A test's memory keeps nothing back.
        self.early = 2 if settings.broker_url.startswith("amqps:") else settings.message_max_delay

    def configuration(self) -> dict[str, Any]:
        """Return the Celery settings that must hold."""
        exchange = Exchange(self.exchange, type="topic", no_declare=True)
        return {
            **address(self._settings.broker_address),
            "broker_use_ssl": self._settings.broker_tls.amqp(),
            # EXTERNAL is by certificate; the name is only for logs.
            "broker_login_method": "PLAIN" if self._settings.broker_auth == "password" else "EXTERNAL",
            "broker_user": self._topology.account(self._own.account),
            "broker_transport_options": {"confirm_publish": True},
            **queues(self._topology, exchange, {"x-queue-type": "quorum"}),
            "worker_detect_quorum_queues": True,
        }

    def declare(self, connection: Any) -> None:
        """Make the operator's definitions, but for accounts and rights; what is there already must be the same.

        Raises:
            ConfigurationRefused: ``config.topology``; the broker says what differs, or that the account may not.
        """
        if self._settings.broker_topology != "app":
            return
        from .render import definitions  # a program too, which Python wants to load only once

        document = definitions(self._topology)
        with connection.channel() as channel:
            try:
                for exchange in document["exchanges"]:
                    name, kind, durable = exchange["name"], exchange["type"], exchange["durable"]
                    channel.exchange_declare(name, kind, durable=durable, auto_delete=False)
                for queue in document["queues"]:
                    arguments = {**queue["arguments"], **_limits(queue["name"], document["policies"])}
                    channel.queue_declare(queue["name"], durable=True, auto_delete=False, arguments=arguments)
                for binding in document["bindings"]:
                    bind = channel.queue_bind if binding["destination_type"] == "queue" else channel.exchange_bind
                    bind(binding["destination"], binding["source"], binding["routing_key"])
            except ChannelError as error:
                reason = f"the broker refuses to make what topology.toml says ({error.reply_text})"
                fix = "delete what differs once it is empty, or give the account the right"
                raise ConfigurationRefused(PREFIX + "BROKER_TOPOLOGY", reason, fix, "config.topology") from error

    def broadcast(self, what: str, kind: str) -> Exchange:
        """Return an exchange that the operator has declared."""
        return Exchange(self._topology.celery(what), kind, no_declare=True)

    def quarantined(self, connection: Any) -> Iterator[tuple[bytes, Callable[[], Any]]]:
        """Yield each record in the quarantine, with what removes it; the others are put back with the channel's end."""
        with connection.channel() as channel:
            left = None  # what comes meanwhile is not looked at
            while left != 0 and (message := channel.basic_get(self._topology.quarantine)) is not None:
                left = message.delivery_info.get("message_count") if left is None else left - 1
                yield bytes(message.body), partial(channel.basic_ack, message.delivery_tag)


def _limits(queue: str, policies: list[dict[str, Any]]) -> dict[str, Any]:
    """The policies of a queue as its arguments: an application cannot make policies."""
    matching = [policy["definition"] for policy in policies if re.search(policy["pattern"], queue)]
    return {f"x-{name}": value for definition in matching for name, value in definition.items()}


def address(url: str) -> dict[str, Any]:
    """The broker's address, for every use that Celery knows."""
    return dict.fromkeys(("broker_url", "broker_read_url", "broker_write_url"), url)


def queues(topology: Topology, exchange: Exchange, arguments: dict[str, Any] | None) -> dict[str, Any]:
    """Declared by the operator (topology.toml); no account may declare anything."""
    options = {"exchange": exchange, "queue_arguments": arguments, "no_declare": True}
    names = [(queue.broker_name, queue.name) for queue in topology.queues]
    return {
        "task_queues": [Queue(name, routing_key=name, alias=alias, **options) for name, alias in names],
        "task_default_exchange": exchange.name,
        "task_default_exchange_type": exchange.type,
        "task_create_missing_queues": False,
    }


def strip_compression(headers: Any) -> MessageRefused | None:
    """Remove what would make kombu decompress the body, and say that it was there."""
    if isinstance(headers, dict) and headers.pop("compression", None) is not None:
        return Compressed()
    return None
