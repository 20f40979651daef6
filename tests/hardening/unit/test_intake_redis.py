"""Whatever lies in a Redis list becomes a message that kombu can deliver, with nothing in it that its sender chose.

So does what comes on a channel, unless who waited for it has gone.
"""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.transport import virtual

from ...project import errors, intake_redis

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
#: What looks like a message, with anything anywhere.
messages = st.fixed_dictionaries(
    {},
    optional={
        "body": st.text() | json_values,
        "content-type": st.text() | json_values,
        "content-encoding": st.text() | json_values,
        "headers": st.dictionaries(st.sampled_from(["compression", "redelivered", "id"]), json_values) | json_values,
        "properties": json_values
        | st.dictionaries(
            st.sampled_from(["body_encoding", "delivery_tag", "delivery_info", "priority", "deliveries", "unparsed"]),
            json_values | st.just("base64"),
        ),
    },
)


def rebuilt(item: bytes) -> dict[str, Any]:
    """Rebuild an item and check what holds for each: it travels as JSON, and kombu's own class takes it."""
    message = intake_redis.rebuild(item, "shop.default")
    message = json.loads(json.dumps(message).encode("ascii"))
    assert message.keys() == {"body", "content-type", "content-encoding", "headers", "properties"}
    assert message["headers"] in ({}, {"compression": "refused"})
    properties = message["properties"]
    assert properties.keys() - {"unparsed"} == {
        *("delivery_tag", "delivery_info", "priority", "deliveries", "body_encoding")
    }
    assert properties["delivery_info"] == {"exchange": "", "routing_key": "shop.default"}
    assert 0 <= properties["priority"] <= 9
    assert properties["deliveries"] >= 1
    assert properties["body_encoding"] == "base64"
    return message


class _Channel:
    """What kombu's message asks of its channel."""

    decode_body = staticmethod(lambda body, encoding: virtual.Base64().decode(body))


def deliver(message: dict[str, Any]) -> intake_redis.RedisMessage:
    return intake_redis.RedisMessage(message, _Channel())


@given(item=st.binary() | json_values.map(json.dumps).map(str.encode) | messages.map(json.dumps).map(str.encode))
def test_anything_becomes_a_message(item: bytes) -> None:
    message = rebuilt(item)
    again = rebuilt(item)
    assert message["properties"]["delivery_tag"] != again["properties"]["delivery_tag"]
    delivered = deliver(message)
    assert isinstance(delivered.refusal, errors.MessageRefused | None)
    if isinstance(delivered.refusal, errors.Unparseable):
        assert (delivered.unparsed, delivered.body) == (item, b"")


@pytest.mark.parametrize(
    "item", [b"", b"garbage", b"[1]", b"7", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b"9" * 5000]
)
def test_what_is_no_message_is_kept_as_it_was(item: bytes) -> None:
    delivered = deliver(rebuilt(item))
    assert delivered.unparsed == item
    assert isinstance(delivered.refusal, errors.Unparseable)


def genuine(**properties: Any) -> dict[str, Any]:
    return {
        "body": base64.b64encode(b"signed").decode(),
        "content-type": "application/jose",
        "content-encoding": "utf-8",
        "headers": {"id": "1", "redelivered": True},
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": "chosen",
            "delivery_info": {"exchange": "x", "routing_key": "elsewhere", "redelivered": True},
            **properties,
        },
    }


def test_only_body_type_and_encoding_survive() -> None:
    message = rebuilt(json.dumps(genuine(reply_to="elsewhere", correlation_id="7")).encode())
    delivered = deliver(message)
    assert (delivered.refusal, delivered.body, delivered.content_type) == (None, b"signed", "application/jose")
    assert base64.b64decode(message["body"]) == b"signed"
    assert message["headers"] == {}
    assert message["properties"]["delivery_tag"] != "chosen"


@pytest.mark.parametrize(
    ("said", "taken"), [(None, 1), (1, 1), (4, 4), (0, 1), (-9, 1), (10**30, 1000), ("4", 1), (True, 1), ([4], 1)]
)
def test_a_count_of_deliveries_is_kept_within_bounds(said: object, taken: int) -> None:
    assert rebuilt(json.dumps(genuine(deliveries=said)).encode())["properties"]["deliveries"] == taken


def test_a_compression_is_refused_and_not_undone() -> None:
    compressed = genuine()
    compressed["headers"]["compression"] = "application/x-gzip"
    delivered = deliver(rebuilt(json.dumps(compressed).encode()))
    assert isinstance(delivered.refusal, errors.Compressed)


@pytest.mark.parametrize(("length", "kept"), [(1, 10_000), (1_000, 10_000), (65_536, 1024), (2**21, 32), (2**26, 1)])
def test_of_long_messages_fewer_are_kept(length: int, kept: int) -> None:
    assert intake_redis._last("x" * length) == kept - 1


@pytest.fixture
def channel() -> Any:
    return object.__new__(intake_redis._Channel)


@pytest.mark.parametrize("item", [b"garbage", b"[1]", b"\xff", b'{"__type__":"uuid","__value__":1}', b"[" * 50_000])
def test_whatever_comes_on_a_channel_becomes_a_message_that_is_refused(channel: Any, item: bytes) -> None:
    handled = channel._handle_message(None, [b"pmessage", b"pattern", b"/.x", item])
    decoder = SimpleNamespace(decode_body=lambda *_: b"")
    message = intake_redis.RedisMessage(json.loads(handled["data"]), channel=decoder)
    assert isinstance(message.refusal, errors.Unparseable)
    assert message.unparsed == item


def test_what_comes_on_a_channel_after_its_consumer_has_gone_is_dropped(channel: Any) -> None:
    channel._fanout_to_queue = {}
    assert not channel._deliver_fanout_message({}, "gone")
