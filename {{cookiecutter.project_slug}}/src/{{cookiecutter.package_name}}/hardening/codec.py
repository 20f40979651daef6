"""JSON, the only inner format: one encoder, one strict decoder.

Guards against: a message choosing its own format (pickle by a trusted signer), and JSON that two parsers read
differently (duplicate keys, NaN), or that is nested so deep that Celery's own code runs out of stack.
Rests on: Celery's own marker convention for dates, decimals, UUIDs and bytes (``kombu.utils.json``), so that hardened
and plain Celery hand the same values to a task.
Controls: SER-1, SER-2, SIG-7.
"""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from math import isfinite
from typing import Any

from kombu.exceptions import EncodeError
from kombu.utils import json as kombu_json
from pydantic import BaseModel

from .errors import BadShape

#: How deep lists and objects may be nested.
DEPTH_MAX = 100
#: Most values in one JSON text, as counted by its commas: each takes many times its bytes in memory.
VALUES_MAX = 50_000


class _Encoder(kombu_json.JSONEncoder):
    def default(self, o: Any) -> Any:
        if isinstance(o, BaseModel):
            return o.model_dump(mode="json")
        if dataclasses.is_dataclass(o) and not isinstance(o, type):
            return {field.name: getattr(o, field.name) for field in dataclasses.fields(o)}
        if isinstance(o, Enum):
            return o.value
        return super().default(o)


def _pairs(pairs: list[tuple[str, Any]]) -> Any:
    decoded = dict(pairs)
    if len(decoded) != len(pairs):
        raise ValueError("duplicate key")
    return kombu_json.object_hook(decoded)


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):  # NaN and Infinity are not JSON; 1e999 could not be encoded again, by a retry for example
        raise ValueError("not a finite number")
    return value


def _limit_depth(value: Any, depth: int = 0) -> None:
    if depth == DEPTH_MAX:
        raise ValueError("nested too deep")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _limit_depth(item, depth + 1)


_encode = _Encoder(separators=(",", ":"), allow_nan=False).encode
_decode = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_finite, parse_constant=_finite).decode


def encode(value: object) -> bytes:
    """Encode to compact ASCII JSON.

    Raises:
        kombu.exceptions.EncodeError: the value has no JSON form; Celery reports that to the caller or as the result.
    """
    try:
        return str(_encode(value)).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodeError(f"not JSON: {error}") from error


def decode(data: bytes) -> Any:
    """Decode JSON.

    Raises:
        BadShape: not UTF-8, not JSON, a duplicate key, a number or constant that JSON does not have, nested deeper
            than :data:`DEPTH_MAX`, more than :data:`VALUES_MAX` values, or a marked value (date, decimal,
            UUID) that does not parse.
    """
    try:
        if data.count(b",") > VALUES_MAX:
            raise ValueError("too many values")
        value = _decode(data.decode("utf-8"))
        if data.count(b"[") + data.count(b"{") > DEPTH_MAX:  # with fewer it cannot be that deep
            _limit_depth(value)
        return value
    except Exception as error:  # the decoders of marked values raise whatever their types raise
        raise BadShape(type(error).__name__) from error
