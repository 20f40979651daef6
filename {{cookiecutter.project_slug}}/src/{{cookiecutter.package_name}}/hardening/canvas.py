"""Which tasks a message names besides its own: callbacks, the rest of a chain, a chord's body, a ``celery.map``.

Guards against: a caller that has a worker send, with the worker's rights, what it may not send itself.
Rests on: reading signatures as ``celery.canvas`` does. Whatever Celery could read in another way than this module is
refused: unknown keys, options that its constructors take for something else, built-in tasks in another form than
Celery's own.
Controls: AUT-3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .claims import TaskClaims
from .errors import BadShape

#: A task's name, and the queue that its signature asks for; None leaves that to the worker's own routing.
Named = tuple[str, str | None]

_KEYS = frozenset({"task", "args", "kwargs", "options", "subtask_type", "immutable"})
#: ``Signature.__init__`` would take these options for its arguments, and could find more signatures in them.
_PARAMETERS = _KEYS | {"app", "type"}
_LINKS = ("link", "link_error", "chain", "chord")
#: Never sent themselves: type of signature, its name, the arguments that hold signatures.
_COMPOSITES = {
    "chain": ("celery.chain", ("tasks",)),
    "group": ("celery.group", ("tasks",)),
    "chord": ("celery.chord", ("header", "body")),
}
#: Built-in tasks that run another one, which their first argument names.
_MAPS = frozenset({"celery.map", "celery.starmap", "celery.chunks"})
#: Takes data only; it ends a group that replaced a task.
_ACCUMULATE = "celery.accumulate"


def named(claims: TaskClaims) -> Iterator[Named]:
    """Yield what else the message can make a worker run or send.

    Raises:
        BadShape: something in it is no signature that Celery makes.
    """
    embed = claims.embed
    for signatures in (embed.callbacks, embed.errbacks, embed.chain, embed.chord):
        yield from _signatures(signatures)
    yield from _arguments(claims.task.name, claims.args, claims.kwargs)


def _arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Named]:
    """Look into the arguments of a built-in task."""
    if name in _MAPS:
        mapped = args[0] if args else kwargs.get("task")
        if isinstance(mapped, dict):  # its type would decide what runs, and its items could be signatures
            mapped = None if mapped.get("subtask_type") else mapped.get("task")
        if not isinstance(mapped, str) or mapped.startswith("celery."):
            raise BadShape(f"what {name} maps")
        yield mapped, None
    elif name == "celery.chord_unlock":
        yield from _signatures(args[1] if len(args) > 1 else kwargs.get("callback"))
    elif name in {builtin for builtin, _ in _COMPOSITES.values()}:
        raise BadShape(f"{name}, which Celery has not sent since version 3")


def _signatures(value: Any) -> Iterator[Named]:
    if value is None:
        return
    for signature in value if isinstance(value, list) else [value]:
        yield from _signature({"task": signature} if isinstance(signature, str) else signature)


def _signature(signature: Any) -> Iterator[Named]:
    if not isinstance(signature, dict) or not isinstance(signature.get("task"), str) or not signature.keys() <= _KEYS:
        raise BadShape("a signature's keys")
    name, kind, args = signature["task"], signature.get("subtask_type"), signature.get("args") or []
    options, kwargs = signature.get("options", {}), signature.get("kwargs", {})
    shapes = ((kind, str | None), (args, list), (options, dict), (kwargs, dict))
    if not all(isinstance(part, shape) for part, shape in shapes):
        raise BadShape("a signature's shape")
    parameters = {name: options[name] for name in options.keys() & _PARAMETERS}
    if parameters not in ({}, {"immutable": True}):  # which chord.link_error() gives to the errbacks of its header
        raise BadShape("a signature's options")
    for link in _LINKS:
        yield from _signatures(options.get(link))
    queue = options.get("queue") or options.get("routing_key")
    if not isinstance(queue, str | None):
        raise BadShape("a signature's queue")
    if kind is not None:
        builtin, holding = _COMPOSITES.get(kind, (None, ()))
        if name != builtin:
            raise BadShape("a signature's type")
        parts = {part for key in holding for part in _signatures(kwargs.get(key))}
        yield from parts
        if queue is not None:  # which Celery hands down to some of them
            yield from {(part, queue) for part, _ in parts}
        return
    if name.startswith("celery.") and name != _ACCUMULATE:
        # What the task before it returned must not become its arguments.
        if name not in _MAPS or signature.get("immutable") is not True:
            raise BadShape("a built-in task")
        yield from _arguments(name, args, kwargs)
    yield name, queue
