"""JSON as the only inner format."""

from __future__ import annotations

import dataclasses
import json
import pickle
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.exceptions import EncodeError
from pydantic import BaseModel

from ...project import codec, errors


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Point:
    x: int
    when: date


class Order(BaseModel):
    id: UUID
    price: Decimal


def _refused(data: bytes) -> None:
    with pytest.raises(errors.BadShape) as caught:
        codec.decode(data)
    assert type(caught.value) is errors.BadShape


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.dates()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.binary(max_size=30),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=9), values, max_size=4),
    max_leaves=10,
)


@given(_JSON)
def test_every_value_celery_sends_survives(value: Any) -> None:
    encoded = codec.encode(value)
    assert encoded.isascii()
    assert codec.decode(encoded) == value


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ((1, 2), [1, 2]),
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        (Point(1, date(2024, 1, 2)), {"x": 1, "when": date(2024, 1, 2)}),
        (
            Order(id=UUID(int=1), price=Decimal("1.50")),
            {"id": "00000000-0000-0000-0000-000000000001", "price": "1.50"},
        ),
        ([Point(1, date(2024, 1, 2))], [{"x": 1, "when": date(2024, 1, 2)}]),
    ],
)
def test_tuples_enums_dataclasses_and_models_have_their_json_form(value: object, form: object) -> None:
    assert codec.decode(codec.encode(value)) == form


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, float("nan"), float("inf"), Point, Exception("x"), lambda: 0],
    ids=["object", "set", "NaN", "Infinity", "class", "exception", "function"],
)
def test_a_value_without_a_json_form_is_refused(value: object) -> None:
    with pytest.raises(EncodeError):
        codec.encode(value)


def test_a_value_that_holds_itself_is_refused() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(EncodeError):
        codec.encode(value)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        codec.decode(data)
    except errors.BadShape:
        return


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{}{}",
        b"\xff",
        '{"a": 1}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        pickle.dumps({"a": 1}),
        b"!!python/object/apply:os.system [id]",
        b"\x81\xa1a\x01",
        b"{'a': 1}",
        b"[1,]",
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e999",
        b"[-1e999]",
        b"9" * 5000,
    ],
)
def test_what_is_not_json_is_refused(data: bytes) -> None:
    _refused(data)


@pytest.mark.parametrize("data", [b'{"a":1,"a":2}', b'{"x":{"a":1,"b":2,"a":1}}', b'[{"a":1,"\\u0061":2}]'])
def test_a_duplicate_key_is_refused_at_any_depth(data: bytes) -> None:
    assert json.loads(data)
    _refused(data)


@pytest.mark.parametrize(
    "marked",
    [
        {"__type__": "datetime", "__value__": "yesterday"},
        {"__type__": "uuid", "__value__": "x"},
        {"__type__": "decimal", "__value__": "x"},
        {"__type__": "datetime", "__value__": 1},
        {"__type__": "os.system", "__value__": "id"},
        {"__type__": ["datetime"], "__value__": "x"},
        {"__type__": "base64", "__value__": "x"},
    ],
)
def test_a_marked_value_that_does_not_parse_is_refused(marked: object) -> None:
    _refused(json.dumps({"args": [marked]}).encode())


@pytest.mark.parametrize("value", [datetime.now(UTC), time(1, 2), date.today(), Decimal("0.1"), uuid4(), b"\xff\x00"])
def test_types_that_json_has_not_come_back_as_themselves(value: object) -> None:
    decoded = codec.decode(codec.encode(value))
    assert (type(decoded), decoded) == (type(value), value)


def test_a_duration_has_no_json_form_of_its_own() -> None:
    with pytest.raises(EncodeError):
        codec.encode(timedelta(seconds=1))


@pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
def test_nesting_is_limited(pair: tuple[bytes, bytes]) -> None:
    def nested(levels: int) -> bytes:
        return pair[0] * levels + b"1" + pair[1] * levels

    step = len(pair[0]) // 6 + 1
    allowed = codec.DEPTH_MAX // step - 1
    codec.decode(nested(allowed))
    for levels in (allowed + 2, 300, 900, 100_000):
        _refused(nested(levels))


def test_brackets_in_texts_and_wide_values_are_no_nesting() -> None:
    for value in ("[" * 1000, [[]] * 1000, [{"a": "{"}] * 1000):
        assert codec.decode(codec.encode(value)) == value


def test_the_number_of_values_is_limited() -> None:
    """Each takes many times its bytes in memory; a worker may hold many messages."""
    assert codec.decode(b"[" + b"0," * codec.VALUES_MAX + b"0]")
    _refused(b"[" + b"0," * codec.VALUES_MAX + b"0,0]")
