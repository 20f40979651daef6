"""The intake: whatever bytes a broker delivers, the worker goes on. Real py-amqp objects, without a network."""

from __future__ import annotations

import gzip
import struct
import time
from datetime import datetime
from typing import Any

import kombu
import pytest
from amqp import basic_message, spec
from amqp.serialization import dumps
from hypothesis import example, given
from hypothesis import strategies as st

from ...project import errors, intake

TIMESTAMP_OF_2_62 = b"\x20\x00" + struct.pack(">I", 11) + b"\x01xT" + struct.pack(">Q", 2**62)


class Wire:
    """A connection's receiving side: frames in, delivered messages out."""

    def __init__(self) -> None:
        self.connection = intake.AmqpTransport.Connection()
        self.connection.on_inbound_frame = self.connection.frame_handler_cls(
            self.connection, self.connection.on_inbound_method
        )
        self.channel = self.connection.Channel(self.connection)
        self.channel.callbacks["tag"] = self._on_message
        self._delivered: list[intake.AmqpMessage] = []

    def _on_message(self, message: Any) -> None:
        self._delivered.append(self.channel.message_to_python(message))

    def deliver(
        self, properties: bytes, body: bytes = b"body", key: bytes = b"key", exchange: bytes = b"", parts: int = 1
    ) -> intake.AmqpMessage:
        """Feed one message's frames and return what arrives."""
        number = self.channel.channel_id
        route = b"".join(bytes([len(text)]) + text for text in (exchange, key))
        arguments = struct.pack(">HH", *spec.Basic.Deliver) + dumps("sLb", ("tag", 7, True)) + route
        header = struct.pack(">HxxQ", basic_message.Message.CLASS_ID, len(body)) + properties
        feed = self.connection.on_inbound_frame
        feed((1, number, arguments))
        feed((2, number, header))
        size = -(-len(body) // parts) or 1
        for start in range(0, len(body), size):
            feed((3, number, body[start : start + size]))
        (message,) = self._delivered
        self._delivered.clear()
        return message


def _properties(**fields: Any) -> bytes:
    return basic_message.Message(**fields)._serialize_properties()


GENUINE = {"content_type": "application/jose", "content_encoding": "utf-8", "delivery_mode": 2, "priority": 3}


def _assert_intact(wire: Wire) -> None:
    """Assert that a genuine message still passes the same channel, unharmed."""
    message = wire.deliver(_properties(**GENUINE, application_headers={"task": "t"}), b"genuine", b"queue", parts=3)
    assert message.refusal is None
    assert message.unparsed == b""
    assert message.body == b"genuine"
    assert (message.content_type, message.content_encoding) == ("application/jose", "utf-8")
    assert message.headers == {"task": "t"}
    assert message.delivery_info["routing_key"] == "queue"
    assert message.delivery_tag == 7


_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | _TEXT
    | st.datetimes(datetime(1970, 1, 1)).map(lambda moment: moment.replace(microsecond=0)),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(_TEXT, values, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "content_type": _TEXT,
            "content_encoding": _TEXT,
            "application_headers": st.dictionaries(
                _TEXT.filter(lambda name: name != "compression"), _VALUE, max_size=5
            ),
            "delivery_mode": st.integers(0, 255),
            "priority": st.integers(0, 255),
            "correlation_id": _TEXT,
            "reply_to": _TEXT,
            "expiration": _TEXT,
            "message_id": _TEXT,
            "timestamp": st.integers(0, 2**64 - 1),
            "type": _TEXT,
            "user_id": _TEXT,
            "app_id": _TEXT,
            "cluster_id": _TEXT,
        },
    )
)
def test_what_parses_is_delivered_unchanged(fields: dict[str, Any]) -> None:
    message = Wire().deliver(_properties(**fields), b"\xff\x00", b"a.b", b"exchange")
    assert message.refusal is None
    assert message.properties == fields
    assert message.headers == fields.get("application_headers", {})
    assert message.body == b"\xff\x00"
    assert message.delivery_info["exchange"] == "exchange"
    assert message.delivery_info["redelivered"] is True


@given(st.binary(max_size=300), st.binary(max_size=20))
@example(TIMESTAMP_OF_2_62, b"")
@example(b"", b"x")
def test_no_properties_raise_and_the_next_message_is_intact(properties: bytes, body: bytes) -> None:
    wire = Wire()
    message = wire.deliver(properties, body)
    assert bytes(message.body or b"") == body
    if message.refusal is not None and message.refusal.code == errors.Unparseable.code:
        assert message.unparsed == properties
        assert message.properties == {}
    _assert_intact(wire)


_FIELD_TYPES = b"SsxbBUuIiLlfdDFAtTV?"


@given(st.lists(st.tuples(st.binary(max_size=5), st.sampled_from(_FIELD_TYPES), st.binary(max_size=20)), max_size=5))
def test_no_header_table_raises(entries: list[tuple[bytes, int, bytes]]) -> None:
    table = b"".join(bytes([len(name)]) + name + bytes([kind]) + value for name, kind, value in entries)
    wire = Wire()
    wire.deliver(b"\x20\x00" + struct.pack(">I", len(table)) + table)
    _assert_intact(wire)


def test_a_timestamp_of_2_to_the_62_is_delivered_as_unparseable() -> None:
    """Stock py-amqp raises OSError, which Celery takes for a lost connection (F18)."""
    with pytest.raises(OSError, match=r"out of range|too large"):
        basic_message.Message().inbound_header(struct.pack(">HxxQ", 60, 4) + TIMESTAMP_OF_2_62)
    message = Wire().deliver(TIMESTAMP_OF_2_62)
    assert isinstance(message.refusal, errors.Unparseable)
    assert message.unparsed == TIMESTAMP_OF_2_62
    assert message.body == b"body"
    assert message.headers == {}


