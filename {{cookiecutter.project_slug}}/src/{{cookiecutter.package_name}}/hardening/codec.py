"""JSON, the only inner format: one encoder, one strict decoder.

Guards against: a message choosing its own format (pickle by a trusted signer), and JSON that two parsers read
differently (duplicate keys, NaN).
Rests on: Celery's own marker convention for dates, decimals, UUIDs and bytes (``kombu.utils.json``), so that hardened
and plain Celery hand the same values to a task.
Controls: SER-1, SER-2, SIG-7.
"""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from typing import Any, NoReturn

from kombu.exceptions import EncodeError
from kombu.utils import json as kombu_json
from pydantic import BaseModel

from .errors import BadShape


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


def _no_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


_encode = _Encoder(separators=(",", ":"), allow_nan=False).encode
_decode = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_no_constant).decode


def encode(value: object) -> bytes:
    """Encode to compact ASCII JSON.

    Raises:
        kombu.exceptions.EncodeError: the value has no JSON form; Celery reports that to the caller or as the result.
    """
    try:
        text: str = _encode(value)
        return text.encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodeError(f"not JSON: {error}") from error


def decode(data: bytes) -> Any:
    """Decode JSON.

    Raises:
        BadShape: not UTF-8, not JSON, a duplicate key, a constant that JSON does not have, nested too deep, or a
            marked value (date, decimal, UUID) that does not parse.
    """
    try:
        return _decode(data.decode("utf-8"))
    except Exception as error:  # the decoders of marked values raise whatever their types raise
        raise BadShape(type(error).__name__) from error
