"""What a task message signs: every field Celery acts on, as one set of claims.

Guards against: headers, properties and ``embed`` keys changed or added after signing. Claims *replace* what arrived;
nothing is compared, so nothing can be forgotten in a comparison. And against a signer whose own headers or stamps have
Celery's names: a worker that retries the task sends them again, as its own task name, for example.
Rests on: RFC 7519 names for the registered claims; Celery's message protocol 2 for the rest.
Controls: SIG-3, SIG-4.
"""

from __future__ import annotations

import inspect
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Self, get_args

import amqp
import celery
import kombu
from celery.app.amqp import AMQP
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core.core_schema import ErrorType

from . import codec
from .errors import BadShape

#: No control, formatting or private characters and no line separators: these texts end up in logs and on terminals.
Text = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\p{C}\p{Zl}\p{Zp}]+$")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
#: A header of the caller's own (tracing, for example). Celery's context turns keys into attributes, so they stay apart.
Custom = dict[Text, str | int | float | bool | None]

_PLAIN = re.compile(r"[A-Za-z0-9_]{1,40}")
#: Pydantic's errors without those whose text can hold a part of the value.
_VALUELESS = frozenset(get_args(ErrorType)).difference(
    "assertion_error bytes_invalid_encoding get_attribute_error iteration_error json_invalid".split(),
    "url_parsing union_tag_invalid uuid_parsing value_error".split(),
)


class Signed(BaseModel):
    """What is signed has these fields and no others, each of its very type."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Parse a verified payload.

        Raises:
            BadShape: it is not exactly these claims. The error names the places, never the values.
        """
        try:
            return cls.model_validate(codec.decode(payload))
        except ValidationError as error:
            raise BadShape(places(error)) from None


class Task(Signed):
    """Celery's own fields of a task message; named as in message protocol 2."""

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
    app_id: Text | None = None
    priority: Annotated[int, Field(ge=0, le=255)] | None = None
    ignore_result: bool | None = None
    replaced_task_nesting: Annotated[int, Field(ge=0, le=1000)] = 0
    stamped_headers: list[Text] | None = None
    stamps: dict[Text, Any] | None = None
    headers: Custom = {}

    @model_validator(mode="after")
    def _own_names(self) -> Self:
        """Refuse stamps and the caller's own headers under names that a retry would hand to Celery."""
        stamps = set(self.stamps or ())
        if stamps != set(self.stamped_headers or ()):
            raise BadShape("stamps and stamped_headers differ")
        if not _CELERYS_HEADERS.isdisjoint(self.headers) or not _CELERYS_OPTIONS.isdisjoint(stamps):
            raise BadShape("a header or stamp has one of Celery's names")
        return self


class Embed(Signed):
    """The four canvas keys; a fifth would be spread over the request by Celery's tracer."""

    callbacks: list[Any] | None = None
    errbacks: list[Any] | None = None
    chain: list[Any] | None = None
    chord: Any = None


class TaskClaims(Signed):
    """The payload of a task envelope.

    ``iat`` and ``exp`` are whole seconds since the epoch. ``iss`` signs now; ``origin`` is on whose behalf,
    ``owner`` whose ids these are; they differ from ``iss`` only where a worker sends for a message (see ``ownership``).
    """

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
        """Parse a verified payload; raises as ``Signed.parse``, or for what is no time."""
        claims = super().parse(payload)
        for moment in filter(None, (claims.task.eta, claims.task.expires)):
            utc(moment)
        return claims


#: Properties of a message, and Celery's header names, that are claims under the same name.
PROPERTIES = ("reply_to", "correlation_id", "app_id", "priority")
_HEADERS = tuple(name for name in Task.model_fields if name not in {"name", "headers", *PROPERTIES})
#: Headers Celery writes itself and that are not worth signing: they inform nobody but a log.
_DROPPED = frozenset({"lang", "task", "argsrepr", "kwargsrepr", "origin", "owner", "compression"})
_CELERYS_HEADERS = _DROPPED | Task.model_fields.keys()
#: A stamp becomes an option of ``apply_async``, from where it goes on as an option of each of these.
_SEND = (celery.Task.apply_async, celery.Celery.send_task, AMQP.as_task_v2, kombu.Producer.publish)
_CELERYS_OPTIONS = _CELERYS_HEADERS.union(
    *(inspect.signature(function).parameters for function in _SEND),
    ("event_dispatcher", "exchange_type", "queue"),  # of AMQP.send_task_message, which is a closure
    (name for name, _ in amqp.Message.PROPERTIES),
)


def task_fields(headers: Mapping[str, Any], properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``task`` claim for a message that Celery is about to publish."""
    fields = {name: headers[name] for name in _HEADERS if headers.get(name) is not None}
    fields["name"] = headers["task"]
    fields |= {name: properties[name] for name in PROPERTIES if properties.get(name) not in {None, ""}}
    own = headers.keys() - _CELERYS_HEADERS - set(headers.get("stamped_headers") or ())
    fields["headers"] = {name: headers[name] for name in own}
    return fields


def request_headers(claims: TaskClaims) -> dict[str, Any]:
    """Return the message headers Celery builds its request from: the claims, and nothing that was not signed."""
    task = claims.task
    return {
        **{name: getattr(task, name) for name in _HEADERS},
        "lang": "py",
        "task": task.name,
        "eta": task.eta and utc(task.eta).isoformat(),  # Celery's parser reads some texts in another way, or not at all
        "expires": task.expires and utc(task.expires).isoformat(),
        "timelimit": list(task.timelimit),
        "origin": claims.origin,
        "owner": claims.owner,
        "headers": dict(task.headers),
        "argsrepr": "(hidden)",
        "kwargsrepr": "(hidden)",
    }


def new_id() -> str:
    """Return a unique message id (``jti``)."""
    return uuid.uuid4().hex


def utc(moment: str) -> datetime:
    """Return an ISO 8601 time in UTC; without an offset it is UTC already, as Celery reads it.

    Raises:
        BadShape: not ISO 8601, or before the year 1 or after 9999 in UTC.
    """
    try:
        parsed = datetime.fromisoformat(moment)
        return parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise BadShape("eta or expires") from error


def places(error: ValidationError, shown: int = 40) -> str:
    """Name what is wrong where, without any value: ``task.retries: Input should be a valid integer``.

    A place can be a key that the sender chose; of names, only plain ones among the first ``shown`` parts are repeated.
    So can be the text of a validator that is not Pydantic's own.
    """

    def place(loc: tuple[int | str, ...]) -> str:
        return ".".join(
            str(part) if isinstance(part, int) or (depth < shown and _PLAIN.fullmatch(part)) else "?"
            for depth, part in enumerate(loc)
        )

    details = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(
        f"{place(item['loc'])}: {item['msg'] if item['type'] in _VALUELESS else 'is not accepted'}"
        for item in details[:5]
    )