@pytest.mark.parametrize("depth", [50, 400, 1500, 12000])
@pytest.mark.parametrize("kind", [b"F", b"A"])
def test_a_deeply_nested_header_does_not_raise(kind: bytes, depth: int) -> None:
    name = b"\x01x" if kind == b"F" else b""
    table = b""
    for _ in range(depth):
        table = name + kind + struct.pack(">I", len(table)) + table
    table = table if kind == b"F" else b"\x01x" + table
    wire = Wire()
    wire.deliver(b"\x20\x00" + struct.pack(">I", len(table)) + table)
    _assert_intact(wire)


@given(st.binary(max_size=30), st.binary(max_size=30))
@example(b"\xff", b"")
@example(b"", b"\xff")
def test_no_routing_key_raises_and_the_next_message_is_intact(key: bytes, exchange: bytes) -> None:
    wire = Wire()
    message = wire.deliver(_properties(**GENUINE), b"x", key, exchange)
    try:
        expected = (exchange.decode("utf-8", "surrogatepass"), key.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        assert isinstance(message.refusal, errors.Unparseable)
        assert message.unparsed == bytes([len(exchange)]) + exchange + bytes([len(key)]) + key
        expected = ("", "")
    assert (message.delivery_info["exchange"], message.delivery_info["routing_key"]) == expected
    assert (message.delivery_tag, message.body) == (7, b"x")
    _assert_intact(wire)


def test_bad_properties_and_a_bad_routing_key_are_both_kept() -> None:
    wire = Wire()
    assert wire.deliver(TIMESTAMP_OF_2_62, b"x", b"\xff").unparsed == b"\x00\x01\xff" + TIMESTAMP_OF_2_62
    _assert_intact(wire)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "punycode", "idna", "utf-7", "unicode_escape", "rot13", "zlib", "nonsense"]
)
def test_the_body_stays_bytes_whatever_encoding_the_message_names(encoding: str) -> None:
    message = Wire().deliver(_properties(content_encoding=encoding), b"a-b\\n")
    assert message.body == b"a-b\\n"


def test_a_punycode_body_does_not_keep_the_worker_busy() -> None:
    """Decoding it takes time in the square of its length: a minute for one megabyte, hours for sixteen."""
    wire = Wire()
    started = time.process_time()
    wire.deliver(_properties(content_encoding="punycode"), b"a" * 400_000)
    assert time.process_time() - started < 1


# --- compression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gzip", "application/x-gzip", "bzip2", "zstd", "nonsense", "", 1, True, {}, []])
def test_a_compression_header_is_removed_and_refused(method: object) -> None:
    body = gzip.compress(b"x" * 1000)
    message = Wire().deliver(_properties(application_headers={"compression": method, "other": 1}), body)
    assert isinstance(message.refusal, errors.Compressed)
    assert message.body == body
    assert message.headers == {"other": 1}
    assert message.errors == []


def test_a_compression_header_that_says_nothing_is_removed() -> None:
    message = Wire().deliver(_properties(application_headers={"compression": None}))
    assert message.refusal is None
    assert message.headers == {}


def test_the_memory_transport_refuses_compression_too() -> None:
    with intake.Connection("memory://") as connection:
        queue = connection.SimpleQueue("compressed")
        queue.put({"a": 1}, compression="gzip")
        message = queue.get(block=False)
        assert isinstance(message.refusal, errors.Compressed)
        assert message.body.startswith((b"\x1f\x8b", b"x"))
        message.ack()


# --- connections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["amqp://localhost", "pyamqp://localhost", "redis://localhost", "sentinel://localhost", "filesystem://"]
)
def test_a_transport_without_an_intake_is_refused(url: str) -> None:
    with pytest.raises(errors.ConfigurationRefused, match="there is no intake") as caught:
        _ = intake.Connection(url).transport
    assert caught.value.setting == "broker_url"


def test_amqps_has_the_intake_on_every_layer() -> None:
    connection = intake.Connection("amqps://localhost")
    assert isinstance(connection.transport, intake.AmqpTransport)
    amqp = connection.transport.Connection("localhost")
    assert amqp.frame_handler_cls is intake.frame_handler
    assert amqp.Channel.Message is intake.AmqpMessage


def test_a_clone_and_a_failover_keep_the_intake_and_each_check_their_own_host() -> None:
    options = {"server_hostname": None, "ca_certs": "ca.pem"}
    connection = intake.Connection("amqps://one.test;amqps://two.test", ssl=options)
    connection.ssl["server_hostname"] = "one.test"  # as kombu does when it connects
    assert options == {"server_hostname": None, "ca_certs": "ca.pem"}
    clone = connection.clone()
    assert clone.ssl == options
    connection.switch("amqps://two.test")
    assert connection.ssl == options
    assert connection.hostname == "two.test"
    for each in (clone, connection):
        assert isinstance(each.transport, intake.AmqpTransport)


def test_a_failover_to_a_transport_without_an_intake_is_refused() -> None:
    connection = intake.Connection("amqps://one.test")
    connection.switch("amqp://two.test")
    with pytest.raises(errors.ConfigurationRefused):
        connection.get_transport_cls()


def test_kombus_own_connection_would_keep_the_first_hosts_name() -> None:
    """What the copy is for; if this fails, kombu has changed and the copy may go."""
    options = {"server_hostname": None}
    connection = kombu.Connection("amqps://one.test", ssl=options)
    connection.ssl["server_hostname"] = "one.test"
    connection.switch("amqps://two.test")
    assert connection.ssl["server_hostname"] == "one.test"
