"""What a task message signs: every field Celery acts on, as one set of claims.

Guards against: headers, properties and ``embed`` keys changed or added after signing. Claims *replace* what arrived;
nothing is compared, so nothing can be forgotten in a comparison.
Rests on: RFC 7519 names for the registered claims; Celery's message protocol 2 for the rest.
Controls: SIG-3, SIG-4.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from . import codec
from .errors import BadShape

Text = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
#: A header of the caller's own (tracing, for example). Celery's context turns keys into attributes, so they stay apart.
Custom = dict[Text, str | int | float | bool | None]

_PLAIN = re.compile(r"[A-Za-z0-9_]{1,40}")
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


class Task(BaseModel):
    """Celery's own fields of a task message; named as in message protocol 2."""

    model_config = _STRICT

    name: Text
    id: Text
    root_id: Text | None = None
    parent_id: Text | None = None
    group: Text | None = None
    group_index: Annotated[int, Field(ge=0)] | None = None
    eta: Text | None = None
    expires: Text | None = None
    retries: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    timelimit: tuple[Seconds | None, Seconds | None] = Field(default=(None, None), strict=False)
    shadow: Text | None = None
    reply_to: Text | None = None
    correlation_id: Text | None = None
    priority: Annotated[int, Field(ge=0, le=255)] | None = None
    ignore_result: bool | None = None
    replaced_task_nesting: Annotated[int, Field(ge=0, le=1000)] = 0
    stamped_headers: list[Text] | None = None
    stamps: dict[Text, Any] | None = None
    headers: Custom = {}


class Embed(BaseModel):
    """The four canvas keys; a fifth would be spread over the request by Celery's tracer."""

    model_config = _STRICT

    callbacks: list[Any] | None = None
    errbacks: list[Any] | None = None
    chain: list[Any] | None = None
    chord: Any = None


class TaskClaims(BaseModel):
    """The payload of a task envelope.

    ``iat`` and ``exp`` are whole seconds since the epoch. ``iss`` signs now; ``origin`` is on whose behalf,
    ``owner`` whose ids these are; they differ from ``iss`` only where a worker sends for a message (see ``ownership``).
    """

    model_config = _STRICT

    iss: Text
    aud: Text
    iat: int
    exp: int
    jti: Text
    origin: Text
    owner: Text
    queue: Text
    task: Task
    args: list[Any]
    kwargs: dict[str, Any]
    embed: Embed

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Parse a verified payload.

        Raises:
            BadShape: it is not exactly these claims. The error names the places, never the values.
        """
        try:
            claims = cls.model_validate(codec.decode(payload))
        except ValidationError as error:
            raise BadShape(places(error)) from None
        for moment in (claims.task.eta, claims.task.expires):
            if moment is not None:
                timestamp(moment)
        return claims


#: Celery's header names that are claims under the same name.
_HEADERS = tuple(
    name for name in Task.model_fields if name not in {"name", "headers", "reply_to", "correlation_id", "priority"}
)
#: Headers Celery writes itself and that are not worth signing: they inform nobody but a log.
_DROPPED = frozenset({"lang", "task", "argsrepr", "kwargsrepr", "origin", "compression"})


def task_fields(headers: Mapping[str, Any], properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``task`` claim for a message that Celery is about to publish."""
    fields = {name: headers[name] for name in _HEADERS if headers.get(name) is not None}
    fields["name"] = headers["task"]
    for name in ("reply_to", "correlation_id", "priority"):
        if properties.get(name) not in {None, ""}:
            fields[name] = properties[name]
    stamps = set(headers.get("stamped_headers") or ())
    fields["headers"] = {
        name: value
        for name, value in headers.items()
        if name not in _DROPPED and name not in Task.model_fields and name not in stamps
    }
    return fields


def request_headers(claims: TaskClaims) -> dict[str, Any]:
    """Return the message headers Celery builds its request from: the claims, and nothing that was not signed."""
    task = claims.task
    headers: dict[str, Any] = {name: getattr(task, name) for name in _HEADERS}
    headers.update(
        lang="py",
        task=task.name,
        timelimit=list(task.timelimit),
        origin=claims.origin,
        owner=claims.owner,
        headers=dict(task.headers),
        argsrepr="(hidden)",
        kwargsrepr="(hidden)",
    )
    return headers


def new_id() -> str:
    """Return a unique message id (``jti``)."""
    return uuid.uuid4().hex


def timestamp(moment: str) -> float:
    """Return the seconds since the epoch of an ISO 8601 time; without an offset it is UTC, as Celery reads it.

    Raises:
        BadShape: not ISO 8601.
    """
    try:
        parsed = datetime.fromisoformat(moment)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise BadShape("eta or expires") from error


def places(error: ValidationError) -> str:
    """Name what is wrong where, without any value: ``task.retries: Input should be a valid integer``.

    A place can be a key that the sender chose; only plain names are repeated.
    """

    def place(loc: tuple[int | str, ...]) -> str:
        return ".".join(str(part) if _PLAIN.fullmatch(str(part)) else "?" for part in loc)

    details = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{place(item['loc'])}: {item['msg']}" for item in details[:5])
